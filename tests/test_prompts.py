"""Kinds of prompts: planted ones are told apart, and each gets what it can go without, with a proof of its own."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import skipstone
from skipstone import Budget, Plan, SkipByPrompt, SkipSublayers, find_skip_by_prompt, optimize
from skipstone.budget import compare
from skipstone.calibrate import Batch
from skipstone.certify import by_set, certify, chosen_sets, logits, prompt_lengths, speedup
from skipstone.errors import InvalidInput, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.program import Program
from skipstone.passes.skip_by_prompt import CENTROIDS
from skipstone.prompts import cluster, prompt_profiles, skip_by_prompt
from skipstone.rewrite import rewrite
from skipstone.runtime.by_prompt import PromptSession
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from skipstone.units import Space, Unit
from tests import models

FFNS = Space(kinds=("ffn",), protected=())
ALIKE = {Unit("ffn", layer): 1.0 for layer in range(3)}
HALF = 16
FIRST, SECOND = SkipSublayers(ffn=(0, 1)), SkipSublayers(ffn=(0, 2))
"""What the two kinds of prompts can go without."""


@cache
def model() -> Any:
    """A Llama for two kinds of text: token ids below 30 live in one half of the stream, the others in the other.

    Attention adds nothing. FFN 0 does nothing, FFN 1 reads and writes the second half, FFN 2 the first.
    """
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**models._SIZES)).eval()
    with torch.no_grad():
        made.model.embed_tokens.weight[:30, HALF:] = 0
        made.model.embed_tokens.weight[30:, :HALF] = 0
        for number, layer in enumerate(made.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            blind = {0: slice(None), 1: slice(HALF), 2: slice(HALF, None)}[number]
            layer.mlp.gate_proj.weight[:, blind] = 0
            layer.mlp.down_proj.weight[blind] = 0
    return made


@cache
def program() -> Program:
    return capture_huggingface(model())


def texts(kind: int, count: int, seed: int) -> Tensor:
    low, high = ((3, 30), (30, models.VOCABULARY))[kind]
    return torch.randint(low, high, (count, 12), generator=torch.Generator().manual_seed(seed))


def batches(seed: int = 0, kinds: tuple[int, ...] = (0, 1)) -> list[Batch]:
    """Six sequences of each kind, mixed, in batches of four."""
    rows = torch.stack([texts(kind, 6, seed + kind) for kind in kinds], dim=1).flatten(0, 1)
    return [Batch(each, torch.ones_like(each, dtype=torch.bool)) for each in rows.split(4)]


@cache
def build(plan: Plan) -> Any:
    """The executable of a plan, made once. Tests must not change it."""
    rewritten, _ = rewrite(program(), plan, target="eager")
    session: Any = EagerSession(rewritten)
    if rewritten.continuations:
        session = PromptSession(session, [EagerSession(part) for part in rewritten.continuations])
    return Executable(session, plan=plan, report=skipstone.Report("Llama", "eager"))


def search(data: list[Batch], sets: int = 2, space: Space = FFNS) -> Plan:
    return skip_by_prompt(program(), data, sets=sets, space=space, limit=0.0, milliseconds=ALIKE)


@cache
def found() -> Plan:
    return search(batches())


def test_planted_kinds_are_found_with_what_they_can_go_without() -> None:
    (entry,) = found()
    assert isinstance(entry, SkipByPrompt)
    assert set(entry.sets) == {FIRST, SECOND}
    opt = build(found())
    for kind, wanted in ((0, FIRST), (1, SECOND)):
        for batch in batches(seed=40, kinds=(kind,)):
            assert {entry.sets[number] for number in chosen_sets(opt, batch).tolist()} == {wanted}


def test_more_sets_than_kinds_are_merged() -> None:
    plan = search(batches(), sets=4)
    (entry,) = plan
    assert isinstance(entry, SkipByPrompt)
    assert set(entry.sets) == {FIRST, SECOND}
    assert plan.tensors[CENTROIDS].shape == (2, 6)


def test_one_kind_of_prompts_needs_no_choice() -> None:
    plan = search(batches(kinds=(1,)))
    assert plan.entries == (SkipByPrompt((SECOND,)),)
    assert not plan.tensors


def test_the_plan_is_for_this_model() -> None:
    assert found().model == program().source.fingerprint


def test_every_set_has_its_own_certificate() -> None:
    certificates = certify(build(Plan()), build(found()), Budget(kl=0.0, nll=0.0), batches(seed=20))
    assert [(each.metric, each.part) for each in certificates] == [
        (metric, part) for metric in ("nll", "kl") for part in ("", "set 0", "set 1")
    ]
    assert all(each.holds and each.value == 0 for each in certificates)
    assert [each.sequences for each in certificates] == [12, 6, 6] * 2
    assert [each.confidence for each in certificates[:3]] == [pytest.approx(each) for each in (0.95, 0.975, 0.975)]
    assert str(certificates[1]).startswith("set 0, nll: 0, at 97.5% confidence")


def test_what_a_set_costs_is_seen_in_its_own_certificate() -> None:
    """With a set that harms the second kind, the first one's certificate still reads zero."""
    (entry,) = found()
    assert isinstance(entry, SkipByPrompt)
    harmful = tuple(SkipSublayers(ffn=(1,)) if each == SECOND else each for each in entry.sets)
    plan = Plan([SkipByPrompt(harmful)], tensors=found().tensors)
    parts = {each.part: each for each in certify(build(Plan()), build(plan), Budget(kl=1e-6), batches(seed=20))}
    good, bad = f"set {entry.sets.index(FIRST)}", f"set {entry.sets.index(SECOND)}"
    assert parts[good].value == 0
    assert parts[bad].value > 1e-4
    assert [parts[part].holds for part in (good, bad, "")] == [True, False, False]
    assert parts[""].value == pytest.approx(parts[bad].value / 2)


