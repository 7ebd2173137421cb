"""Reports of layers in parallel: against the models' own modules under hooks, and where the answer is known."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaForCausalLM

from skipstone import Budget, FuseParallel, LayerParallel, Segment, find_layer_parallel, segments
from skipstone.budget import hold_out
from skipstone.calibrate import Batch, token_batches
from skipstone.errors import InvalidInput, InvalidPlan, Unsupported, UserError
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.device import DeviceProfile
from skipstone.ir.program import Program
from skipstone.segments import (
    KINDS,
    WORTHWHILE,
    SegmentReport,
    choose_segment,
    compare_on,
    compare_segments,
    measure_segments,
    middle_segments,
)
from tests import models
from tests.newton_oracles import at_once, captured, hugging_face, stack

pytestmark = pytest.mark.usefixtures("one_thread")

LAUNCHES = DeviceProfile(bandwidth=float("inf"), flops_per_second=float("inf"), launch_gap=1e-3)
"""A device on which a step takes a millisecond for every launch, and nothing else."""
BYTES = DeviceProfile(bandwidth=1e3, flops_per_second=float("inf"), launch_gap=0.0)
"""One on which it takes a millisecond for every byte."""

LENGTH, COUNTS = 20, (20, 13)


def padded(source: Program) -> list[Batch]:
    """Three batches, the second of sequences of different lengths."""
    mask = (torch.arange(LENGTH) < torch.tensor(COUNTS).unsqueeze(1)).long()
    whole = [models.tokens(1, 11, seed=1), models.tokens(3, LENGTH, seed=3)]
    return token_batches(
        [whole[0], {"input_ids": models.tokens(2, LENGTH, seed=2), "attention_mask": mask}, whole[1]], source.source
    )


def rows(batches: list[Batch]) -> list[Tensor]:
    return [row[valid] for batch in batches for row, valid in zip(batch.tokens, batch.valid, strict=True)]


@torch.no_grad()
def logits_and_state(ids: Tensor, layer: int, *parallel: Segment) -> tuple[Tensor, Tensor]:
    """Logits [S, V] of one sequence, and the state [S, hidden] behind a layer."""
    model, states = hugging_face("llama"), []
    with at_once(model, parallel):
        handle = stack(model)[layer].register_forward_hook(lambda _, args, out: states.append(out))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        handle.remove()
    (state,) = states
    return logits, (state[0] if isinstance(state, tuple) else state)[0]


def up_to(segment: Segment, layer: int) -> Segment:
    """The layers of a segment up to one: the states behind them do not depend on later layers."""
    return replace(segment, stop=layer + 1, iterations=min(segment.iterations, layer + 1 - segment.start))


SEGMENTS = (
    Segment(0, 3), Segment(0, 3, 2), Segment(1, 3, surrogate="zero"), Segment(1, 3, unit="sublayer"),
    Segment(0, 3, unit="two_stage"),
)  # fmt: skip


@pytest.mark.parametrize("segment", SEGMENTS, ids=str)
def test_figures_are_those_of_the_models_own_modules(segment: Segment) -> None:
    """Divergence, likelihood, agreement and states, sequence by sequence without padding, in float64."""
    program = captured("llama")
    batches = padded(program)
    errors, seen = measure_segments(program, batches, [segment])[segment]
    kl, nll, rise, same, counted = 0.0, 0.0, 0.0, 0, 0
    for ids in rows(batches):
        exact, changed = (logits_and_state(ids, 0, *each)[0][:-1] for each in ((), (segment,)))
        kl += kl_div(changed.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="sum").item()
        before, after = (cross_entropy(each, ids[1:], reduction="sum").item() for each in (exact, changed))
        nll, rise = nll + before, rise + after - before
        same += int((exact.argmax(-1) == changed.argmax(-1)).sum())
        counted += len(ids) - 1
    assert int(seen.tokens.sum()) == counted and len(seen.tokens) == 6
    assert float(seen.kl.sum()) == pytest.approx(kl, rel=1e-9) and kl > 1e-3
    assert float(seen.nll.sum()) == pytest.approx(nll, rel=1e-9)
    assert float(seen.increase.sum()) == pytest.approx(rise, rel=1e-9)
    assert float(seen.agreement.sum()) == same
    known = [segment.stop - 1] if segment.unit == "two_stage" else [*range(segment.start, segment.stop)]
    assert list(errors) == known
    for layer in known:
        total, tokens = 0.0, 0
        for ids in rows(batches):
            _, exact = logits_and_state(ids, layer)
            _, changed = logits_and_state(ids, layer, up_to(segment, layer))
            total += float(((changed - exact).norm(dim=-1) / exact.norm(dim=-1)).sum())
            tokens += len(ids)
        assert errors[layer] == pytest.approx(total / tokens, rel=1e-9, abs=1e-12)


def test_states_of_as_many_layers_as_iterations_are_exact() -> None:
    program = models.program("deep")
    tried = [Segment(1, 6, iterations) for iterations in range(1, 6)]
    found = measure_segments(program, padded(program), tried)
    for segment in tried:
        errors, seen = found[segment]
        assert [errors[layer] == 0 for layer in range(1, 6)] == [layer <= segment.iterations for layer in range(1, 6)]
        assert (float(seen.kl.sum()) == 0) == (segment.iterations == 5)


# A model whose branches are constants


@pytest.fixture(scope="module")
def constant() -> LlamaForCausalLM:
    config = copy.deepcopy(models.model("deep").config)
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.normal_(last.bias)
    return model


@pytest.fixture(scope="module")
def constant_program(constant: LlamaForCausalLM) -> Program:
    return capture_huggingface(constant)


def test_constant_branches_are_exact_in_every_segment(constant_program: Program) -> None:
    tried = middle_segments(6)
    assert {(each.unit, each.iterations) for each in tried} == {*KINDS} - {("layer", 4)}
    for errors, seen in measure_segments(constant_program, padded(constant_program), tried).values():
        assert max(errors.values()) < 1e-6
        assert float(seen.kl.sum()) < 1e-9 and torch.equal(seen.agreement, seen.tokens)


# What steps cost


@pytest.fixture(scope="module")
def report() -> SegmentReport:
    program = models.program("deep")
    tried = [Segment(1, 5), Segment(1, 5, 2), Segment(1, 5, unit="two_stage"), Segment(2, 4, 2)]
    return compare_on(program, padded(program), tried, LAUNCHES)


def test_costs_are_those_of_the_fused_program(report: SegmentReport) -> None:
    """A layer of this model is five products and attentions in a row, and there is the head."""
    assert report.sequential.critical_path == 6 * 5 + 1
    assert report.context == LENGTH
    once, twice, stages, exact = report.figures
    assert [each.step.evaluations for each in report.figures] == [4, 6, 8, 2]
    assert once.step.critical_path == stages.step.critical_path == 3 * 5 + 1
    # Every correction of states that layers read is one more product.
    assert twice.step.critical_path == 4 * 5 + 1 + 1
    assert replace(exact.step, evaluations=0) == report.sequential and exact.gain == 1
    for each in report.figures:
        assert each.step.milliseconds == pytest.approx(each.step.launches)
        assert each.gain == pytest.approx(report.sequential.launches / each.step.launches)
    # Fused, all layers of the segment take hardly more than one.
    assert once.step.launches < 0.65 * report.sequential.launches


def test_iterations_read_their_weights_again() -> None:
    program = models.program("deep")
    batches = [Batch(models.tokens(2, 3, seed=0), torch.ones(2, 3, dtype=torch.bool))]
    tried = [Segment(1, 5), Segment(1, 5, 2), Segment(1, 5, 3)]
    own, found, _ = segments.step_costs(program, batches, tried, BYTES, progress=False)
    first, second, third = (found[each].milliseconds for each in tried)
    layer = sum(value.nbytes for name, value in program.tensors().items() if "layers.2." in name)
    assert first < 1.02 * own.milliseconds
    # 4 evaluations of layers, 6 and 6; the corrections and what is stacked for them come on top.
    assert 2 * layer <= second - first < 3 * layer
    assert 2 * layer <= third - first < 3.5 * layer


def test_a_report_is_a_table(report: SegmentReport) -> None:
    text = str(report)
    assert "6 sequences" in text and "98 predictions" in text and "behind 20 tokens" in text
    assert "…" not in text
    lines = [line.split() for line in text.splitlines() if line.strip().startswith(("1-4", "2-3"))]
    assert [line[:3] for line in lines] == [
        ["1-4", "layer", "1"], ["1-4", "layer", "2"], ["1-4", "two_stage", "1"], ["2-3", "layer", "2"]
    ]  # fmt: skip
    assert lines[3][3:] == [
        "+0.00%",
        "0",
        "100.0%",
        "0",
        "2",
        "31",
        str(report.sequential.launches),
        lines[3][10],
        "1.00",
    ]


def test_what_cannot_run_is_in_the_report() -> None:
    program = models.program("gpt_neox")
    data = token_batches([models.tokens(2, 9, seed=0)], program.source)
    stages = Segment(1, 3, unit="two_stage")
    found = compare_on(program, data, [Segment(1, 3), stages], LAUNCHES)
    assert [each.segment for each in found.figures] == [Segment(1, 3)]
    assert list(found.refused) == [stages] and "not attention, then FFN" in str(found)
    with pytest.raises(Unsupported, match="not attention, then FFN"):
        compare_on(program, data, [stages], LAUNCHES)


def test_what_does_not_fit_is_refused() -> None:
    program = models.program("deep")
    data = padded(program)
    with pytest.raises(InvalidPlan, match="layers 0 to 5"):
        compare_on(program, data, [Segment(4, 7)], LAUNCHES)
    with pytest.raises(InvalidInput, match="no segment"):
        compare_on(program, data, [], LAUNCHES)
    with pytest.raises(InvalidInput, match="limit on predictions"):
        choose_segment(program, data, Budget(evaluate=lambda _: 0.0, max_drop=1.0), [Segment(1, 5)], LAUNCHES)


@given(st.integers(2, 200))
def test_default_segments_stand_in_the_middle(layers: int) -> None:
    found = middle_segments(layers)
    assert found and len(set(found)) == len(found)
    sizes = [each.stop - each.start for each in found]
    assert sizes == sorted(sizes)
    for each in found:
        each.validate()
        assert 0 <= layers - each.stop - each.start <= 1
        assert each.iterations < each.stop - each.start


# Choosing


@pytest.mark.slow
def test_the_segment_that_saves_most_within_the_budget_is_chosen(report: SegmentReport) -> None:
    program = models.program("deep")
    data, tried = padded(program), [each.segment for each in report.figures]
    gains = {each.segment: each.gain for each in report.figures}
    bounds = {each.segment: each.seen.certificate("kl", 0, 0.95, "", "").bound for each in report.figures}
    # The figure keeps these limits, its bound does not.
    between = [(bounds[each.segment] + each.kl) / 2 for each in report.figures]
    for limit in (*bounds.values(), *between):
        keep = [each for each in tried if bounds[each] <= limit and gains[each] >= WORTHWHILE]
        if keep:
            chosen = choose_segment(program, data, Budget(kl=limit), tried, LAUNCHES)
            assert chosen == max(keep, key=gains.__getitem__)
    assert len({bounds[each] for each in tried}) == len(tried)


def test_no_segment_is_chosen_where_none_is_worth_its_loss() -> None:
    program = models.program("deep")
    data = padded(program)
    with pytest.raises(Unsupported, match=r"of 1 segment, 1 are predicted"):
        choose_segment(program, data, Budget(kl=1e-6), [Segment(1, 5)], LAUNCHES)
    with pytest.raises(Unsupported, match=r"of 1 segment, 0 are predicted .* the fastest 1.00 times"):  # exact, no gain
        choose_segment(program, data, Budget(kl=1e-6), [Segment(2, 4, 2)], LAUNCHES)


def test_a_plan_is_chosen_on_data_that_is_not_held_out(
    constant: LlamaForCausalLM, constant_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipstone.find.capture", lambda model, example: constant_program)
    read: list[Batch] = []

    def note(program: Program, batches: list[Batch], *rest: object) -> object:
        read.extend(batches)
        return measure_segments(program, batches, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("skipstone.segments.measure_segments", note)
    ids = models.tokens(10, 12, seed=4)
    settings = {"segments": [Segment(2, 4), Segment(1, 5)], "profile": LAUNCHES}
    plan = find_layer_parallel(constant, [ids], Budget(nll=0.01), **settings)
    assert plan.entries == (LayerParallel((Segment(1, 5),)), FuseParallel())
    assert plan.model == constant_program.source.fingerprint
    held = hold_out(token_batches([ids], constant_program.source))[1]
    assert sum(len(each.tokens) for each in read) == 6
    assert not {tuple(row.tolist()) for row in rows(read)} & {tuple(row.tolist()) for row in rows(held)}
    with pytest.raises(UserError, match="budget is float"):
        find_layer_parallel(constant, [ids], 0.01, **settings)  # type: ignore[arg-type]
    read.clear()
    find_layer_parallel(constant, [ids], Budget(nll=0.01, validation=[models.tokens(4, 12, seed=5)]), **settings)
    assert sum(len(each.tokens) for each in read) == 10


def test_models_are_compared_as_programs_are(
    constant: LlamaForCausalLM, constant_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipstone.segments.capture", lambda model, example: constant_program)
    ids = models.tokens(3, 12, seed=4)
    found = compare_segments(constant, ids, [Segment(1, 5)], profile=LAUNCHES, progress=False)
    (figures,) = found.figures
    assert figures.nll == pytest.approx(0, abs=1e-6) and figures.kl == pytest.approx(0, abs=1e-9)
    assert figures.top1 == 1 and figures.gain > 1.4
