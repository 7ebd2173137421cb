"""A training step as one CUDA graph: a deep, narrow model spends its time on launching kernels otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARMUP = 3
"""Calls before the capture, in which libraries set themselves up and optimizers make their state."""


class Captured:
    """A function without arguments, captured in its fourth call and replayed from then on.

    Args:
        function: reads and writes the same tensors in every call and does not wait for the device. Gradients have to be
            None when they are first written. What it returns is overwritten by the next call.

    See "Whole-network capture" in https://docs.pytorch.org/docs/stable/notes/cuda.html.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function = function
        self.calls = 0
        self.graph = torch.cuda.CUDAGraph()
        self.side = torch.cuda.Stream()
        self.result: Tensor | None = None

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls <= WARMUP:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                result = self.function()
            torch.cuda.current_stream().wait_stream(self.side)
            return result
        if self.result is None:
            with torch.cuda.graph(self.graph):
                self.result = self.function()
        self.graph.replay()
        return self.result
