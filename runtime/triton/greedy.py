"""Greedy decoding on the device: a step whose best token is its own next input, so that steps only have to be repeated.

Between two steps of the usual kind the device chooses a token, copies inputs and counts, each in a kernel of its own;
for a small model that takes as long as some of its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from skipstone.ir.program import Program, Role
from skipstone.runtime.triton.steps import StaticStep, Step

MOST = 64
"""Tokens that are decoded before their results are copied."""

PART = 1024
"""Logits that one program chooses from."""

COMPILED_ON = ("cuda",)
"""Devices where the choice of tokens is compiled: few kernels are worth it where they are part of a graph."""

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
        self._number = values[tokens].new_zeros(1)
        take: Callable[..., Any] | None = None

        def run(everything: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            nonlocal take
            results = step(everything)
            taken = (
                results[logits],
                self._chosen,
                self._number,
                everything[tokens],
                *map(everything.__getitem__, counted),
            )
            if take is None:
                take = _compiled(taken) if taken[0].device.type in COMPILED_ON else _take
            take(*taken)
            return results

        self.step = StaticStep(run, values, buffers, memory)

    def __call__(self, values: Mapping[str, Tensor], count: int) -> Tensor:
        """The best `count` tokens, int64 [B, count], behind the inputs of the first step; at most `MOST`."""
        self._number.zero_()
        self.step(values)
        for _ in range(count - 1):
            self.step.replay()
        return self._chosen[:, :count].clone()


def best_of(logits: Tensor) -> Tensor:
    """The first of the best tokens [B, 1] by logits [B, V]: of parts, then of their best.

    Inductor gives a whole row to one program: choosing one of 151936 so made a step 0.05 ms longer on an H200.
    """
    padded = F.pad(logits, (0, -logits.shape[-1] % PART), value=float("-inf"))
    peaks, places = padded.unflatten(-1, (-1, PART)).max(dim=-1)
    part = peaks.argmax(dim=-1, keepdim=True)
    return part * PART + places.gather(1, part)


def _take(logits: Tensor, chosen: Tensor, number: Tensor, tokens: Tensor, *counted: Tensor) -> None:
    """Write the best tokens to the inputs of the next step and to column `number` of the `chosen`, and count."""
    best = best_of(logits[:, 0])
    tokens.copy_(best)
    chosen.index_copy_(1, number, best)
    for each in (number, *counted):
        each.add_(1)


def _compiled(given: Sequence[Any]) -> Callable[..., Any]:
    """`_take` for these tensors, as few kernels."""
    # A module of its own: Dynamo counts what it compiles by the code.
    module = make_fx(_take, tracing_mode="fake")(*given)
    return torch.compile(module, fullgraph=True, dynamic=False)
