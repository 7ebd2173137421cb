"""The draft that is chosen is the one that gains most, and none is where none gains enough."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone import (
    LayerParallel,
    Plan,
    QuantizeKV,
    QuantizeWeights,
    Segment,
    SelfSpeculate,
    SkipByPrompt,
    SkipSublayers,
    find_self_speculate,
    optimize,
)  # fmt: skip
from skipstone import drafts as module
from skipstone.budget import hold_out
from skipstone.calibrate import Batch, token_batches
from skipstone.drafts import choose_draft, named
from skipstone.errors import InvalidInput, InvalidPlan, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.runtime.executable import Executable
from tests import models

NEW_TOKENS = 13
GOOD, BAD = SelfSpeculate(skip=SkipSublayers(layers=(2,))), SelfSpeculate(skip=SkipSublayers(layers=(0, 1, 3)))
DATA = list(models.tokens(3, 8).split(1))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    """A model of six layers, of which layer 2 adds nothing to the stream."""
    found = copy.deepcopy(models.model("deep"))
    layer = found.model.layers[2]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return found


@pytest.fixture(autouse=True)
def _captured_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("find", "optimize"):
        monkeypatch.setattr(import_module(f"skipstone.{place}"), "capture", lambda *_: program(model).copy())


@cache
def program(model: Any) -> Any:
    """The captured model; it is captured once."""
    return capture_huggingface(model)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Counts time: a step of the model takes 1, one of its draft `draft`, and the n-th measurement has its luck."""

    def simulate(draft: float, luck: Callable[[int], float] = lambda number: 1.0) -> None:
        calls = iter(range(10**6))

        def seconds(executable: Executable, prompt: Tensor) -> float:
            before = copy.copy(vars(executable.speculation)) if executable.speculation else {}  # type: ignore[attr-defined]
            executable.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
            if not before:
                return NEW_TOKENS - 1.0  # the first is that of the prompt
            seen = executable.speculation  # type: ignore[attr-defined]
            steps, drafted = (getattr(seen, name) - before[name] for name in ("steps", "drafted"))
            return (steps + draft * drafted) * luck(next(calls))

        monkeypatch.setattr(module, "_seconds", seconds)

    return simulate


def find(model: Any, **settings: Any) -> Plan:
    settings = {"lookups": [0]} | settings
    return find_self_speculate(model, DATA, target="eager", progress=False, **settings)


def test_the_best_draft_is_found(model: Any, clock: Callable[..., None]) -> None:
    clock(draft=0.2)
    plan = find(model, drafts=[BAD, GOOD], tokens=[2, 5])
    # All guesses of a draft without a layer that does nothing are right: the more at a time, the better.
    assert plan.entries == (SelfSpeculate(tokens=5, skip=SkipSublayers(layers=(2,))),)
    assert plan.model == program(model).source.fingerprint
    optimized = optimize(model, plan, target="eager", progress=False)
    optimized.generate(models.tokens(1, 5), max_new_tokens=13, do_sample=False)
    seen = optimized.speculation  # type: ignore[attr-defined]
    assert (seen.steps, seen.drafted, seen.accepted) == (2, 10, 10)  # one token behind the prompt, and 6 a step


@pytest.mark.slow  # a search, and seven drafts
def test_by_default_sublayers_that_do_nothing_are_skipped(model: Any, clock: Callable[..., None]) -> None:
    clock(draft=0.2)
    (entry,) = find(model, tokens=[4])
    assert isinstance(entry, SelfSpeculate) and entry.tokens == 4
    skip = entry.skip or SkipSublayers()
    assert entry.weights == QuantizeWeights(bits=4, activations="int8") or {*skip.attention, *skip.ffn} == {2}


def test_fewer_guesses_at_a_time_where_they_are_dear(model: Any, clock: Callable[..., None]) -> None:
    clock(draft=0.5)
    figures = choose_draft(
        program(model).copy(), Plan(), _batches(model), "eager", drafts=[GOOD], tokens=[1, 2], lookups=[0]
    )
    # Behind the first token come 12, in 4 steps of 2 guesses and one more.
    assert figures.entry.tokens == 2 and figures.acceptance == 1
    assert figures.gain == pytest.approx(12 / (4 + 0.5 * 8))


