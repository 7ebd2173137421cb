"""Compressed prompts that cannot be, and those that would not be exact: refused before anything is lowered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import skipstone
from skipstone import (
    CompressKV,
    CompressPrompt,
    FuseParallel,
    LayerParallel,
    Plan,
    QuantizeKV,
    QuantizeWeights,
    Segment,
    SelfSpeculate,
)
from skipstone.errors import InvalidPlan, Unsupported
from skipstone.find import find_self_speculate
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.dialect import CACHED_OPS, kept_rows
from skipstone.passes.base import Status
from skipstone.rewrite import check_plan, rewrite
from skipstone.runtime.onnx.lower import lower
from tests import models
from tests.compress_cases import captured, model, optimized, tokens
from tests.tiny_models import tiny_model

ENTRY = CompressPrompt(rows=12, observed=4, sinks=2)
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "observed": ({"observed": 0}, "observed is 0, expected 1 or more"),
    "sinks": ({"sinks": -1}, "sinks is -1, expected 0 or more"),
    "rows": ({"rows": 36}, "rows is 36, which 32 observed ones and 4 sinks take up already. Keep 37 rows or more"),
    "pool": ({"pool": 4}, "pool is 4, expected an odd number. The nearest is 3"),
    "redundancy": ({"redundancy": 1.5}, "redundancy is 1.5, expected 0 to 1"),
}
COMPANY: dict[str, tuple[Any, str]] = {
    "windows": (CompressKV(window=9), "compress_kv together with compress_prompt, which reads prompts in one step"),
    "draft": (SelfSpeculate(weights=QuantizeWeights(4)), "self_speculate together with compress_prompt"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_impossible_settings_are_refused_before_the_model_is_looked_at(name: str) -> None:
    settings, message = SETTINGS[name]
    with pytest.raises(InvalidPlan, match=f"compress_prompt: {message}"):
        check_plan(Plan([CompressPrompt(**settings)]), "eager", calibrated=False)


@pytest.mark.parametrize("name", COMPANY)
def test_entries_that_do_not_go_together(name: str) -> None:
    other, message = COMPANY[name]
    with pytest.raises(Unsupported, match=message):
        check_plan(Plan.of([other, ENTRY]), "eager", calibrated=False)


def test_a_draft_is_not_looked_for_beside_it() -> None:
    with pytest.raises(InvalidPlan, match="programs of its own to go on with"):
        find_self_speculate(model("gqa"), [tokens(2, 40)], Plan([ENTRY]), target="eager")


def test_a_layer_that_the_model_does_not_have() -> None:
    with pytest.raises(InvalidPlan, match=r"compress_prompt: layer 7 has no cached attention. The nearest is 2"):
        optimized("gqa", Plan([CompressPrompt(layers=(7,))]))


def test_not_in_an_export(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="compress_prompt in an ONNX model, whose loaders"):
        skipstone.export_onnx(model("gqa"), tmp_path / "out", Plan([ENTRY]), progress=False)
    assert not (tmp_path / "out").exists()


def test_an_operator_that_fixes_a_size_is_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.export `max_pool1d` takes the length of the example for the only one."""

    def fixed(_q: Any, k: Any, *_operands: Any, **_options: Any) -> Any:
        return torch.nn.functional.max_pool1d(k.sum(dim=-1), 3, stride=1, padding=1)

    monkeypatch.setattr("skipstone.runtime.onnx.forms.prompt_scores_reference", fixed)
    program, _ = rewrite(captured("gqa").copy(), Plan([ENTRY]), target="onnxruntime")
    with pytest.raises(Unsupported, match=r"works for size \d+ in dimension 1 of 'input_ids' alone"):
        lower(program)


def test_not_in_the_backend() -> None:
    own = LlamaForCausalLM(model("gqa").config).eval()
    compiled = torch.compile(own, backend="skipstone", options={"plan": Plan([ENTRY])})
    with pytest.raises(Exception, match=r"compress_prompt .*which tokens are a prompt, and the cache behind it"):
        compiled(tokens(1, 8))


def test_not_without_a_cache() -> None:
    with pytest.raises(Unsupported, match=r"compress_prompt for a program without a KV cache.*or use cache=True"):
        optimized("gqa", Plan([ENTRY]), cache=False)