@pytest.mark.parametrize("budget", [Budget(kl=0.1), Budget(top1=0.5)])
@pytest.mark.parametrize("seen", [0, 1])
def test_a_set_that_too_few_prompts_choose_is_not_proved(budget: Budget, seen: int) -> None:
    only = batches(seed=20, kinds=(0,))
    if seen:
        other = texts(1, 1, 9)
        only.append(Batch(other, torch.ones_like(other, dtype=torch.bool)))
    certificates = certify(build(Plan()), build(found()), budget, only)
    unproved = f"set {found().entries[0].sets.index(SECOND)}"  # type: ignore[attr-defined]
    assert {each.part for each in certificates if not each.holds} == {unproved}
    assert {each.sequences for each in certificates if each.part == unproved} == {seen}


def test_a_set_that_skips_nothing_needs_no_proof() -> None:
    (entry,) = found()
    assert isinstance(entry, SkipByPrompt)
    sets = tuple(SkipSublayers() if each == SECOND else each for each in entry.sets)
    opt = build(Plan([SkipByPrompt(sets)], tensors=found().tensors))
    certificates = certify(build(Plan()), opt, Budget(kl=0.0), batches(seed=20, kinds=(0,)))
    assert all(each.holds for each in certificates)


def test_logits_are_those_of_decoding_step_by_step() -> None:
    (entry,) = found()
    assert isinstance(entry, SkipByPrompt)
    harmful = tuple(SkipSublayers(ffn=(2 if each == FIRST else 1,)) for each in entry.sets)
    opt = build(Plan([SkipByPrompt(harmful)], tensors=found().tensors))
    ids = torch.cat([texts(0, 2, 5), texts(1, 2, 6)])
    valid = torch.arange(12) < torch.tensor([12, 7, 10, 1]).unsqueeze(1)
    batch = Batch(ids, valid)
    prompts = prompt_lengths(batch).tolist()
    assert prompts == [6, 4, 5, 1]
    given = logits(opt, batch)
    for row, (prompt, length) in enumerate(zip(prompts, valid.sum(1).tolist(), strict=True)):
        first, kept = opt.prefill(ids[[row], :prompt])
        torch.testing.assert_close(given[row, prompt - 1], first[0], rtol=0, atol=1e-4)
        for at in range(prompt, length):
            torch.testing.assert_close(given[row, at], opt.decode(ids[[row], at], kept)[0], rtol=0, atol=1e-4)
    cost = compare(lambda each: logits(build(Plan()), each), lambda each: logits(opt, each), [batch])
    assert float(cost.kl.sum()) > 1e-3


