"""A graph compiled by Inductor, as often as its inputs differ in more than their sizes, and never behind one's back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from skipstone.runtime.triton.package import Package, write_package


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
        self._values = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
        self._axes = [
            [axis for axis, size in enumerate(each.shape) if not isinstance(size, int)] for each in self._values
        ]
        self._is_batch_fixed = is_batch_fixed
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run it on one tensor a placeholder."""
        key = self.fixed_sizes(inputs)
        if key not in self._compiled:
            inputs = [value.detach() for value in inputs]  # marks would stay on buffers that other graphs take, too
            for value, axes in zip(inputs, self._dynamic(inputs), strict=True):
                for axis in axes:
                    torch._dynamo.mark_dynamic(value, axis)
            # A module of its own: Dynamo counts what it compiles by the code of `forward`.
            module = fx.GraphModule(self._tensors, self._graph)
            self._compiled[key] = torch.compile(module, fullgraph=True, dynamic=False, options=self._options)
        results: tuple[Tensor, ...] = self._compiled[key](*inputs)
        return results

    def fixed_sizes(self, inputs: Sequence[Tensor]) -> tuple[int, ...]:
        """Which code is for these inputs: of each symbolic size what it is, or 0 where the code is for any other."""
        sizes = [(value, axis) for value, axes in zip(inputs, self._axes, strict=True) for axis in axes]
        return tuple(value.shape[axis] if self._is_fixed(value, axis) else 0 for value, axis in sizes)

    def signature(self) -> list[Any]:
        """Dtypes and shapes of the inputs and tensors that a package is called with, as plain data."""
        inputs = [
            [str(each.dtype), [size if isinstance(size, int) else None for size in each.shape]] for each in self._values
        ]
        owned = self._owned().items()
        return [inputs, [[name, str(each.dtype), list(each.shape), list(each.stride())] for name, each in owned]]

    def write_package(self, inputs: Sequence[Tensor], path: Path) -> None:
        """Compile the code for these inputs into a file; see `skipstone.runtime.triton.package`."""
        write_package(self._graph, self._owned(), inputs, self._dynamic(inputs), self._options, path)

    def open_package(self, path: Path, fixed_sizes: tuple[int, ...], device: torch.device) -> None:
        """From now on, use a package that `write_package` wrote for inputs of these sizes. This runs its code."""
        dtypes = [each.dtype for each in self._values]
        self._compiled[fixed_sizes] = Package(path, list(self._owned().values()), dtypes, device)

    def _owned(self) -> dict[str, Tensor]:
        """The tensors that the graph reads, by name: a graph that was saved may read them in another order."""
        names = {str(node.target) for node in self._graph.find_nodes(op="get_attr")}
        return {name: self._tensors[name] for name in sorted(names)}

    def _dynamic(self, inputs: Sequence[Tensor]) -> list[list[int]]:
        """The axes of each input whose sizes stay symbolic."""
        pairs = zip(inputs, self._axes, strict=True)
        return [[axis for axis in axes if not self._is_fixed(value, axis)] for value, axes in pairs]

    def _is_fixed(self, value: Tensor, axis: int) -> bool:
        return value.shape[axis] == 1 or (axis == 0 and self._is_batch_fixed)
