"""Plans under a budget: proved and faster, or the model as it was."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import skipstone
from skipstone import Budget, Executable, Plan, SkipFFNAdaptive, SkipSublayers
from skipstone.budget import compare
from skipstone.calibrate import Batch
from skipstone.certify import candidates, certify, logits, speedup, within
from skipstone.errors import InvalidInput, Unsupported, UserError
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.program import Program
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from tests.models import VOCABULARY, model

USELESS = SkipSublayers(ffn=(1,))
HARMFUL = SkipSublayers(attention=(0,))


@cache
def planted() -> Any:
    """A Llama whose second FFN does nothing."""
    changed = copy.deepcopy(model("llama"))
    changed.model.layers[1].mlp.down_proj.weight.data.zero_()
    return changed


@cache
def data() -> tuple[Tensor, ...]:
    return torch.randint(VOCABULARY, (20, 12), generator=torch.Generator().manual_seed(1)).split(4)


def batches() -> list[Batch]:
    return [Batch(each, torch.ones_like(each, dtype=torch.bool)) for each in data()]


@cache
def program() -> Program:
    return capture_huggingface(planted())


@cache
def rewritten(plan: Plan) -> Program:
    return rewrite(program(), plan, target="eager")[0]


def build(plan: Plan) -> Any:
    return Executable(EagerSession(rewritten(plan)), plan=plan, report=skipstone.Report("Llama", "eager"))


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Decide what the measured speed is."""

    def decide(ratio: float) -> None:
        monkeypatch.setattr("skipstone.certify.speedup", lambda *_: ratio)

    return decide


def test_a_useless_sublayer_is_proved_to_cost_nothing(faster: Callable[[float], None]) -> None:
    faster(1.2)
    found = within(build, [Plan([USELESS])], Budget(nll=0.0, kl=0.0), batches())
    assert found.plan.entries == (USELESS,)
    assert [(each.metric, each.value, each.bound) for each in found.plan.certificates] == [("nll", 0, 0), ("kl", 0, 0)]
    assert {(each.sequences, each.tokens, each.target) for each in found.plan.certificates} == {(20, 220, "eager")}
    assert "a step is 1.20 times as fast as the model's" in found.report.budget


def test_a_plan_that_costs_more_leaves_the_model_unchanged(faster: Callable[[float], None]) -> None:
    faster(1.2)
    found = within(build, [Plan([HARMFUL])], Budget(kl=1e-3), batches())
    assert found.plan.entries == ()
    assert found.plan.certificates == ()
    assert "> 0.001 (20 sequences" in found.report.budget[0]
    assert found.report.budget[-1] == "nothing fits: the model is unchanged"
    assert "the model is unchanged" in str(found.report)


def test_a_plan_that_gains_nothing_leaves_the_model_unchanged(faster: Callable[[float], None]) -> None:
    faster(0.97)
    found = within(build, [Plan([USELESS])], Budget(kl=0.0), batches())
    assert found.plan.entries == ()
    assert "within the budget, but a step is 0.97 times as fast as the model's" in found.report.budget[0]


def test_the_next_plan_is_tried_and_attempts_are_paid_for(faster: Callable[[float], None]) -> None:
    faster(1.1)
    found = within(build, [Plan([HARMFUL]), Plan([USELESS])], Budget(top1=0.9), batches())
    assert found.plan.entries == (USELESS,)
    assert [each.confidence for each in found.plan.certificates] == [pytest.approx(0.975)]


def test_a_search_that_found_nothing_says_so() -> None:
    found = within(build, [], Budget(kl=0.0), batches())
    assert found.report.budget[0] == "no sublayer can be skipped within it"


@pytest.mark.parametrize(("max_drop", "holds"), [(0.5, True), (0.2, False)])
def test_a_users_own_score(max_drop: float, holds: bool) -> None:
    scores = {(): 0.9, (HARMFUL,): 0.6}
    budget = Budget(evaluate=lambda each: scores[each.plan.entries], max_drop=max_drop)
    (found,) = certify(build(Plan([])), build(Plan([HARMFUL])), budget, batches())
    assert (found.holds, found.sequences) == (holds, 0)
    assert found.value == pytest.approx(0.3)
    assert "without a bound" in str(found)


