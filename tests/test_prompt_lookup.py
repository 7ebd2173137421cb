"""Guesses that a sequence gives itself: what followed the last time that it had its last tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipstone import Plan, SelfSpeculate, load
from skipstone.errors import InvalidPlan
from skipstone.runtime.speculate import MATCH, _Written
from tests.speculation_cases import FAIR, FUSED, LONG, PAD, VOCABULARY, built, counted, plain, prompt
from tests.test_self_speculate_sampling import SMALL, improbability, small

pytestmark = pytest.mark.usefixtures("one_thread")


def repeated(rows: list[list[int]], count: int, running: list[bool] | None = None) -> list[list[int]] | None:
    written = _Written(torch.tensor(rows), lambda tokens, _: torch.zeros(len(tokens), dtype=torch.bool), None, None)
    if running is not None:
        written.running = torch.tensor(running)
    found = written.repeated(count)
    return None if found is None else found.tolist()


def test_what_followed_the_last_time() -> None:
    assert MATCH == 3
    assert repeated([[7, 8, 9, 1, 7, 8, 9, 2, 5, 7, 8, 9]], 3) == [[2, 5, 7]]
    assert repeated([[7, 8, 9, 2, 5, 7, 8, 9]], 1) == [[2]]
    assert repeated([[7, 8, 9, 2, 5, 7, 8, 8]], 2) is None  # two tokens are no repetition
    assert repeated([[7, 8, 9]], 2) is None and repeated([[7, 8]], 2) is None


def test_a_repetition_goes_on() -> None:
    assert repeated([[4, 1, 2, 3, 1, 2, 3]], 7) == [[1, 2, 3, 1, 2, 3, 1]]
    assert repeated([[6, 6, 6, 6]], 3) == [[6, 6, 6]]


def test_all_sequences_that_are_not_finished_must_repeat() -> None:
    rows = [[0, 1, 2, 3, 9, 1, 2, 3], [5, 5, 6, 7, 8, 5, 6, 8]]
    assert repeated(rows, 2) is None
    assert repeated(rows, 2, running=[True, False]) == [[9, 1], [8, 8]]  # what it had last, whatever that is worth
    assert repeated([rows[0], [4, 1, 1, 1, 1, 1, 1, 1]], 2) == [[9, 1], [1, 1]]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    period=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=2),
    lookup=st.integers(1, 8),
    new=st.integers(1, 20),
    fused=st.booleans(),
    end=st.none() | st.integers(0, VOCABULARY - 1),
)
def test_greedy_tokens_are_those_of_the_model(
    period: list[int], lengths: list[int], lookup: int, new: int, fused: bool, end: int | None
) -> None:
    opt, batch = built((FUSED if fused else FAIR,)), prompt(*lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cycle = torch.tensor(period)[torch.arange(ids.shape[1]) % len(period)].expand(ids.shape)
    batch = {**batch, "input_ids": torch.where(mask.bool(), cycle, ids)}
    options: dict[str, Any] = {**LONG, "max_new_tokens": new}
    if end is not None:
        options |= {"eos_token_id": end, "pad_token_id": PAD}
    wanted = plain(opt).generate(**batch, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opt.session, "lookup", lookup)
        assert torch.equal(opt.generate(**batch, **options), wanted)


def test_looking_up_asks_the_draft_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is known by heart: every token is right, and the draft guesses none."""
    opt, batch = built((FAIR,)), prompt(6)
    text = plain(opt).generate(**batch, **LONG)
    monkeypatch.setattr(opt.session, "lookup", 5)
    monkeypatch.setattr(opt.session.draft, "step", lambda *_: pytest.fail("the draft was asked"))

    def known(self: _Written, count: int) -> Tensor:
        return text[:, self.tokens.shape[1] :][:, :count]

    monkeypatch.setattr(_Written, "repeated", known)
    with counted(opt) as found:
        assert torch.equal(opt.generate(**batch, **LONG), text)
    new = LONG["max_new_tokens"]
    steps = -(-(new - 1) // 6)  # five guesses and a token of the model
    assert found == [steps, new - 1 - steps, new - 1 - steps]


@pytest.mark.parametrize(("calls", "batch"), [(1, 3000), (600, 1)])
def test_samples_have_the_distribution_of_the_model(calls: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token has stood there before, and one is taken for a repetition."""
    opt, ids = small()[0], [1, 2, 0, 1, 2, 0]
    monkeypatch.setattr(opt.session, "lookup", 2)
    monkeypatch.setattr("skipstone.runtime.speculate.MATCH", 1)
    monkeypatch.setattr(opt.session.draft, "step", lambda *_: pytest.fail("the draft was asked"))
    with counted(opt) as found:
        assert improbability(ids, calls, batch, 0.8, SMALL) > 0.01
    assert batch > 1 or 0 < found[2] < found[1]
    monkeypatch.setattr("skipstone.runtime.speculate.torch.rand_like", torch.zeros_like)
    assert improbability(ids, calls, batch, 0.8, SMALL) < 1e-6


def test_a_saved_executable_looks_up_as_much(tmp_path: Path) -> None:
    opt = built((replace(FAIR, lookup=7),))
    opt.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert (opt.session.lookup, again.session.lookup) == (7, 7)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("lookup", "nearest"), [(-1, 0), (32, 31)])
def test_impossible_numbers_are_refused(lookup: int, nearest: int) -> None:
    entry = replace(FAIR, lookup=lookup)
    with pytest.raises(InvalidPlan, match=f"lookup of {lookup} tokens. The nearest is {nearest}"):
        entry.validate()
    assert Plan.from_json(Plan([replace(FAIR, lookup=9)]).to_json()).entries == (replace(FAIR, lookup=9),)
    assert SelfSpeculate().lookup == 0
