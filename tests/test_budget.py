"""Budgets: figures, their bounds, and the data that they are proved on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from skipstone.budget import (
    Budget,
    Certificate,
    Comparison,
    check_data,
    compare,
    data_hash,
    hold_out,
    student_quantile,
)
from skipstone.calibrate import Batch, joined
from skipstone.errors import InvalidInput, InvalidPlan, UserError
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan


def batch(tokens: Any, counts: Any = None) -> Batch:
    """Token ids [B, S] of which the first ``counts`` are valid."""
    tokens = torch.tensor(tokens)
    counts = torch.full((len(tokens),), tokens.shape[1]) if counts is None else torch.tensor(counts)
    return Batch(tokens, torch.arange(tokens.shape[1]) < counts[:, None])


def random_batch(sequences: int, length: int = 12, vocabulary: int = 7) -> Batch:
    return batch(torch.randint(vocabulary, (sequences, length)).tolist())


# --------------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [(0.95, 1, 6.314), (0.95, 9, 1.833), (0.975, 30, 2.042), (0.99, 5, 3.365), (0.95, 100_000, 1.645), (0.5, 3, 0.0)],
)
def test_student_quantiles_are_those_of_the_tables(probability: float, degrees: int, expected: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(expected, abs=6e-4)


def test_figures_are_those_of_the_definitions() -> None:
    given = batch([[1, 2, 3, 0], [4, 5, 6, 1]], counts=[3, 4])
    exact, changed = torch.randn(2, 2, 4, 7, dtype=torch.float64)
    seen = Comparison.of(exact, changed, given)
    before, after = (torch.distributions.Categorical(logits=each) for each in (exact, changed))
    kl = torch.distributions.kl_divergence(before, after)
    assert seen.tokens.tolist() == [2, 3]
    torch.testing.assert_close(seen.kl, torch.stack([kl[0, :2].sum(), kl[1, :3].sum()]))
    nll = [-sum(before.log_prob(given.tokens[i, t + 1])[i, t] for t in range(n)) for i, n in ((0, 2), (1, 3))]
    new = [-sum(after.log_prob(given.tokens[i, t + 1])[i, t] for t in range(n)) for i, n in ((0, 2), (1, 3))]
    torch.testing.assert_close(seen.nll, torch.stack(nll))
    torch.testing.assert_close(seen.increase, torch.stack(new) - torch.stack(nll))
    same = exact.argmax(-1) == changed.argmax(-1)
    assert seen.agreement.tolist() == [int(same[0, :2].sum()), int(same[1, :3].sum())]


def test_padding_and_single_tokens_say_nothing() -> None:
    given = batch([[1, 2, 3], [4, 0, 0]], counts=[2, 1])
    exact = torch.randn(2, 3, 7)
    changed = exact.clone()
    changed[0, 1:] = torch.nan
    changed[1] = torch.nan
    seen = Comparison.of(exact, changed, given)
    assert seen.tokens.tolist() == [1]
    assert seen.kl.tolist() == [0] == seen.increase.tolist()


def test_tokens_that_are_ruled_out_cost_nothing() -> None:
    exact = torch.zeros(1, 2, 3)
    exact[..., 2] = -torch.inf
    assert Comparison.of(exact, exact, batch([[0, 1]])).kl.tolist() == [0]


def test_the_same_predictions_are_proved_to_cost_nothing() -> None:
    given, table = random_batch(6), torch.randn(7, 7)
    seen = compare(lambda each: table[each.tokens], lambda each: table[each.tokens], [given])
    for metric in ("nll", "kl"):
        found = seen.certificate(metric, 0.0, 0.95, "", "eager")
        assert (found.value, found.bound, found.holds) == (0, 0, True)
    found = seen.certificate("top1", 0.99, 0.95, "", "eager")
    assert found.value == 1
    assert found.bound == pytest.approx(1 - (1 - 0.05 ** (1 / 66)))  # no error in 66 trials: Clopper and Pearson
    assert not found.holds


def test_batches_may_be_cut_anywhere() -> None:
    whole = random_batch(5)
    before, after = torch.randn(2, 7, 7)
    parts = [Batch(whole.tokens[a:b], whole.valid[a:b]) for a, b in ((0, 1), (1, 5))]
    one, two = (compare(lambda x: before[x.tokens], lambda x: after[x.tokens], each) for each in ([whole], parts))
    for each in dataclasses.fields(Comparison):
        torch.testing.assert_close(getattr(one, each.name), getattr(two, each.name))


@pytest.mark.parametrize(("metric", "limit"), [("nll", 0.1), ("kl", 0.1), ("top1", 0.9)])
def test_bounds_hold_as_often_as_they_say(metric: str, limit: float) -> None:
    """Small samples from a population with long and short, easy and hard sequences, at 90%."""
    count, sample, draws = 20_000, 20, 2000
    tokens = torch.randint(5, 60, (count,)).double()
    hardness = torch.rand(count, dtype=torch.float64)
    population = Comparison(
        tokens,
        tokens * (1 + hardness),
        tokens * hardness.square() * 0.2,
        tokens * hardness * 0.1,
        tokens * (1 - hardness * 0.2),
    )
    truth = population.certificate(metric, limit, 0.9, "", "eager").value
    held = 0
    for _ in range(draws):
        rows = torch.randint(count, (sample,))
        drawn = Comparison(*(getattr(population, each.name)[rows] for each in dataclasses.fields(Comparison)))
        found = drawn.certificate(metric, limit, 0.9, "", "eager")
        held += found.bound <= truth if metric == "top1" else found.bound >= truth
    assert 0.87 <= held / draws <= 0.93


@pytest.mark.parametrize(("metric", "limit"), [("nll", 0.1), ("kl", 0.1), ("top1", 0.9)])
def test_bounds_hold_where_few_sequences_cost_much(metric: str, limit: float) -> None:
    """Losses that are distributed exponentially, at 95%: Student's bound alone holds in 91.2% of these samples."""
    count, sample, draws = 20_000, 40, 4000
    generator = torch.Generator().manual_seed(7)
    tokens = torch.full((count,), 60.0, dtype=torch.float64)
    loss = torch.empty_like(tokens).exponential_(generator=generator)
    population = Comparison(tokens, tokens, loss, loss, tokens - loss)
    truth = population.certificate(metric, limit, 0.95, "", "eager").value
    held = 0
    for _ in range(draws):
        rows = torch.randint(count, (sample,), generator=generator)
        drawn = Comparison(*(getattr(population, each.name)[rows] for each in dataclasses.fields(Comparison)))
        found = drawn.certificate(metric, limit, 0.95, "", "eager")
        held += found.bound <= truth if metric == "top1" else found.bound >= truth
    assert 0.92 <= held / draws <= 0.96


