"""Plans with a draft: how they are written down, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.exc import BackendCompilerFailed

from skipstone import (
    Budget,
    FuseParallel,
    LayerParallel,
    Plan,
    QuantizeKV,
    QuantizeWeights,
    Segment,
    SelfSpeculate,
    SkipByPrompt,
    SkipFFNAdaptive,
    SkipSublayers,
    optimize,
)
from skipstone.errors import InvalidPlan, Malformed, SkipstoneError, Unsupported
from skipstone.export import export_onnx
from skipstone.ir.verify import verify
from skipstone.optimize import check_plan, rewrite
from skipstone.passes.base import Pass, Status
from tests import models
from tests import speculation_cases as cases
from tests.backend_cases import compiled
from tests.backend_cases import uncompiled as uncompiled
from tests.speculation_cases import FAIR, FUSED, PERFECT, built

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------------------------------------------------------- plans

NUMBERS = st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=3).map(tuple)
ENTRIES = st.builds(
    SelfSpeculate,
    tokens=st.integers(1, 31),
    skip=st.builds(SkipSublayers, attention=NUMBERS, ffn=NUMBERS),
    parallel=st.none() | st.just(LayerParallel((Segment(1, 4, iterations=2), Segment(5, 7)), kv="last")),
    weights=st.none() | st.builds(QuantizeWeights, st.sampled_from([4, 8])),
    adaptive=st.none() | st.builds(SkipFFNAdaptive, threshold=st.floats(0, 1)),
)


@given(ENTRIES)
def test_json_gives_back_the_plan(entry: SelfSpeculate) -> None:
    plan = Plan([SkipSublayers(layers=(11,)), entry])
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    entry.validate()


def test_the_form_of_the_file(tmp_path: Path) -> None:
    plan = Plan([SelfSpeculate(7, SkipSublayers(layers=(3,)))])
    plan.save(tmp_path / "plan.json")
    (entry,) = json.loads((tmp_path / "plan.json").read_text())["entries"]
    nothing = {"parallel": None, "weights": None, "adaptive": None, "lookup": 0}
    assert entry.pop("skip") == {"attention": [], "ffn": [], "layers": [3], "paths": []}
    assert entry == {"pass": "self_speculate", "version": 1, "tokens": 7, **nothing}
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "fields", [{"tokens": "4"}, {"tokens": None}, {"skip": 3}, {"skip": {"layer": [1]}}, {"parallel": {}, "draft": 1}]
)
def test_what_no_plan_can_say(fields: dict[str, Any]) -> None:
    data = json.loads(Plan([FAIR]).to_json())
    data["entries"][0] |= fields
    with pytest.raises(InvalidPlan):
        Plan.from_json(json.dumps(data))


def test_one_draft_a_plan() -> None:
    with pytest.raises(InvalidPlan):
        Plan([FAIR, PERFECT])


def test_what_the_draft_does_besides() -> None:
    fuse, skip = FuseParallel(), SkipSublayers(attention=(1,), layers=(4,))
    plan = [skip, QuantizeWeights(8)]
    entry = SelfSpeculate(skip=SkipSublayers(attention=(1, 2), ffn=(0,)), weights=QuantizeWeights(4))
    assert Plan.of(entry.entries([*plan, entry])) == Plan(
        [SkipSublayers(attention=(1, 2), ffn=(0,), layers=(4,)), QuantizeWeights(4)]
    )
    beneath = [skip, LayerParallel((Segment(0, 4, iterations=2),)), fuse, QuantizeWeights(8)]
    assert Plan.of(FUSED.entries([*beneath, FUSED])) == Plan([skip, FUSED.parallel, fuse, QuantizeWeights(8)])


def test_what_is_said_of_a_draft() -> None:
    opt = built((FUSED,))
    remarks = [each for each in opt.program.history[-1].remarks if each.status is Status.APPLIED]
    assert opt.program.history[-1].name == "self_speculate"
    whole, *parts = remarks
    sizes = [sum(1 for _ in each.nodes()) for each in (opt.program.draft.program, opt.program)]
    assert (
        whole.why == f"3 tokens at a time from a draft of {sizes[0]} operators, of {sizes[1]}, and 3 cache slots, of 4"
    )
    assert parts and all(each.where.startswith("draft, ") for each in parts)
    assert {each.pass_name for each in parts} == {"layer_parallel", "fuse_parallel"}
    # Of what two layers have side by side, the draft has stacks; all else is the model's.
    layers = cases.model().model.layers
    together = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # in every layer
    stacked = (*together, "o_proj", "down_proj", "post_attention_layernorm")
    own = [(layer, stacked if number >= 2 else together) for number, layer in enumerate(layers)]
    named = [(name.split(".")[-2], each, parts) for layer, parts in own for name, each in layer.named_parameters()]
    assert whole.numbers["own_bytes"] == sum(each.nbytes for name, each, parts in named if name in parts)
    assert built((FAIR,)).program.history[-1].remarks[0].numbers["own_bytes"] == 0


def test_what_both_were_rewritten_to_is_in_memory_once() -> None:
    """Stacks of layers that the draft runs as the model does, and weights that were conditioned."""
    alone, beside = (built(entries).program for entries in ((FUSED,), (FuseParallel(), FUSED)))
    first = [name for name in beside.draft.program.tensors() if name.startswith("rows_")]
    places = {tensor.data_ptr() for tensor in beside.tensors().values()}
    shared = [name for name in first if beside.draft.program.tensor(name).data_ptr() in places]
    assert 0 < len(shared) < len(first)
    sizes = [each.history[-1].remarks[0].numbers["own_bytes"] for each in (alone, beside)]
    assert sizes[0] - sizes[1] == sum(beside.draft.program.tensor(name).nbytes for name in shared)
    conditioned = QuantizeKV("int8", "int8", granularity="token", residual=4)
    quantized = cases.program((conditioned, FAIR))
    assert any(each.name == "condition_kv" for each in quantized.history)
    assert quantized.history[-1].remarks[0].numbers["own_bytes"] == 0


# ------------------------------------------------------------------------------------------------------------- refusals


def parallel(*segment: int, kv: Any = "iterate") -> LayerParallel:
    start, stop, iterations = segment
    return LayerParallel((Segment(start, stop, iterations=iterations),), kv=kv)


SOME = SkipSublayers(layers=(1,))
LIGHT = SelfSpeculate(weights=QuantizeWeights(4))
BY_PROMPT = SkipByPrompt((SkipSublayers(ffn=(0,)),))


@pytest.mark.parametrize(
    ("entries", "kind", "message"),
    [
        ((SelfSpeculate(),), InvalidPlan, "the draft is the model itself"),
        ((SelfSpeculate(skip=SkipSublayers()),), InvalidPlan, "the draft is the model itself"),
        ((SelfSpeculate(0, SOME),), InvalidPlan, "0 tokens at a time. The nearest is 1."),
        ((SelfSpeculate(-5, SOME),), InvalidPlan, "-5 tokens at a time. The nearest is 1."),
        ((SelfSpeculate(32, SOME),), InvalidPlan, "32 tokens at a time. The nearest is 31."),
        ((SelfSpeculate(parallel=LayerParallel((Segment(2, 1),))),), InvalidPlan, "holds no layer"),
        ((SelfSpeculate(adaptive=SkipFFNAdaptive(threshold=-2.0)),), InvalidPlan, "skip_ffn_adaptive"),
        ((BY_PROMPT, FAIR), Unsupported, "self_speculate together with skip_by_prompt"),
    ],
)  # fmt: skip
def test_no_model_is_needed_to_refuse(entries: tuple[Pass, ...], kind: type[SkipstoneError], message: str) -> None:
    with pytest.raises(kind) as caught:
        optimize(cases.model(), Plan(entries), target="eager", progress=False)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "kind", "message"),
    [
        ((SelfSpeculate(skip=SkipSublayers(attention=(0, 1, 2, 3))),), Unsupported, "keep one attention at least"),
        ((SelfSpeculate(skip=SkipSublayers(layers=(0, 1, 2, 3))),), InvalidPlan, "skips every sublayer"),
        ((SkipSublayers(layers=(0, 1)), SelfSpeculate(skip=SkipSublayers(layers=(2, 3)))), InvalidPlan, "skips every"),
        ((SelfSpeculate(skip=SkipSublayers(layers=(4,))),), InvalidPlan, "the model has layers 0 to 3"),
        ((SelfSpeculate(parallel=parallel(2, 5, 1)),), SkipstoneError, "layers 0 to 3"),
        ((parallel(0, 4, 2, kv="last"), LIGHT), Unsupported, "a cache slot that several iterations write"),
        ((parallel(0, 4, 2, kv="final"), LIGHT), Unsupported, "kv='iterate' in layer_parallel"),
        (
            (parallel(0, 3, 2), FuseParallel(), SelfSpeculate(skip=SkipSublayers(ffn=(2,)))), Unsupported,
            "keys and values that the model does not keep one by one at model.layers.1.self_attn",
        ),
        (
            (parallel(0, 4, 3), SelfSpeculate(parallel=parallel(2, 4, 1))), Unsupported,
            "a module that attends 2 times, 1 times in the draft at model.layers.1.self_attn",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(entries: Any, kind: type[SkipstoneError], message: str) -> None:
    with pytest.raises(kind) as caught:
        rewrite(cases.captured(), Plan(entries), target="eager", strict=False)
    assert message in str(caught.value)


def test_a_draft_needs_a_cache() -> None:
    with pytest.raises(Unsupported, match="self_speculate without a KV cache"):
        rewrite(cases.captured(), Plan([FAIR]), target="eager", cache=False)


@pytest.mark.slow
def test_a_draft_needs_a_model_that_can_have_a_cache() -> None:
    _, reason = rewrite(models.program("llada"), Plan(), target="eager")
    with pytest.raises(Unsupported) as caught:
        rewrite(models.program("llada"), Plan([FAIR]), target="eager")
    assert str(caught.value) == str(reason)


def test_an_onnx_model_has_no_loop(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="self_speculate in an ONNX model, which has no loop over tokens"):
        export_onnx(cases.model(), tmp_path / "out", Plan([FAIR]), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("uncompiled")
def test_a_backend_sees_single_calls() -> None:
    fast, _ = compiled(cases.model(), Plan([FAIR]))
    with pytest.raises(BackendCompilerFailed) as caught, torch.no_grad():
        fast(input_ids=torch.ones(1, 5, dtype=torch.int64))
    said = str(caught.value.inner_exception)
    assert "self_speculate in a torch.compile backend, which does not see what is generated from call to call" in said


def test_there_is_nothing_to_prove() -> None:
    options: Any = {"target": "eager", "calibration": [models.tokens(2, 9)], "progress": False}
    with pytest.raises(InvalidPlan, match="there is nothing to prove"):
        optimize(cases.model(), Plan([FAIR]), budget=Budget(nll=0.1), **options)


def test_weights_of_a_draft_on_triton() -> None:
    with pytest.raises(Unsupported, match="quantize_weights on the triton target"):
        check_plan(Plan([SelfSpeculate(weights=QuantizeWeights(4))]), "triton", calibrated=False)


@pytest.mark.parametrize("change", [{"key_1": ()}, {"key_1": ("key_9",)}, {"key_2": ("key_2",)}, {"key_1": None}])
def test_buffers_that_the_model_does_not_have_are_malformed(change: dict[str, Any]) -> None:
    program = built((FUSED,)).program
    verify(program, rules=(10,))
    draft = program.draft
    buffers = {name: sources for name, sources in {**draft.buffers, **change}.items() if sources is not None}
    with pytest.raises(Malformed, match="the draft's buffer key_"):
        verify(replace(program, draft=replace(draft, buffers=buffers)), rules=(10,))
