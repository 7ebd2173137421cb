"""Compressed caches that cannot be, and those that would not be exact: refused before anything is lowered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import skipstone
from skipstone import CompressKV, FuseParallel, LayerParallel, Plan, QuantizeKV, Segment, SkipByPrompt, StreamingHeads
from skipstone.errors import InvalidPlan, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.dialect import ATTENTION, WINDOWED_ATTENTION
from skipstone.passes.base import Status
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.rewrite import check_plan, rewrite
from tests.compress_cases import captured, model, optimized, tokens
from tests.tiny_models import tiny_model

CHOSEN = (StreamingHeads(1, (0,)),)
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no window": ({"window": 0}, "window is 0, expected 1 or more"),
    "sinks": ({"window": 4, "sinks": -1}, "sinks is -1, expected 0 or more"),
    "heads without a window": ({"streaming": CHOSEN}, "streaming heads without a window"),
    "twice": ({"window": 4, "streaming": CHOSEN * 2}, "layer 1 stands twice in streaming"),
    "no heads": ({"window": 4, "streaming": (StreamingHeads(1, ()),)}, "numbers from 0 on, one at least"),
    "not among layers": ({"window": 4, "streaming": CHOSEN, "layers": (0,)}, "layer 1 has streaming heads, but is not"),
}
PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"window": 4, "layers": (7,)}, "layer 7 has no cached attention. The nearest is 2"),
    "streaming layer": ({"window": 4, "streaming": (StreamingHeads(5, (0,)),)}, "layer 5 has no cached attention"),
    "head": ({"window": 4, "streaming": (StreamingHeads(2, (1, 2)),)}, "no key-value head 2 in layer 2. The last"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_impossible_settings_are_refused_before_the_model_is_looked_at(name: str) -> None:
    settings, message = SETTINGS[name]
    with pytest.raises(InvalidPlan, match=f"compress_kv: .*{message}"):
        check_plan(Plan([CompressKV(**settings)]), "eager", calibrated=False)


@pytest.mark.parametrize("name", PLACES)
def test_places_that_the_model_does_not_have(name: str) -> None:
    settings, message = PLACES[name]
    with pytest.raises(InvalidPlan, match=message):
        optimized("gqa", Plan([CompressKV(**settings)]))


def test_not_with_skipping_by_prompt() -> None:
    by_prompt = SkipByPrompt(sets=(SkipSublayers(ffn=(1,)),))
    with pytest.raises(Unsupported, match="compress_kv together with skip_by_prompt"):
        check_plan(Plan([by_prompt, CompressKV()]), "eager", calibrated=False)


def test_not_in_an_export(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="compress_kv in an ONNX model, whose loaders"):
        skipstone.export_onnx(model("gqa"), tmp_path / "out", Plan([CompressKV(window=8)]), progress=False)
    assert not (tmp_path / "out").exists()


def test_not_without_a_cache() -> None:
    with pytest.raises(Unsupported, match=r"compress_kv for a program without a KV cache.*or use cache=True"):
        optimized("gqa", Plan([CompressKV(window=8)]), cache=False)


def test_a_plan_that_finds_no_window_is_an_error() -> None:
    with pytest.raises(InvalidPlan, match=r"compress_kv applied nowhere: .*no attention sees a window of tokens"):
        optimized("gqa", Plan([CompressKV()]))
    assert not list(optimized("gqa", Plan([CompressKV()]), strict=False).program.nodes(WINDOWED_ATTENTION))


def test_chunks_are_left_as_they_are() -> None:
    source = captured("gqa").copy()
    first = next(source.nodes(ATTENTION))
    first.kwargs = {**first.kwargs, "kind": "chunked", "window": 8}
    program, _ = rewrite(source, Plan([CompressKV(window=4)]), target="eager")
    assert [node.meta["layer"] for node in program.nodes(WINDOWED_ATTENTION)] == [1, 2]


def test_keys_without_their_bias_keep_all_rows() -> None:
    """What quantizing splits off the keys is added back for every row of a cache, by its place."""
    source = capture_huggingface(tiny_model("qwen2"))
    with torch.no_grad():
        for name, tensor in source.tensors().items():
            if name.endswith("k_proj.bias"):
                tensor.mul_(1000)
    plan = Plan([CompressKV(window=4), QuantizeKV(granularity="token")])
    program, _ = rewrite(source, plan, target="eager", strict=False)
    assert not list(program.nodes(WINDOWED_ATTENTION))
    (record,) = [each for each in program.history if each.name == "compress_kv"]
    assert record.remarks and all(each.status is Status.REFUSED for each in record.remarks)
    assert "kept without their bias" in record.remarks[0].why


@pytest.mark.parametrize("kv", ["last", "final"])
def test_slots_that_several_iterations_write(kv: Any) -> None:
    parallel = LayerParallel((Segment(0, 3, iterations=2),), kv=kv)
    with pytest.raises(Unsupported, match="compress_kv for a cache slot that several iterations write"):
        optimized("gqa", Plan([parallel, CompressKV(window=8)]))


def test_layers_side_by_side_are_compressed_together() -> None:
    entries = [LayerParallel((Segment(0, 3),)), FuseParallel()]
    opt = optimized("gqa", Plan([*entries, CompressKV(window=8)]))
    (node,) = opt.program.nodes(WINDOWED_ATTENTION)
    assert node.args[1].meta["val"].shape[1] == 6
    rows = tokens(1, 200)
    _, cache = opt.prefill(rows[:, :150])
    found = opt.decode(rows[:, 150:], cache)
    assert torch.allclose(found, opt(rows).logits[:, 150:], atol=1e-4)
    with pytest.raises(Unsupported, match="some heads or layers where attentions of several layers are one"):
        optimized("gqa", Plan([*entries, CompressKV(window=8, layers=(0,))]))