def test_few_small_losses_make_no_bound_narrower() -> None:
    """Student's bound is never undercut: of mirrored losses, the smaller margin is his."""
    tokens = torch.full((9,), 10.0, dtype=torch.float64)
    loss = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 9], dtype=torch.float64)
    margins = []
    for values in (loss, 9 - loss):
        seen = Comparison(tokens, tokens, values, values, tokens - values)
        kl, top1 = (seen.certificate(metric, 0.5, 0.95, "", "eager") for metric in ("kl", "top1"))
        assert kl.bound - kl.value == pytest.approx(top1.value - top1.bound)
        margins.append(kl.bound - kl.value)
    student = float(loss.std()) / 3 / 10 * student_quantile(0.95, 8)
    assert margins[1] == pytest.approx(student) and margins[0] > 1.3 * student


def test_what_becomes_impossible_costs_without_limit() -> None:
    """A figure, that no budget allows: not an error of the data."""
    given = batch([[0, 1, 2], [2, 1, 0]])
    changed = torch.zeros(2, 3, 3)
    changed[0, 0, 1] = -torch.inf
    seen = Comparison.of(torch.zeros(2, 3, 3), changed, given)
    for metric in ("nll", "kl"):
        found = seen.certificate(metric, 1e9, 0.95, "", "eager")
        assert (found.value, found.bound, found.holds) == (math.inf, math.inf, False)


def test_figures_that_are_not_numbers_prove_nothing() -> None:
    given = random_batch(3)
    seen = compare(
        lambda x: torch.zeros(*x.tokens.shape, 7), lambda x: torch.full((*x.tokens.shape, 7), torch.nan), [given]
    )
    with pytest.raises(InvalidInput, match="kl on the validation data is nan"):
        seen.certificate("kl", 1.0, 0.95, "", "eager")


# ------------------------------------------------------------------------------------------------------------- the data


def sequences(batches: list[Batch]) -> list[list[int]]:
    return [row[kept].tolist() for each in batches for row, kept in zip(each.tokens, each.valid, strict=True)]


def test_the_last_sequences_are_held_out() -> None:
    given = [batch([[i, i, i] for i in range(a, b)]) for a, b in ((0, 4), (4, 7), (7, 10))]
    chosen_on, proved_on = hold_out(given)
    assert sequences(chosen_on) == [[i] * 3 for i in range(6)]
    assert sequences(proved_on) == [[i] * 3 for i in range(6, 10)]
    check_data(chosen_on, proved_on)