def test_no_draft_gains_enough(model: Any, clock: Callable[..., None]) -> None:
    clock(draft=0.95)
    broken = SelfSpeculate(skip=SkipSublayers(layers=(9,)))
    with pytest.raises(Unsupported, match=r"1\.1 times as fast \(.*names layer 9.*; 1 layer less: 1\.0\d times"):
        find(model, drafts=[broken, GOOD], tokens=[2])


def test_a_lucky_time_is_not_believed(model: Any, clock: Callable[..., None]) -> None:
    chosen_on, _ = hold_out(_batches(model))
    clock(draft=0.95, luck=lambda number: 0.5 if number < len(chosen_on) else 1.0)
    with pytest.raises(Unsupported, match=r"1 layer less: 2\.\d\d times"):
        find(model, drafts=[GOOD], tokens=[4])


def test_looking_up_is_tried_too(model: Any, clock: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where drafts are dear, and what follows is known beforehand."""
    clock(draft=0.0)
    wanted = {each.tobytes(): text for each, text in _known(model)}

    def repeated(self: Any, count: int) -> Tensor | None:
        text = wanted[self.tokens[0, :8].numpy().tobytes()]
        return text[:, self.tokens.shape[1] :][:, :count] if count > 0 else None

    monkeypatch.setattr("skipstone.runtime.speculate._Written.repeated", repeated)
    (entry,) = find(model, drafts=[BAD], tokens=[2], lookups=[0, 3, 6])
    assert entry == dataclasses.replace(BAD, tokens=2, lookup=6)


@pytest.mark.slow  # three executables of one draft
def test_a_plan_is_kept_beneath(model: Any, clock: Callable[..., None]) -> None:
    clock(draft=0.2)
    entries = [SkipSublayers(ffn=(4,)), QuantizeKV(k="int8", v="int8")]
    plan = find(model, plan=Plan(entries), drafts=[GOOD], tokens=[3])
    assert plan.entries == (*entries, SelfSpeculate(tokens=3, skip=SkipSublayers(layers=(2,))))


def test_settings_that_cannot_be(model: Any) -> None:
    for tokens in ([], [0], [2, 32], [2.0]):
        with pytest.raises(InvalidInput, match="from 1 to 31"):
            find(model, tokens=tokens)
    with pytest.raises(InvalidInput, match=r"lookups is \[-1\].*from 0 to 31"):
        find(model, lookups=[-1])
    for drafts in ([], [SkipSublayers(layers=(2,))]):
        with pytest.raises(InvalidInput, match="Give some SelfSpeculate entries"):
            find(model, drafts=drafts)
    with pytest.raises(InvalidPlan, match="cannot hold 3"):
        Plan.of([GOOD, 3])  # type: ignore[list-item]
    for entry in (GOOD, SkipByPrompt((SkipSublayers(ffn=(1,)),))):
        with pytest.raises(InvalidPlan, match="Leave that entry out"):
            find(model, plan=Plan([entry]))


def test_drafts_in_words() -> None:
    parallel = LayerParallel((Segment(1, 3), Segment(4, 6)))
    weights = QuantizeWeights(8)
    assert named(SelfSpeculate(skip=SkipSublayers(ffn=(1, 2), layers=(4,)), weights=weights)) == (
        "2 FFNs and 1 layer less, weights of 8 bits"
    )
    assert named(SelfSpeculate(parallel=parallel)) == "layers 1 to 2, layers 4 to 5 at the same time"


def _known(model: Any) -> list[tuple[Any, Tensor]]:
    """What the model writes behind each sequence."""
    exact = optimize(model, target="eager", progress=False)
    return [(each[0].numpy(), exact.generate(each, max_new_tokens=NEW_TOKENS, do_sample=False)) for each in DATA]


def _batches(model: Any) -> list[Batch]:
    return token_batches(DATA, program(model).source)
