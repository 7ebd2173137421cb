"""All four rewrites in one plan: skipped sublayers, layers in parallel, adaptive FFNs, and a quantized cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from skipstone import FuseParallel, LayerParallel, Plan, QuantizeKV, Segment, SkipFFNAdaptive, SkipSublayers
from skipstone.cli import main
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.optimize import optimize
from skipstone.runtime.onnx.runner import Runner
from tests.backend_cases import close, compiled
from tests.backend_cases import uncompiled as uncompiled
from tests.export_cases import PADDINGS, PROMPT, Loader, all_nodes, assert_close, batch
from tests.versions import skip_without_group_query_attention

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Plan(
    [
        SkipSublayers(attention=(4,), ffn=(3,)),
        LayerParallel((Segment(1, 3),)),
        FuseParallel(),
        SkipFFNAdaptive(threshold=0.3, cold_start=1, cold_end=0, warmup_tokens=1, max_share=1.0),
        QuantizeKV(k="int8", v="int8"),
    ]
)


SEEN = Plan(PLAN.entries[:3])
"""What a graph of `torch.compile` shows enough for."""


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.4, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def built(model: LlamaForCausalLM) -> Iterator[dict[str, Any]]:
    """The plan on both targets; the second one reapplies what the first calibrated."""
    skip_without_group_query_attention()  # the cache is quantized
    program = capture_huggingface(model)
    with patch.object(import_module("skipstone.optimize"), "capture", lambda *_: program.copy()):
        ours = optimize(model, PLAN, target="onnxruntime", calibration=[tokens(4, 48)], progress=False)
        same = optimize(model, ours.plan, target="eager", progress=False)
    yield {"onnxruntime": ours, "eager": same}


def test_each_entry_is_carried_out(built: dict[str, Any]) -> None:
    for opt in built.values():
        applied = {remark.pass_name for remark in opt.report.remarks if remark.status.name == "APPLIED"}
        assert {"skip_sublayers", "layer_parallel", "fuse_parallel", "skip_ffn_adaptive", "quantize_kv"} <= applied
        assert len(opt.program.slots()) == 4  # of 6 attentions one is left out, and two are one


@pytest.mark.parametrize("batch", [1, 2])
def test_targets_agree_in_prompts_and_steps(built: dict[str, Any], batch: int) -> None:
    ids, mask = tokens(batch, 19, seed=3), torch.ones(batch, 19, dtype=torch.int64)
    mask[1:, :7] = 0
    scores = {}
    for target, opt in built.items():
        logits, cache = opt.prefill(ids, mask)
        found = [logits]
        for column in tokens(batch, 6, seed=4).split(1, dim=1):
            found.append(opt.decode(column[:, 0], cache))
        scores[target] = torch.stack(found)
    difference = (scores["onnxruntime"] - scores["eager"]).abs().max()
    assert difference < 5e-3 * (scores["eager"].max() - scores["eager"].min())  # single codes are rounded the other way


@pytest.mark.slow
def test_tokens_skip_and_generation_agrees(built: dict[str, Any], model: LlamaForCausalLM) -> None:
    ids = tokens(2, 11, seed=5)
    written = {target: opt.generate(ids, max_new_tokens=20, do_sample=False) for target, opt in built.items()}
    assert torch.equal(written["onnxruntime"], written["eager"])
    plan = built["eager"].plan
    full = Plan([entry for entry in plan if not isinstance(entry, SkipFFNAdaptive)], tensors=plan.tensors)
    never = optimize(model, full, target="eager", progress=False)
    assert not torch.equal(never.generate(ids, max_new_tokens=20, do_sample=False), written["eager"])


# ------------------------------------------------------------------------------------------------------ as a directory


@pytest.fixture(scope="module")
def exported(built: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Through the command line; the plan brings what was calibrated."""
    directory = tmp_path_factory.mktemp("compose")
    built["onnxruntime"].plan.save(directory / "plan.json")
    arguments = ["--plan", str(directory / "plan.json")]
    assert main(["export", "tests.test_compose:make_model", str(directory / "out"), *arguments]) == 0
    return directory / "out"