def test_not_where_iterations_share_a_slot() -> None:
    parallel = LayerParallel((Segment(0, 3, iterations=2),), kv="last")
    with pytest.raises(Unsupported, match="cache slot that several iterations write"):
        optimized("gqa", Plan([parallel, ENTRY]))


def test_attentions_of_several_layers_are_compressed_together_or_not_at_all() -> None:
    plan = [LayerParallel((Segment(0, 2),)), FuseParallel()]
    with pytest.raises(Unsupported, match="some layers where attentions of several layers are one"):
        optimized("gqa", Plan([*plan, CompressPrompt(layers=(0,))]))
    opt = optimized("gqa", Plan([*plan, ENTRY]))
    assert [kept_rows(node) for node in opt.program.continuations[0].nodes(*CACHED_OPS)] == [12, 12]
    rows = tokens(2, 50)
    _, cache = opt.prefill(rows[:, :40])
    steps = torch.stack([opt.decode(rows[:, place], cache) for place in range(40, 50)], dim=1)
    _, cache = opt.prefill(rows[:, :40])
    torch.testing.assert_close(opt.decode(rows[:, 40:], cache), steps, atol=1e-4, rtol=1e-4)


def test_prompts_are_read_whole() -> None:
    opt = optimized("gqa", Plan([ENTRY]))
    with pytest.raises(Unsupported, match="reading a prompt in pieces"):
        opt.generate(tokens(1, 40), max_new_tokens=4, do_sample=False, prefill_chunk_size=16)


def test_recomputing_would_keep_everything() -> None:
    with pytest.raises(Unsupported, match="use_cache=False with a plan by which decoded tokens are computed"):
        optimized("gqa", Plan([ENTRY])).generate(tokens(1, 40), max_new_tokens=4, use_cache=False)


@pytest.mark.slow
def test_windows_of_the_model_stay() -> None:
    """A layer with a window of its own keeps all rows, one without is compressed."""
    opt = skipstone.optimize(models.model("gemma2"), Plan([ENTRY]), target="eager", progress=False)
    found = [
        (node.kwargs["kind"] == "causal", kept_rows(node)) for node in opt.program.continuations[0].nodes(*CACHED_OPS)
    ]
    assert set(found) == {(True, 12), (False, 0)}
    rows = models.tokens(1, 40)
    logits, cache = opt.prefill(rows)
    with torch.no_grad():
        torch.testing.assert_close(logits, models.model("gemma2")(rows).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert torch.isfinite(opt.decode(rows[:, 0], cache)).all()
    with pytest.raises(InvalidPlan, match=r"compress_prompt applied nowhere: .*no attention sees all tokens before it"):
        skipstone.optimize(models.model("mixtral"), Plan([ENTRY]), target="eager", progress=False)


@pytest.mark.parametrize(
    ("quantize", "why"),
    [
        (QuantizeKV(k="int4", v="int4", granularity="group", group=8, condition=False), "tokens share their scales"),
        (QuantizeKV(granularity="token", residual=8, condition=False), "kept in full precision, by their place"),
        (QuantizeKV(granularity="token", sinks=4, condition=False), "kept in full precision, by their place"),
    ],
)
def test_formats_whose_rows_stay_where_they_are(quantize: QuantizeKV, why: str) -> None:
    opt = optimized("gqa", Plan([quantize, ENTRY]), strict=False)
    (record,) = [each for each in opt.program.history if each.name == "compress_prompt"]
    assert record.remarks and all(each.status is Status.REFUSED and why in each.why for each in record.remarks)
    assert not opt.program.continuations


@pytest.mark.slow
def test_keys_without_their_bias_keep_all_rows() -> None:
    source = capture_huggingface(tiny_model("qwen2"))
    with torch.no_grad():
        for name, tensor in source.tensors().items():
            if name.endswith("k_proj.bias"):
                tensor.mul_(1000)
    program, _ = rewrite(source, Plan([QuantizeKV(granularity="token"), ENTRY]), target="eager", strict=False)
    (record,) = [each for each in program.history if each.name == "compress_prompt"]
    assert all("kept without their bias" in each.why for each in record.remarks) and not program.continuations
