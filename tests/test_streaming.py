"""Which heads see a window: found where planted, measured as what they become."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

import skipstone
from skipstone import Budget, CompressKV, Plan, StreamingHeads, find_compress_kv
from skipstone.budget import METRICS
from skipstone.calibrate import Batch, token_batches
from skipstone.certify import within
from skipstone.errors import InvalidInput, InvalidPlan, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.program import Program
from skipstone.ir.stream import note_layers
from skipstone.optimize import lower
from skipstone.rewrite import rewrite
from skipstone.runtime.executable import Executable
from skipstone.streaming import Head, choose_streaming_heads, compare_streaming, entry_of, head_errors
from tests import models
from tests.compress_cases import CASES, LAYERS, captured, masked, model, reference, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

PLANTED = [Head(0, 1), Head(2, 0)]
"""Heads whose values are zeros: what they attend to does not matter."""
WINDOW, SINKS = 9, 3
SETTINGS = {"window": WINDOW, "sinks": SINKS}


@cache
def planted() -> Program:
    own = copy.deepcopy(model("gqa"))
    width = own.config.hidden_size // own.config.num_attention_heads
    with torch.no_grad():
        for each in PLANTED:
            own.model.layers[each.layer].self_attn.v_proj.weight[each.head * width : (each.head + 1) * width] = 0
    program = capture_huggingface(own)
    note_layers(program)
    return program


@cache
def batches() -> list[Batch]:
    """Two lengths, one of them padded."""
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[1, 31:] = 0
    data = [{"input_ids": tokens(3, 40), "attention_mask": mask}, tokens(2, 25, seed=1)]
    return token_batches(data, captured("gqa").source)


def test_heads_without_an_effect_are_found() -> None:
    found = choose_streaming_heads(planted(), batches(), Budget(kl=0.0), **SETTINGS)
    assert found.entry == CompressKV(WINDOW, SINKS, (StreamingHeads(0, (1,)), StreamingHeads(2, (0,))))
    assert found.heads == (2, 2 * LAYERS)
    assert METRICS["kl"](found.seen).value == 0


def test_all_heads_go_where_all_may() -> None:
    found = choose_streaming_heads(planted(), batches(), Budget(kl=100.0), **SETTINGS)
    assert found.heads == (2 * LAYERS, 2 * LAYERS)
    assert found.entry.streaming == tuple(StreamingHeads(layer, (0, 1)) for layer in range(LAYERS))


def test_errors_are_those_of_a_mask_in_the_model() -> None:
    """Of the attention's output, as the model's own hook sees it, on tokens that have more before them."""
    errors = head_errors(planted(), batches(), WINDOW, SINKS)
    assert {head for head, error in errors.items() if error == 0} == set(PLANTED)
    assert set(errors) == {Head(layer, head) for layer in range(LAYERS) for head in (0, 1)}
    program = captured("gqa")
    note_layers(program)
    errors = head_errors(program, batches(), WINDOW, SINKS)
    outputs: list[Tensor] = []
    hook = (
        model("gqa")
        .model.layers[0]
        .self_attn.o_proj.register_forward_pre_hook(lambda _module, args: outputs.append(args[0]))
    )
    try:
        for batch in batches():
            for row, valid in zip(batch.tokens, batch.valid, strict=True):
                with torch.no_grad():
                    model("gqa")(row[None, : int(valid.sum())])
                reference("gqa", "some heads", row[: int(valid.sum())])  # whose head 1 of layer 0 sees this window
    finally:
        hook.remove()
    pairs = zip(outputs[::2], outputs[1::2], strict=True)
    rows = [[each[0, WINDOW + SINKS :].double() for each in pair] for pair in pairs]
    change, whole = (sum(float(value) for value in values) for values in zip(
        *(((two - one).square().sum(), one.square().sum()) for one, two in rows), strict=True
    ))  # fmt: skip
    assert errors[Head(0, 1)] == pytest.approx(math.sqrt(change / whole), rel=1e-4)


def test_a_choice_is_compared_as_it_is_carried_out() -> None:
    heads = [Head(0, 1), Head(2, 0), Head(2, 1)]
    assert entry_of(heads, WINDOW, SINKS) == CASES["some heads"].entry
    program = captured("gqa")
    note_layers(program)
    found = METRICS["kl"](compare_streaming(program, batches(), heads, WINDOW, SINKS)).value
    total, count = 0.0, 0
    for batch in batches():
        for row, valid in zip(batch.tokens, batch.valid, strict=True):
            own = row[: int(valid.sum())]
            with torch.no_grad():
                full = model("gqa")(own[None]).logits[0, :-1]
            changed = reference("gqa", "some heads", own)[:-1]
            logs = (each.double().log_softmax(-1) for each in (changed, full))
            total += float(kl_div(*logs, log_target=True, reduction="sum"))
            count += len(full)
    assert found == pytest.approx(total / count, rel=1e-4)


def test_a_found_plan_is_proved_though_it_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    program = planted()
    entry = choose_streaming_heads(program, batches(), Budget(kl=0.0), **SETTINGS).entry
    monkeypatch.setattr("skipstone.certify.speedup", lambda *_: 0.8)

    def build(plan: Plan) -> Executable:
        rewritten, _ = rewrite(program.copy(), plan, target="eager")
        return Executable(lower(rewritten, "eager"), plan=plan, report=skipstone.Report("Llama", "eager"))

    proved = token_batches([tokens(4, 300, seed=3)], program.source)
    opt = within(build, [Plan([entry])], Budget(kl=1e-9), proved)
    assert opt.plan.entries == (entry,)
    assert [each.holds for each in opt.plan.certificates] == [True]
    # Four heads of six keep all, the others 12 tokens and the room of a step.
    kept = (4 * 300 + 2 * (WINDOW + SINKS + 128)) / (6 * 300)
    assert opt.report.budget[-1] == f"keys and values of 300 tokens take {kept:.1%} of the model's bytes"
    assert within(build, [Plan([entry])], Budget(kl=1e-9), batches()).plan.entries == ()  # there it saves nothing


REFUSALS = {
    "short": (Budget(kl=1.0), {"window": 40}, InvalidInput, "the longest sequence has 40 tokens, of which heads .* 44"),
    "no limit": (Budget(evaluate=len, max_drop=1.0), SETTINGS, InvalidInput, "a budget without a limit on predictions"),
    "window": (Budget(kl=1.0), {"window": 0}, InvalidPlan, "window is 0"),
    "nothing fits": (
        Budget(kl=0.0), SETTINGS, Unsupported, "a head of LlamaForCausalLM that sees 9 tokens and the first 3, within",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    budget, settings, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        choose_streaming_heads(captured("gqa"), batches(), budget, **settings)


def test_a_model_whose_heads_all_have_windows() -> None:
    data = token_batches([models.tokens(2, 40)], models.program("mixtral").source)
    with pytest.raises(Unsupported, match="streaming heads in MixtralForCausalLM: no attention of a layer sees all"):
        choose_streaming_heads(models.program("mixtral").copy(), data, Budget(kl=1.0), **SETTINGS)


def test_the_model_is_left_as_it_was() -> None:
    with masked("gqa", "all"):
        pass  # the hooks of the reference are gone behind it
    before = {name: tensor.clone() for name, tensor in model("gqa").state_dict().items()}
    plan = find_compress_kv(model("gqa"), list(tokens(6, 40).split(1)), Budget(kl=100.0), **SETTINGS)
    assert len(plan) == 1 and plan.model == captured("gqa").source.fingerprint
    assert all(torch.equal(before[name], tensor) for name, tensor in model("gqa").state_dict().items())