@pytest.mark.slow
def test_each_entry_is_in_the_file(exported: Path) -> None:
    proto = onnx.load(exported / "model.onnx", load_external_data=False)
    caches = [each for each in proto.graph.input if each.name.startswith("past_key_values.")]
    assert len(caches) == 2 * 4 and {each.type.tensor_type.elem_type for each in caches} == {onnx.TensorProto.INT8}
    assert [node for node in proto.graph.node if node.op_type == "If"]
    passes = {note.value for node in all_nodes(proto.graph) for note in node.metadata_props if "passes" in note.key}
    made_by = {name for names in passes for name in names.split(",")}
    assert {"fuse_parallel", "skip_ffn_adaptive", "quantize_kv"} <= made_by


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["alone", "left"])
def test_a_directory_computes_what_the_executable_does(built: dict[str, Any], exported: Path, padding: str) -> None:
    ids, mask = batch(PADDINGS[padding], vocabulary=61)
    opt, columns, valid = built["onnxruntime"], torch.tensor(ids), torch.tensor(mask)
    out = opt(columns[:, :PROMPT], attention_mask=valid[:, :PROMPT], use_cache=True)
    expected = [out.logits]
    for start in range(PROMPT, ids.shape[1]):
        options = {"attention_mask": valid[:, : start + 1], "past_key_values": out.past_key_values}
        expected.append(opt(columns[:, start : start + 1], **options).logits)
    got = Loader(exported).stepwise(ids, mask, decode_start=mask[:, :PROMPT].sum(1))
    assert_close(got, torch.cat(expected, dim=1).numpy(), mask)


@pytest.mark.slow
def test_the_runner_writes_what_the_executable_does(built: dict[str, Any], exported: Path) -> None:
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (11, 4, 7)]
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = [
        built["onnxruntime"].generate(torch.tensor([each]), **options)[0, len(each) :].tolist() for each in prompts
    ]
    assert Runner(exported, threads=1).generate(prompts, max_new_tokens=20) == expected


# -------------------------------------------------------------------------------------------------- under torch.compile


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("plan", "refused", "hint"),
    [
        (
            PLAN,
            "skip_ffn_adaptive in a torch.compile backend that is not told which tokens are a prompt",
            "decode_start",
        ),
        (
            Plan([*SEEN, PLAN.entries[4]]),
            "quantize_kv in a torch.compile backend, which does not see the cache",
            "Use skipstone.optimize(model, plan).",
        ),
    ],
)
def test_the_backend_says_what_it_cannot_take(model: LlamaForCausalLM, plan: Plan, refused: str, hint: str) -> None:
    fast, _ = compiled(model, plan)
    with pytest.raises(BackendCompilerFailed) as caught, torch.no_grad():
        fast(input_ids=tokens(1, 5))
    said = str(caught.value.inner_exception)
    assert said.startswith(f"unsupported: {refused}") and hint in said


@torch.no_grad()
def check_backend(model: LlamaForCausalLM, *steps: int) -> None:
    """Compare a prompt of 7 tokens, and steps of several."""
    fast, reports = compiled(model, SEEN)
    same = optimize(model, SEEN, target="eager", progress=False)
    ids, cache, own = tokens(2, 12, seed=6), DynamicCache(config=model.config), None
    for start, stop in itertools.pairwise((0, 7, *steps)):
        out = fast(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
        expected = same(ids[:, start:stop], past_key_values=own, use_cache=True)
        cache, own = out.past_key_values, expected.past_key_values
        close(out.logits, expected.logits)
    applied = {remark.pass_name for remark in reports[0].remarks if remark.status.name == "APPLIED"}
    assert {"skip_sublayers", "layer_parallel", "fuse_parallel"} <= applied


@pytest.mark.slow  # `test_backend.py` compares with models of transformers
@pytest.mark.usefixtures("uncompiled")
def test_the_backend_computes_what_optimize_does(model: LlamaForCausalLM) -> None:
    check_backend(model, 8)


@pytest.mark.slow
def test_inductor_computes_what_optimize_does(model: LlamaForCausalLM) -> None:
    torch._dynamo.reset()
    check_backend(model, 8, 9, 12)
