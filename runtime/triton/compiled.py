"""A graph compiled by Inductor, as often as its inputs differ in more than their sizes, and never behind one's back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx


class CompiledGraph:
    """A graph whose symbolic sizes stay symbolic in what is compiled, except where they are 1.

    A size of 1 makes other code (it broadcasts), so that each choice of which sizes are 1 is compiled on its own, when
    it is first met. Nothing else is ever compiled anew.

    Args:
        graph: with fake values on its placeholders.
        tensors: what its `get_attr` nodes stand for.
        options: of Inductor.
        is_batch_fixed: compile for each value of the first dimension.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, Tensor],
        options: Mapping[str, Any] | None = None,
        is_batch_fixed: bool = False,
    ) -> None:
        self._graph, self._tensors, self._options = graph, dict(tensors), dict(options or {})
        values = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
        self._axes = [[axis for axis, size in enumerate(value.shape) if not isinstance(size, int)] for value in values]
        self._is_batch_fixed = is_batch_fixed
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run it on one tensor a placeholder."""
        sizes = [(value, axis) for value, axes in zip(inputs, self._axes, strict=True) for axis in axes]
        key = tuple(value.shape[axis] if self._is_fixed(value, axis) else 0 for value, axis in sizes)
        if key not in self._compiled:
            for value, axis in sizes:
                if not self._is_fixed(value, axis):
                    torch._dynamo.mark_dynamic(value, axis)
            # A module of its own: Dynamo counts what it compiles by the code of `forward`.
            module = fx.GraphModule(self._tensors, self._graph)
            self._compiled[key] = torch.compile(module, fullgraph=True, dynamic=False, options=self._options)
        results: tuple[Tensor, ...] = self._compiled[key](*inputs)
        return results

    def _is_fixed(self, value: Tensor, axis: int) -> bool:
        return value.shape[axis] == 1 or (axis == 0 and self._is_batch_fixed)
