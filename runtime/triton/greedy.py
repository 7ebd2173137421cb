"""Greedy decoding on the device: a step whose best token is its own next input, so that steps only have to be repeated.

Between two steps of the usual kind the device chooses a token, copies inputs and counts, each in a kernel of its own;
for a small model that takes as long as some of its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from skipstone.ir.program import Program, Role
from skipstone.ir.take_best import take_best_
from skipstone.runtime.triton.steps import StaticStep, Step

MOST = 64
"""Tokens that are decoded before their results are copied."""

_COUNTED = (Role.POSITIONS, Role.START)
"""Inputs that are one more at each step."""


class GreedySteps:
    """Steps of single tokens over certain cache buffers, each the best one behind the one before.

    Args:
        program: whose steps they are.
        step: the program's, on all inputs by name.
        logits: which of its results are the logits [B, 1, V].
        values: inputs of the first step, other than the buffers; their shapes and dtypes stay what they are.
        buffers: of the cache.
        memory: what the graphs of a session share.
    """

    def __init__(
        self,
        program: Program,
        step: Step,
        logits: int,
        values: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        memory: Any,
    ) -> None:
        by_role = {port.role: port.name for port in program.inputs}
        tokens = by_role[Role.TOKENS]
        counted = [by_role[role] for role in _COUNTED if role in by_role]
        self._chosen = values[tokens].new_zeros(values[tokens].shape[0], MOST)
        self._number = values[tokens].new_zeros(values[tokens].shape[0])

        def run(everything: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            results = step(everything)
            further = [everything[name] for name in counted]
            take_best_(results[logits][:, 0], everything[tokens], self._chosen, self._number, further)
            return results

        self.step = StaticStep(run, values, buffers, memory)

    def __call__(self, values: Mapping[str, Tensor], count: int) -> Tensor:
        """The best `count` tokens, int64 [B, count], behind the inputs of the first step; at most `MOST`."""
        self._number.zero_()
        self.step(values)
        for _ in range(count - 1):
            self.step.replay()
        return self._chosen[:, :count].clone()
