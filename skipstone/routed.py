"""One differentiable pass over prompts that are computed in full and continuations that may leave out sublayers.

What decoding gives without some sublayers, a single pass over the whole sequence gives too: the results of those
sublayers are multiplied by 0 at the continuation's tokens. The prompt's tokens never see those behind them, so that the
keys and values that they leave, and what a router reads of them, are those of the full program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from skipstone.ir.dialect import ATTENTION, EXPERTS, attention_reference, experts_reference
from skipstone.ir.program import Program
from skipstone.ir.prompts import prompt_mean_reference
from skipstone.ir.stream import Sublayer

Decide = Callable[[int, Tensor], Tensor]
"""From the number of a unit and the mean state [B, hidden] of each prompt before it: how far the continuation goes
without the unit, floating [B], 0 for not at all and 1 for left out."""

_DIFFERENTIABLE: Mapping[Any, Callable[..., Tensor]] = {ATTENTION: attention_reference, EXPERTS: experts_reference}
"""What is run in place of operators of the dialect that have no gradient."""


class RoutedProgram(fx.Interpreter):
    """A program without a cache, some of whose sublayers may be left out behind the prompt.

    Args:
        program: it is causal, and tokens mix in its attentions alone.
        units: the sublayers that are left out together, for each unit; see `skipstone.units.Space.units`.
        live: tensors that stand in for the program's own, by name: parameters to train.
    """

    def __init__(
        self, program: Program, units: Sequence[Sequence[Sublayer]], live: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(program.module)
        self.extra_traceback = False  # it would put the node into the message of our own errors
        self.live = live or {}
        self.branches = {each.branch: number for number, unit in enumerate(units) for each in unit}
        self.readers: dict[fx.Node, list[int]] = {}
        for number, unit in enumerate(units):
            self.readers.setdefault(unit[0].stream, []).append(number)

    def route(self, inputs: Sequence[Tensor], prompts: Tensor, decide: Decide) -> tuple[Any, ...]:
        """The program's outputs.

        Args:
            inputs: in the order of its ports.
            prompts: int64 [B], how many of the first tokens of each sequence are its prompt.
            decide: called once for each unit, in the order in which the stream reaches them.
        """
        self.prompts, self.decide = prompts, decide
        self.kept: dict[int, Tensor] = {}  # of each unit, the factor of its branches: [B, S, 1]
        return self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.branches:
            value = value * self.kept[self.branches[n]].to(value.dtype)
        for number in self.readers.get(n, ()):
            # Prompts are read the same whatever is decided: what a router sees depends on no other router.
            skipped = self.decide(number, prompt_mean_reference(value.detach(), self.prompts))
            behind = torch.arange(value.shape[1], device=value.device) >= self.prompts.unsqueeze(1)
            self.kept[number] = (1 - skipped.unsqueeze(1) * behind).unsqueeze(-1)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(_DIFFERENTIABLE.get(target, target), args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.live[target] if target in self.live else super().get_attr(target, args, kwargs)
