"""Replaying a program equals running the rewritten program, and runs only what differs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from skipstone.calibrate import Batch, program_inputs, token_batches
from skipstone.ir.program import Program
from skipstone.ir.stream import find_stream
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.replay import Evaluator, Replay
from tests import models

NAMES = ("llama", "gpt2", "gpt_neox", "bert")


def batches(program: Program) -> list[Batch]:
    """Two batches, one of them padded."""
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return token_batches(
        [models.tokens(1, 7), {"input_ids": models.tokens(2, 9, seed=1), "attention_mask": mask}], program.source
    )


def replay(name: str) -> Replay:
    program = models.program(name)
    stream = find_stream(program)
    inputs = [program_inputs(program, batch) for batch in batches(program)]
    (result,) = program.output_node().args[0]  # type: ignore[misc]
    return Replay(program, stream, inputs, range(len(stream.sublayers)), result)  # type: ignore[arg-type]


@cache
def rewritten(name: str, skipped: frozenset[int]) -> list[Tensor]:
    """What the program without these sublayers returns."""
    program = models.program(name)
    chosen = [each for each in find_stream(program).sublayers if each.index in skipped]
    layers = {kind: tuple(each.layer for each in chosen if each.kind == kind) for kind in ("attention", "ffn")}
    less = program.copy()
    SkipSublayers(**layers).rewrite(less)
    with torch.no_grad():
        return [less.module(*program_inputs(less, batch))[0] for batch in batches(less)]


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", NAMES)
def test_any_set_after_any_other_equals_the_rewritten_program(name: str, data: st.DataObject) -> None:
    count = len(find_stream(models.program(name)).sublayers)
    sets = st.frozensets(st.integers(0, count - 1), max_size=count - 1)
    again = replay(name)
    for base, skipped in data.draw(st.lists(st.tuples(sets, sets), min_size=1, max_size=3)):
        again.rebase(base)
        for found, expected in zip(again.results(skipped), rewritten(name, skipped), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_lies_behind_the_first_difference_is_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    again = replay(name)
    count = len(again.start)
    again.rebase(frozenset())
    assert again.passes == 1
    ran: list[fx.Node] = []
    monkeypatch.setattr(Evaluator, "run_node", lambda self, n: ran.append(n) or fx.Interpreter.run_node(self, n))
    for number, (index, start) in enumerate(sorted(again.start.items(), key=lambda item: item[1])):
        before = again.passes
        list(again.results({index}))
        assert again.passes - before == pytest.approx((count - number) / count)
        calls = [node for node in ran if node.op == "call_function"]
        assert calls and min(map(again.evaluator.position.__getitem__, calls)) >= start
        ran.clear()


def test_the_base_costs_the_head_alone() -> None:
    again = replay("llama")
    again.rebase({3})
    list(again.results({3}))
    assert again.passes == 1


def test_one_stream_a_sublayer_is_kept_and_one_that_is_skipped_keeps_nothing() -> None:
    again = replay("llama")

    def streams() -> int:
        values = {id(value): value for value in again.values[0].values() if isinstance(value, Tensor)}
        return sum(value.is_floating_point() and value.shape[-1] == 32 for value in values.values())

    again.rebase(frozenset())
    assert streams() == len(again.start) + 1
    again.rebase({1, 2})
    assert streams() == len(again.start) - 1
