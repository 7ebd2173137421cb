"""Choosing what to leave out: the algorithm on made-up objectives, the whole on models with planted redundancy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from benchmarks.reference.evaluate import CHECKPOINT, windows
from skipstone.baselines import at_random, contiguous, greedy, one_shot
from skipstone.calibrate import Batch, program_inputs, token_batches
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.device import DeviceProfile
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program
from skipstone.ir.similarity import Moments, Similarity
from skipstone.ir.stream import find_stream
from skipstone.objective import make_objective
from skipstone.passes.base import run_pass
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.search import ModelTask, Selection, Step, Stop, lazy_greedy, repair, search, shortlist
from skipstone.similarity import measure_similarity
from skipstone.units import Space, Unit, entry_of, unit_milliseconds
from tests import models

ALL = Space(protected=())
ALL_LAYERS = Space(kinds=("layer",), protected=())
FAST = DeviceProfile(bandwidth=1e9, flops_per_second=1e30, launch_gap=0.0)


# ------------------------------------------------------------------------------------------- made-up objectives


class Table:
    """A task whose objective is a function of the set; it keeps what was measured."""

    def __init__(
        self, objective: Callable[[frozenset[Unit]], float], milliseconds: Mapping[Unit, float], gap: int = 0
    ) -> None:
        self.objective, self.milliseconds, self.space = objective, milliseconds, Space(minimum_gap=gap)
        self.measured: list[frozenset[Unit]] = []

    def measure(self, chosen: Collection[Unit]) -> float:
        self.measured.append(frozenset(chosen))
        return self.objective(frozenset(chosen))

    def settle(self, chosen: Collection[Unit]) -> None:
        pass

    def allows(self, chosen: Collection[Unit], unit: Unit) -> bool:
        return self.space.allows(chosen, unit)


def attentions(count: int) -> list[Unit]:
    return [Unit("attention", layer) for layer in range(count)]


A, B, C = attentions(3)


def table(costs: Mapping[str, float], **options: Any) -> Table:
    """A task over A, B and C from the objectives of sets like "AB"."""
    names = {A: "A", B: "B", C: "C"}
    milliseconds = options.pop("milliseconds", dict.fromkeys(names, 1.0))
    return Table(lambda units: costs["".join(sorted(names[u] for u in units))], milliseconds, **options)


def plain_greedy(task: Table, count: int) -> list[Unit]:
    """Every unit that is left is measured in every step."""
    chosen: list[Unit] = []
    for _ in range(count):
        now = task.measure(chosen)
        left = [unit for unit in task.milliseconds if unit not in chosen]
        chosen.append(min(left, key=lambda u: (task.measure([*chosen, u]) - now) / task.milliseconds[u]))
    return chosen


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_lazy_is_plain_greedy_where_rises_only_grow(seed: int, count: int) -> None:
    """Costs of single units, and of pairs on top: a supermodular objective."""
    generator = torch.Generator().manual_seed(seed)
    single, pairs = torch.rand(7, generator=generator), torch.rand(7, 7, generator=generator)
    units = attentions(7)

    def objective(chosen: frozenset[Unit]) -> float:
        layers = sorted(unit.layer for unit in chosen)
        alone = sum(float(single[i]) for i in layers)
        return alone + sum(float(pairs[i, j]) for i, j in itertools.combinations(layers, 2))

    times = {unit: 1 + float(x) for unit, x in zip(units, torch.rand(7, generator=generator), strict=True)}
    lazy, plain = Table(objective, times), Table(objective, times)
    steps, _ = lazy_greedy(units, lazy, Stop(count))
    assert [step.unit for step in steps] == plain_greedy(plain, count)
    assert [step.objective for step in steps] == [objective(frozenset(units)) for units in prefixes(steps)]
    assert len(lazy.measured) <= len(plain.measured)


def prefixes(steps: Collection[Step]) -> list[list[Unit]]:
    units = [step.unit for step in steps]
    return [units[:length] for length in range(1, len(units) + 1)]


def test_an_additive_objective_is_measured_once_a_unit_and_once_a_further_step() -> None:
    units = attentions(9)
    task = Table(lambda chosen: float(sum(unit.layer for unit in chosen)), dict.fromkeys(units, 1.0))
    steps, rest = lazy_greedy(units[::-1], task, Stop(count=4))
    assert [step.unit.layer for step in steps] == [0, 1, 2, 3]
    assert [unit.layer for unit in rest] == [4, 5, 6, 7, 8]
    assert len(task.measured) == 9 + 3


def test_an_outdated_value_is_measured_again_before_it_is_trusted() -> None:
    """B looks better than C until A is gone."""
    task = table({"A": 1, "B": 2, "C": 3, "AB": 9, "AC": 4.5, "BC": 5})
    steps, _ = lazy_greedy([A, B, C], task, Stop(count=2))
    assert [(step.unit, step.objective) for step in steps] == [(A, 1), (C, 4.5)]
    assert frozenset({A, B}) in task.measured


def test_a_rise_counts_by_the_time_that_it_saves() -> None:
    task = table({"A": 1, "B": 2, "C": 3}, milliseconds={A: 1.0, B: 3.0, C: 2.0})
    (step,) = lazy_greedy([A, B, C], task, Stop(count=1))[0]
    assert (step.unit, step.milliseconds) == (B, 3.0)


COSTS = {"A": 1, "B": 2, "C": 3, "AB": 10, "AC": 11, "BC": 4, "ABC": 20}


def test_repair_replaces_a_unit_that_greedy_should_not_have_taken() -> None:
    task = table(COSTS)
    steps, rest = lazy_greedy([A, B, C], task, Stop(count=2))
    assert [(step.unit, step.objective) for step in steps] == [(A, 1), (B, 10)]
    assert repair(steps, rest, task) == [Step(C, 3, 1.0), Step(B, 4, 2.0)]  # the prefix {C} is measured anew


def test_repair_neither_saves_less_time_nor_breaks_the_gap_nor_worsens() -> None:
    steps = [Step(A, 1, 1.0), Step(B, 10, 2.0)]
    assert repair(steps, [C], table(COSTS, milliseconds={A: 1.0, B: 1.0, C: 0.9})) == steps
    assert repair(steps, [C], table(COSTS, gap=2))[0] == Step(A, 1, 1.0)  # C is too close to B, but not to A
    assert repair(steps, [C], table(COSTS | {"BC": 10, "AC": 12})) == steps
    assert repair([], [C], table(COSTS)) == []


@pytest.mark.parametrize(
    ("stop", "chosen"),
    [
        (Stop(limit=0.5), ""),
        (Stop(limit=1), "A"),
        (Stop(limit=9), "A"),
        (Stop(limit=10), "AB"),
        (Stop(limit=100), "ABC"),
        (Stop(saving=1.0), "A"),
        (Stop(saving=1.1), "AB"),
        (Stop(count=3, limit=10, saving=9.0), "AB"),
    ],
)
def test_when_it_stops(stop: Stop, chosen: str) -> None:
    steps, rest = lazy_greedy([A, B, C], table(COSTS), stop)
    assert "".join("ABC"[step.unit.layer] for step in steps) == chosen
    assert len(rest) == 3 - len(chosen)


def test_a_set_without_a_finite_objective_is_never_chosen() -> None:
    costs = {"A": math.inf, "B": 1, "C": 2, "AB": math.inf, "BC": 3, "ABC": math.inf}
    steps, _ = lazy_greedy([A, B, C], table(costs), Stop(3))
    assert [step.unit for step in steps] == [B, C]


def test_units_that_are_too_close_do_not_go_together() -> None:
    task = Table(lambda chosen: float(sum(u.layer for u in chosen)), dict.fromkeys(attentions(6), 1.0), gap=2)
    assert [step.unit.layer for step in lazy_greedy(attentions(6), task, Stop(6))[0]] == [0, 2, 4]


# ------------------------------------------------------------------------------------------------------ on models


@cache
def batches(name: str) -> tuple[Batch, ...]:
    mask = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    padded = {"input_ids": models.tokens(2, 12, seed=1), "attention_mask": mask}
    return tuple(token_batches([models.tokens(1, 9), padded], models.program(name).source))


@cache
def times(name: str, space: Space = ALL) -> dict[Unit, float]:
    program = models.program(name)
    return unit_milliseconds(program, space.units(find_stream(program)), FAST)


def run(name: str, method: Callable[..., Selection] = search, **options: Any) -> Selection:
    space = options.setdefault("space", ALL)
    return method(
        options.pop("program", models.program(name)), batches(name), milliseconds=times(name, space), **options
    )


PROJECTIONS = {
    "llama": {"attention": "model.layers.{}.self_attn.o_proj", "ffn": "model.layers.{}.mlp.down_proj"},
    "gpt2": {"attention": "transformer.h.{}.attn.c_proj", "ffn": "transformer.h.{}.mlp.c_proj"},
    "gpt_neox": {"attention": "gpt_neox.layers.{}.attention.dense", "ffn": "gpt_neox.layers.{}.mlp.dense_4h_to_h"},
}


def planted(name: str, units: Collection[Unit]) -> Program:
    """The program with output projections of zero."""
    program = models.program(name).copy()
    for unit in units:
        owner = program.module.get_submodule(PROJECTIONS[name][unit.kind].format(unit.layer))
        for tensor in ("weight", "bias"):
            if hasattr(owner, tensor):
                setattr(owner, tensor, torch.nn.Parameter(torch.zeros_like(getattr(owner, tensor))))
    return program


@pytest.mark.parametrize("name", PROJECTIONS)
def test_planted_redundancy_is_found_exactly_and_first(name: str) -> None:
    useless = {Unit("attention", 1), Unit("ffn", 0), Unit("ffn", 2)}
    program = planted(name, useless)
    found = run(name, program=program, count=4)
    assert {step.unit for step in found.steps[:3]} == useless
    assert [step.objective for step in found.steps[:3]] == [0, 0, 0]
    assert found.steps[3].objective > 0
    assert {step.unit for step in run(name, program=program, limit=0.0).steps} == useless
    task = ModelTask(program, batches(name), ALL, "nll", times(name))
    task.start()
    assert task.measure(useless) == 0


def kl_of(program: Program, less: Program, name: str) -> float:
    total, count = 0.0, 0
    for batch in batches(name):
        full, other = (
            each.module(*program_inputs(each, batch))[0][batch.valid].double().log_softmax(-1)
            for each in (program, less)
        )
        total += float((full.exp() * (full - other)).sum())
        count += int(batch.valid.sum())
    return total / count


@pytest.mark.parametrize(("name", "space"), [("llama", ALL), ("gpt_neox", ALL), ("gpt2", ALL_LAYERS)])
@torch.no_grad()
def test_objectives_are_those_of_the_rewritten_program(name: str, space: Space) -> None:
    found = run(name, space=space, count=2)
    assert len(found.steps) == 2
    for count, step in enumerate(found.steps, 1):
        less = run_pass(found.entry(count), models.program(name))
        assert step.objective == pytest.approx(kl_of(models.program(name), less, name), rel=1e-4)
        assert step.milliseconds == pytest.approx(sum(times(name, space)[s.unit] for s in found.steps[:count]))
    assert found.entry(0) == entry_of([])
    assert found.entry() == found.entry(2)
    with pytest.raises(InvalidInput, match="has 2 steps"):
        found.entry(3)


def test_likelihood_and_metrics_count_valid_tokens_alone() -> None:
    """Garbage in the padding, in tokens and logits, changes nothing."""
    generator = torch.Generator().manual_seed(0)
    parts = batches("llama")
    logits = [torch.randn(*batch.tokens.shape, models.VOCABULARY, generator=generator) for batch in parts]
    less = [each + torch.randn(each.shape, generator=generator) for each in logits]

    def spoiled(each: Tensor, batch: Batch) -> Tensor:
        return each.masked_fill(~batch.valid.unsqueeze(-1), math.nan)

    def likelihood(each: list[Tensor]) -> float:
        picked = [
            (x.double().log_softmax(-1)[row, place - 1, batch.tokens[row, place]])
            for x, batch in zip(each, parts, strict=True)
            for row, place in batch.valid.nonzero().tolist()
            if place > 0
        ]
        return -float(torch.stack(picked).mean())

    def loudest(x: Tensor, batch: Batch) -> float:
        return float(x[batch.valid].amax(-1).mean())

    spoiled_less = [spoiled(*pair) for pair in zip(less, parts, strict=True)]
    spoiled_full = [spoiled(*pair) for pair in zip(logits, parts, strict=True)]
    found = make_objective("nll", parts, spoiled_full)(spoiled_less)
    assert found == pytest.approx(likelihood(less) - likelihood(logits), rel=1e-5)
    valid = torch.cat([x[batch.valid].amax(-1) for x, batch in zip(less, parts, strict=True)])
    before = torch.cat([x[batch.valid].amax(-1) for x, batch in zip(logits, parts, strict=True)])
    found = make_objective(loudest, parts, spoiled_full)(spoiled_less)
    assert found == pytest.approx(float(valid.mean() - before.mean()), rel=1e-4)
    assert math.isfinite(make_objective("kl", parts, spoiled_full)(spoiled_less))
    assert make_objective("kl", parts, logits)(logits) == 0
    assert make_objective("kl", parts, logits)([x * math.nan for x in logits]) == math.inf
    with pytest.raises(InvalidInput, match="NaN"):
        make_objective("kl", parts, [x * math.nan for x in logits])


def test_a_token_without_probability_adds_nothing() -> None:
    batch = Batch(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))
    full, other = torch.tensor([[[0.0, 0.0, -math.inf]]]), torch.tensor([[[0.0, math.log(3), -math.inf]]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert make_objective("kl", [batch], [full])([other]) == pytest.approx(expected)
    assert make_objective("kl", [batch], [full])([torch.tensor([[[0.0, -math.inf, 0.0]]])]) == math.inf


def test_a_metric_of_the_user_decides() -> None:
    """Wanted: small logits. The unit is found that lowers them most for its time."""
    name = "llama"

    def size(logits: Tensor, batch: Batch) -> float:
        return float(logits[batch.valid].square().mean())

    (step,) = run(name, objective=size, count=1).steps
    trials = {unit: run_pass(entry_of([unit]), models.program(name)) for unit in times(name)}

    def mean(program: Program) -> float:
        with torch.no_grad():
            sizes = [program.module(*program_inputs(program, b))[0][b.valid].square() for b in batches(name)]
        return float(torch.cat(sizes).mean())

    rises = {unit: mean(less) - mean(models.program(name)) for unit, less in trials.items()}
    best = min(rises, key=lambda unit: rises[unit] / times(name)[unit])
    assert step.unit == best
    assert step.objective == pytest.approx(rises[best], rel=1e-3)


def test_the_same_choice_every_time() -> None:
    assert run("llama", count=3) == run("llama", count=3)


def test_work_is_counted() -> None:
    """Six sublayers that follow each other, none of which may go: each is measured once, from itself on."""
    found = run("llama", limit=0.0)
    assert found.steps == ()
    assert found.evaluations == 6
    assert found.passes == pytest.approx(2 + sum(range(1, 7)) / 6)
    known = measure_similarity(models.program("llama"), batches("llama"))
    assert run("llama", limit=0.0, similarity=known).passes == pytest.approx(found.passes - 1)


def test_protected_layers_stay() -> None:
    assert {unit.layer for unit in Space().units(find_stream(models.program("llama")))} == {1}
    found = run("llama", space=Space(protected=(1,)), count=4)
    assert {step.unit.layer for step in found.steps} == {0, 2}


def test_kinds_and_gap() -> None:
    assert {step.unit.kind for step in run("llama", space=Space(kinds=("ffn",), protected=()), count=3).steps} == {
        "ffn"
    }
    found = run("llama", space=Space(protected=(), minimum_gap=2), count=6)
    assert sorted(step.unit.layer for step in found.steps) in ([0, 2], [1])
    layers = run("llama", space=ALL_LAYERS, count=3)
    assert len(layers.steps) == 2, "something of the model has to be left"


def test_the_shortlist_is_by_similarity_within_a_kind() -> None:
    """FFNs turn the stream ten times as far; the second attention and the first FFN are the odd ones out."""
    turned = torch.tensor([0.1, 2.0, 0.3, 1.0], dtype=torch.float64)
    similarity = replace(Similarity.empty(4, 2), sublayers=Moments.of(turned.unsqueeze(0)))
    units = {Unit(kind, layer): {2 * layer + (kind == "ffn")} for layer in (0, 1) for kind in ("attention", "ffn")}  # type: ignore[arg-type]
    order = [Unit("attention", 0), Unit("ffn", 1), Unit("ffn", 0), Unit("attention", 1)]
    assert shortlist(similarity, units, 4) == order
    assert shortlist(similarity, units, 2) == order[:2]


def test_a_bidirectional_post_norm_model_is_searched_under_its_own_padding() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=96, initializer_range=0.3,
    )  # fmt: skip
    program = capture_huggingface(BertForMaskedLM(config).eval())
    options: dict[str, Any] = {"space": ALL, "count": 2}
    units = ALL.units(find_stream(program))
    options["milliseconds"] = unit_milliseconds(program, units, FAST)
    longer = unit_milliseconds(program, units, FAST, context=1024)
    assert all(longer[unit] > time for unit, time in options["milliseconds"].items()), "a pass over the whole sequence"
    found = search(program, batches("llama"), **options)
    less = run_pass(found.entry(), program)
    with torch.no_grad():
        assert found.steps[-1].objective == pytest.approx(kl_of(program, less, "llama"), rel=1e-4)
    with pytest.raises(Unsupported, match="next tokens"):
        search(program, batches("llama"), objective="nll", **options)


# -------------------------------------------------------------------------------------------------------- times


def test_milliseconds_are_bytes_over_bandwidth_and_grow_with_the_context() -> None:
    program = models.program("llama")
    units = ALL.units(find_stream(program))
    short, long = (unit_milliseconds(program, units, FAST, context) for context in (0, 1000))
    keys_and_values = 2 * 2 * 8 * 4  # heads, width, bytes
    for unit in units:
        grows = 1000 * keys_and_values * 1e3 / 1e9 if unit.kind == "attention" else 0
        assert long[unit] - short[unit] == pytest.approx(grows, rel=1e-6, abs=1e-12)
    attention = 32 * (32 + 16 + 16 + 32) * 4 + 32 * 4
    ffn = 3 * 32 * 48 * 4 + 32 * 4
    assert 1e-6 * attention < short[Unit("attention", 1)] < 1.5e-6 * attention
    assert 1e-6 * ffn < short[Unit("ffn", 1)] < 1.5e-6 * ffn


# ------------------------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give count=, limit= or saving="),
        ({"count": 0}, "count is 0"),
        ({"count": 7}, "count is 7, but there are 6 units"),
        ({"limit": -0.1}, "limit is -0.1"),
        ({"limit": math.nan}, "limit is nan"),
        ({"saving": 0.0}, "saving is 0"),
        ({"count": 1, "objective": "ppl"}, "'kl', 'nll'"),
        ({"count": 1, "milliseconds": {}}, "milliseconds of attention 0 is None"),
        ({"count": 1, "milliseconds": {unit: 0.0 for unit in attentions(3)}}, "milliseconds of attention 0 is 0"),
        ({"count": 1, "space": Space(protected=(0, 3))}, "layers 0 to 2. The nearest is 2"),
        ({"count": 1, "space": Space(protected=(0, 1, 2))}, "Protect fewer"),
        ({"count": 1, "similarity": Similarity.empty(4, 2)}, "4 sublayers, the model has 6"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*args: Any) -> None:
        pytest.fail("the program was run")

    monkeypatch.setattr("skipstone.replay.Evaluator.compute", no_work)
    program = models.program("llama")
    with pytest.raises(InvalidInput, match=message):
        search(program, batches("llama"), **{"space": ALL, "milliseconds": times("llama"), **options})


@pytest.mark.parametrize("fields", [{"kinds": ("mlp",)}, {"kinds": "ffn"}, {"kinds": ()}, {"kinds": ("layer", "ffn")}])
def test_impossible_spaces_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="kinds"):
        Space(**fields)
    with pytest.raises(InvalidInput, match="minimum_gap is -1"):
        Space(minimum_gap=-1)


def test_programs_that_cannot_be_searched_are_refused() -> None:
    options: dict[str, Any] = {"space": ALL, "count": 1}
    with pytest.raises(Unsupported, match="KV cache"):
        search(run_pass(InsertKVCache(), models.program("llama")), batches("llama"), **options)
    with pytest.raises(Unsupported, match="has none"):
        search(models.program("bert"), batches("bert"), **options)
    with pytest.raises(InvalidInput, match="no token that counts"):
        search(models.program("llama"), [], **options)


# ----------------------------------------------------------------------------------------------------- baselines


def test_one_shot_takes_the_highest_cosines() -> None:
    known = measure_similarity(models.program("llama"), batches("llama"))
    found = run("llama", one_shot, space=ALL_LAYERS, count=2)
    assert [step.unit.layer for step in found.steps] == known.block_influence.argsort()[:2].tolist()
    assert (found.evaluations, found.passes) == (0, 1)
    sublayers = run("llama", one_shot, count=6)
    order = [2 * step.unit.layer + (step.unit.kind == "ffn") for step in sublayers.steps]
    assert order == known.cosine["mean"].argsort(descending=True)[: len(order)].tolist()
    assert len(order) == 5, "something of the model has to be left"
    apart = run("llama", one_shot, space=Space(kinds=("layer",), protected=(), minimum_gap=2), count=3)
    assert [step.unit.layer for step in apart.steps] in ([0, 2], [2, 0], [1])


def test_contiguous_takes_the_span_of_the_smallest_angle() -> None:
    known = measure_similarity(models.program("llama"), batches("llama")).angular_distance
    best = min(range(2), key=lambda start: float(known[start, start + 2]))
    found = run("llama", contiguous, space=ALL_LAYERS, count=2)
    assert [step.unit.layer for step in found.steps] == [best, best + 1]
    assert (found.evaluations, found.passes) == (0, 1)
    with pytest.raises(InvalidInput, match="no 2 adjacent layers"):
        run("llama", contiguous, space=Space(kinds=("layer",), protected=(1,)), count=2)
    with pytest.raises(InvalidInput, match="span of layers"):
        run("llama", contiguous, count=2)


def test_greedy_tries_every_unit_in_every_step() -> None:
    found = run("llama", greedy, count=3)
    assert (found.evaluations, found.passes) == (6 + 5 + 4, 6 + 5 + 4)
    task = ModelTask(models.program("llama"), batches("llama"), ALL, "nll", times("llama"))
    task.start()
    chosen: list[Unit] = []
    for step in found.steps:
        trials = {unit: task.measure([*chosen, unit]) for unit in task.units if unit not in chosen}
        assert step.unit == min(trials, key=trials.__getitem__)
        assert step.objective == trials[step.unit]
        chosen.append(step.unit)


def test_random_follows_the_seed() -> None:
    picks = [run("llama", at_random, count=3, seed=seed) for seed in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]
    assert picks[0].passes == 0


@pytest.mark.parametrize("method", [one_shot, contiguous, greedy])
@pytest.mark.parametrize(("count", "message"), [(0, "count is 0"), (4, "there are 3 units")])
def test_baselines_refuse_impossible_counts(method: Callable[..., Selection], count: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        run("llama", method, space=ALL_LAYERS, count=count)


# ------------------------------------------------------------------------------------------- how much work, how good


@pytest.mark.slow
def test_on_24_layers_a_third_of_the_passes_of_greedy_is_enough() -> None:
    """Random weights whose sublayers weigh differently; greedy measures every unit that is left in each step."""
    torch.manual_seed(0)
    config = models.model("llama").config.to_dict() | {"num_hidden_layers": 24, "layer_types": None}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_(float(torch.rand(())))
    program = capture_huggingface(model)
    found = {}
    for space in (Space(), Space(kinds=("layer",))):
        times = dict.fromkeys(space.units(find_stream(program)), 1.0)
        found[space] = search(program, batches("llama"), space=space, count=7, milliseconds=times)
        assert found[space].passes <= sum(len(times) - step for step in range(7)) / 3
    theirs = greedy(program, batches("llama"), 7, space=space, objective="kl", milliseconds=times)
    assert theirs.passes == sum(len(times) - step for step in range(7))
    assert found[space].steps[-1].objective <= 1.05 * theirs.steps[-1].objective


@pytest.mark.slow
def test_on_a_trained_model_the_choice_is_as_good_as_that_of_greedy() -> None:
    model = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    program = capture_huggingface(model)
    data = token_batches(list(windows("train", 8, 256)[:, :-1].split(8)), program.source)
    options: dict[str, Any] = {"milliseconds": unit_milliseconds(program, Space().units(find_stream(program)), FAST)}
    ours = search(program, data, objective="nll", count=6, **options)
    theirs = greedy(program, data, 6, **options)
    unguided = [at_random(program, data, 6, seed=seed, objective="nll", **options) for seed in range(3)]
    assert ours.passes <= 0.4 * theirs.passes
    assert ours.steps[-1].objective <= 1.05 * theirs.steps[-1].objective
    assert ours.steps[-1].objective < 0.5 * min(each.steps[-1].objective for each in unguided)