def test_what_stands_in_both_parts_is_proved_on_alone() -> None:
    given = [batch([[1, 1, 0], [2, 2, 2], [3, 3, 3], [4, 4, 4], [1, 1, 9]], counts=[2, 3, 3, 3, 2])]
    chosen_on, proved_on = hold_out(given)
    assert sequences(chosen_on) == [[2, 2, 2], [3, 3, 3]]
    assert sequences(proved_on) == [[1, 1], [4, 4, 4], [1, 1]]
    check_data(chosen_on, proved_on)


def test_overlaps_are_refused_whatever_the_padding() -> None:
    with pytest.raises(InvalidInput, match="1 validation sequences stand in the calibration data too"):
        check_data([batch([[1, 2, 9]], counts=[2])], [batch([[1, 2], [3, 4]])])


@pytest.mark.parametrize("proved_on", [[], [batch([[1, 2]])], [batch([[1, 2], [3, 4]], counts=[2, 1])]])
def test_too_little_data_is_refused(proved_on: list[Batch]) -> None:
    with pytest.raises(InvalidInput, match=f"there are {len(proved_on)}"):
        check_data([], proved_on)


def test_joined_batches_hold_the_same_sequences_in_order() -> None:
    given = [batch([[1, 2, 3]]), batch([[4, 5, 0], [6, 7, 8]], counts=[2, 3]), batch([[9, 9]]), batch([[1, 1, 1]])]
    for tokens, sizes in ((100, [3, 1, 1]), (9, [3, 1, 1]), (8, [1, 2, 1, 1])):
        found = joined(given, tokens)
        assert [len(each.tokens) for each in found] == sizes
        assert sequences(found) == sequences(given)
        assert data_hash(found) == data_hash(given)


def test_the_hash_is_of_the_valid_tokens() -> None:
    same = [[batch([[1, 2, 0], [3, 4, 5]], counts=[2, 3])], [batch([[1, 2]]), batch([[3, 4, 5]])]]
    assert data_hash(same[0]) == data_hash(same[1])
    assert data_hash(same[0]) != data_hash([batch([[1, 2]]), batch([[3, 4, 6]])])


# ------------------------------------------------------------------------------------------------ budget, certificate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "without a limit"),
        ({"nll": -0.1}, "nll is -0.1"),
        ({"kl": math.inf}, "kl is inf"),
        ({"top1": 1.5}, "top1 is 1.5"),
        ({"nll": 0.1, "confidence": 1.0}, "confidence is 1.0"),
        ({"nll": "0.1"}, "nll is '0.1'"),
        ({"kl": True}, "kl is True"),
        ({"top1": "all"}, "top1 is 'all'"),
        ({"nll": 0.1, "confidence": "95%"}, "confidence is '95%'"),
        ({"evaluate": 0.9, "max_drop": 0.1}, "evaluate is 0.9. Give a function"),
        ({"evaluate": len}, "evaluate and max_drop belong together"),
        ({"nll": 0.1, "max_drop": 0.1}, "evaluate and max_drop belong together"),
    ],
)
def test_impossible_budgets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Budget(**options)


CERTIFICATE = Certificate("nll", 0.01, 0.004, 0.009, 0.95, 40, 5000, "ab" * 32, "onnxruntime")


def test_certificates_say_whether_they_hold() -> None:
    assert CERTIFICATE.holds
    assert str(CERTIFICATE) == "nll: 0.004, at 95.0% confidence 0.009 <= 0.01 (40 sequences, 5,000 predictions)"
    assert not dataclasses.replace(CERTIFICATE, bound=0.011).holds
    agreement = dataclasses.replace(CERTIFICATE, metric="top1", limit=0.98, value=0.985, bound=0.981)
    assert agreement.holds
    assert "0.981 >= 0.98" in str(agreement)
    assert "0.97 < 0.98" in str(dataclasses.replace(agreement, bound=0.97))


PLAN = Plan([SkipSublayers(ffn=(3,))], "c" * 64, {"x": torch.ones(2)}, (CERTIFICATE,))


def test_certificates_are_saved_with_the_plan(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").certificates == (CERTIFICATE,)


def changed_entries(data: dict[str, Any]) -> None:
    data["entries"][0]["ffn"] = [3, 4]


def changed_model(data: dict[str, Any]) -> None:
    data["model"] = None


@pytest.mark.parametrize("change", [changed_entries, changed_model])
def test_certificates_of_another_plan_are_refused(change: Any) -> None:
    data = json.loads(PLAN.to_json())
    change(data)
    with pytest.raises(InvalidPlan, match="certificates of other entries, or for another model"):
        Plan.from_dict(data, tensors=PLAN._tensor_bytes())


def test_certificates_must_be_complete() -> None:
    data = json.loads(PLAN.to_json())
    del data["certified"]["certificates"][0]["bound"]
    with pytest.raises(InvalidPlan, match="'bound' is missing"):
        Plan.from_dict(data, tensors=PLAN._tensor_bytes())