def test_a_score_is_a_number() -> None:
    pair = build(Plan([])), build(Plan([HARMFUL]))
    (found,) = certify(*pair, Budget(evaluate=lambda _: torch.tensor(0.5), max_drop=0.1), batches())
    assert type(found.value) is float and found.value == 0
    with pytest.raises(UserError, match="evaluate returned None, expected a number"):
        certify(*pair, Budget(evaluate=print, max_drop=0.1), batches())  # type: ignore[arg-type]


def test_padding_does_not_change_a_certificate() -> None:
    rows = [Batch(each[:, :9], torch.ones(4, 9, dtype=torch.bool)) for each in data()]
    padded = [Batch(each, torch.arange(12).expand(4, 12) < 9) for each in data()]
    pair = build(Plan([])), build(Plan([HARMFUL]))
    (one,), (two,) = (certify(*pair, Budget(kl=1.0), each) for each in (rows, padded))
    assert (one.data, one.tokens) == (two.data, two.tokens)
    assert one.bound == pytest.approx(two.bound, rel=1e-4)


def test_what_skips_in_decoding_is_certified_in_decoding() -> None:
    """Token by token behind the first half, and there alone: read as a prompt, the sequences would cost nothing."""
    always = SkipFFNAdaptive(threshold=-1.0, cold_start=0, cold_end=0, warmup_tokens=0, max_share=1.0)
    full, skipping, idle = (build(Plan(each)) for each in ([], [always], [replace(always, threshold=2.0)]))
    (found,) = certify(full, skipping, Budget(kl=0.0), batches())
    total = 0.0
    for given in batches():
        exact = full(input_ids=given.tokens).logits.double().log_softmax(-1)
        _, cache = skipping.prefill(given.tokens[:, :6])
        for at in range(6, 11):
            changed = skipping.decode(given.tokens[:, at], cache).double().log_softmax(-1)
            total += float((exact[:, at].exp() * (exact[:, at] - changed)).sum())
    assert found.tokens == 20 * 5
    assert found.value == pytest.approx(total / 100, rel=1e-4) and found.value > 1e-3
    (found,) = certify(full, idle, Budget(kl=0.0), batches())
    assert (found.tokens, found.value) == (100, 0.0)