def test_sequences_are_told_apart_by_their_sets() -> None:
    opt = build(found())
    apart = by_set(opt, batches(seed=20))
    assert list(apart) == ["set 0", "set 1"]
    kinds = [{int(each.tokens.min() >= 30) for each in own} for own in apart.values()]
    assert sorted(kinds, key=min) == [{0}, {1}]
    assert sum(len(each.tokens) for own in apart.values() for each in own) == 12


def test_speed_is_measured_over_all_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    opt, seen = build(found()), []

    def timed(systems: Any, prompt: Tensor, *_: Any) -> Any:
        kind = int(prompt.min() >= 30)
        seen.append(kind)
        made = {"full": 10.0, "changed": (5.0, 8.0)[kind]}
        return {name: skipstone.report.Timing(0.0, made[name], 1, 1, 1) for name in systems}

    monkeypatch.setattr("skipstone.certify.measure", timed)
    assert speedup(build(Plan()), opt, batches(seed=20)) == pytest.approx(20 / 13)
    assert sorted(seen) == [0, 1]


def test_optimize_proves_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipstone.certify.speedup", lambda *_: 1.5)
    for place in ("find", "optimize"):
        monkeypatch.setattr(import_module(f"skipstone.{place}"), "capture", lambda *_: program().copy())
    calibration = [each.tokens for each in batches()]
    plan = find_skip_by_prompt(model(), calibration, sets=2, space=FFNS, limit=0.0, milliseconds=ALIKE)
    assert plan == found()
    budget = Budget(kl=1e-9, validation=[each.tokens for each in batches(seed=20)])
    opt = optimize(model(), plan, target="eager", calibration=calibration, budget=budget, progress=False)
    assert opt.plan.entries == plan.entries
    assert [each.part for each in opt.plan.certificates] == ["", "set 0", "set 1"]
    assert Plan.from_json(opt.plan.to_json(), tensors=opt.plan._tensor_bytes()).certificates == opt.plan.certificates


def test_nothing_to_leave_out_is_said() -> None:
    with pytest.raises(Unsupported, match="no prompts can go without a sublayer"):
        search(batches(kinds=(0,)), space=Space(kinds=("ffn",), protected=(0, 1)))


@pytest.mark.parametrize(("sets", "message"), [(0, "expected at least 1"), (13, "12 prompts for 13 sets")])
def test_numbers_of_sets_that_cannot_be(sets: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        search(batches(), sets)


def test_profiles_are_over_the_prompt_alone() -> None:
    profiles = prompt_profiles(program(), batches())
    assert profiles.shape == (12, 6)
    assert bool((profiles[:, ::2] == 0).all())  # attentions
    zeros = profiles[:, 1::2] == 0
    assert zeros[::2].tolist() == [[True, True, False]] * 6
    assert zeros[1::2].tolist() == [[True, False, True]] * 6
    changed = [Batch(torch.cat([each.tokens[:, :6], each.tokens[:, 6:].flip(1)], 1), each.valid) for each in batches()]
    torch.testing.assert_close(prompt_profiles(program(), changed), profiles, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------------------------------------- k-means


@given(st.integers(1, 4), st.integers(0, 1000))
def test_planted_clusters_are_found(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.eye(4, dtype=torch.float64)[:count]
    truth = torch.arange(20) % count
    points = centres[truth] + 0.1 * torch.randn(20, 4, generator=generator, dtype=torch.float64)
    clusters = cluster(points, count, seed)
    assert len(clusters.centroids) == count
    same = clusters.labels.unsqueeze(0) == clusters.labels.unsqueeze(1)
    assert torch.equal(same, truth.unsqueeze(0) == truth.unsqueeze(1))


@given(st.integers(1, 5), st.integers(0, 1000))
def test_clusters_are_a_fixed_point(count: int, seed: int) -> None:
    points = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    clusters = cluster(points, count, seed)
    assert torch.equal(torch.cdist(points, clusters.centroids).argmin(1), clusters.labels)
    for number, centroid in enumerate(clusters.centroids):
        torch.testing.assert_close(points[clusters.labels == number].mean(0), centroid)
    again = cluster(points, count, seed)
    assert torch.equal(again.centroids, clusters.centroids)


def test_equal_profiles_are_one_cluster() -> None:
    assert len(cluster(torch.ones(5, 3, dtype=torch.float64), 3).centroids) == 1