@pytest.mark.parametrize("longest", [2, 9, 16, 17, None])
def test_speed_is_measured_within_the_room_that_there_is(longest: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def measured(systems: Any, prompt: Tensor, new_tokens: int, _runs: int) -> Any:
        seen.append((prompt.shape[1], new_tokens))
        return dict.fromkeys(systems, skipstone.report.Timing(1.0, 1.0, 1, 1, 1))

    monkeypatch.setattr("skipstone.certify.measure", measured)
    full = build(Plan([]))
    full.max_length = longest
    assert speedup(full, build(Plan([USELESS])), batches()) == 1
    ((prompt, new_tokens),) = seen
    assert prompt >= 1 and new_tokens >= 1 and (longest is None or prompt + new_tokens <= longest)


def test_speed_is_the_ratio_of_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps, which the model takes longer for, and not of prompts."""
    full, changed = build(Plan([])), build(Plan([USELESS]))
    taken = {
        id(full): skipstone.report.Timing(1.0, 6.0, 9, 3, 1),
        id(changed): skipstone.report.Timing(5.0, 4.0, 9, 3, 1),
    }
    monkeypatch.setattr(
        "skipstone.certify.measure", lambda systems, *_: {name: taken[id(each)] for name, each in systems.items()}
    )
    assert speedup(full, changed, batches()) == 1.5
    assert speedup(changed, full, batches()) == pytest.approx(1 / 1.5)


def test_speed_is_measured() -> None:
    """With the clock as it is, of which nothing but a sign is known."""
    assert speedup(build(Plan([])), build(Plan([USELESS])), batches()) > 0


# ------------------------------------------------------------------------------------------------------------ optimize


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["skipstone.optimize"], "capture", lambda *_: program())


def optimize(entries: list[Any], **options: Any) -> Any:
    return skipstone.optimize(planted(), Plan(entries), target="eager", progress=False, **options)


@pytest.mark.usefixtures("captured_once")
def test_a_given_plan_is_proved_on_held_out_data(tmp_path: Path, faster: Callable[[float], None]) -> None:
    faster(1.2)
    found = optimize([USELESS], calibration=data(), budget=Budget(kl=0.0))
    assert [each.sequences for each in found.plan.certificates] == [8]
    found.plan.save(tmp_path / "plan.json")
    again = skipstone.optimize(planted(), Plan.load(tmp_path / "plan.json"), target="eager", progress=False)
    assert again.plan.certificates == found.plan.certificates
    calibrated_anew = skipstone.optimize(planted(), found.plan, target="eager", calibration=data(), progress=False)
    assert calibrated_anew.plan.certificates == ()


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("budget", [Budget(nll=0.0), Budget(kl=0.0), Budget(nll=0.0, top1=0.9)])
def test_without_a_plan_one_is_searched_for(budget: Budget, faster: Callable[[float], None]) -> None:
    """What does nothing is all that costs nothing."""
    faster(1.2)
    found = optimize([], calibration=data(), budget=budget)
    assert found.plan.entries == (USELESS,)
    assert [each.metric for each in found.plan.certificates] == list(budget.limits)
    assert found.report.after.ffn == found.report.before.ffn - 1


def rise(plan: Plan) -> float:
    """The relative rise of the negative log-likelihood, measured through executables."""
    exact, changed = build(Plan([])), build(plan)
    seen = compare(lambda each: logits(exact, each), lambda each: logits(changed, each), batches())
    return float(seen.increase.sum() / seen.nll.sum())


@pytest.mark.parametrize(("share", "sizes"), [(1.01, [2, 1]), (1.5, [2, 1]), (2.6, [2]), (0.99, [1])])
def test_candidates_are_within_shares_of_the_limit(share: float, sizes: list[int]) -> None:
    """The inner layer has an FFN that costs nothing and an attention that does."""
    both = SkipSublayers(attention=(1,), ffn=(1,))
    plans = candidates(program(), Budget(nll=share * rise(Plan([both]))), batches())
    assert [plan.entries for plan in plans] == [{2: (both,), 1: (USELESS,)}[size] for size in sizes]


@pytest.mark.usefixtures("captured_once")
def test_validation_data_may_be_given(faster: Callable[[float], None]) -> None:
    faster(1.2)
    found = optimize([USELESS], budget=Budget(kl=0.0, validation=data()))
    assert [each.sequences for each in found.plan.certificates] == [20]


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        ([USELESS], {"budget": Budget(kl=0.0)}, "no data to prove the budget on"),
        ([], {"budget": Budget(kl=0.0, validation=torch.ones(2, 2))}, "no data to choose sublayers on"),
        ([USELESS], {"budget": 0.01}, "budget is float"),
    ],
)
def test_missing_data_is_refused_before_work_begins(
    entries: list[Any], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["skipstone.optimize"], "capture", lambda *_: pytest.fail("work began"))
    with pytest.raises(UserError, match=message):
        optimize(entries, **options)


@pytest.mark.usefixtures("captured_once")
def test_data_that_proves_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["skipstone.optimize"], "within", lambda *_: pytest.fail("work began"))
    with pytest.raises(InvalidInput, match="4 validation sequences stand in the calibration data"):
        optimize([USELESS], calibration=data(), budget=Budget(kl=0.0, validation=data()[2]))
    with pytest.raises(InvalidInput, match="there are 1"):
        optimize([USELESS], calibration=data()[0][:3], budget=Budget(kl=0.0))


def test_models_that_predict_no_next_token_are_refused() -> None:
    with pytest.raises(Unsupported, match="a budget for BertModel"):
        skipstone.optimize(
            model("bert"), Plan([USELESS]), target="eager", calibration=data(), budget=Budget(kl=0.1), progress=False
        )
