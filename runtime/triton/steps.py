"""Decode steps whose inputs, outputs and cache buffers stay at the same addresses: CUDA graphs, where there is CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]


class StaticStep:
    """A decode step over certain cache buffers. On a CUDA device it is captured once and then replayed.

    The host reads no value of a step: how long the sequences are, kernels learn on the device. So the graph stays right
    while they grow.

    Args:
        step: runs on all inputs of the program by name.
        values: inputs of the first step, other than the buffers; shapes and dtypes stay what they are.
        buffers: of the cache.
        memory: what the graphs of a session share.
    """

    def __init__(
        self, step: Step, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor], memory: Any = None
    ) -> None:
        self.inputs = {name: value.clone(memory_format=torch.contiguous_format) for name, value in values.items()}
        everything = {**self.inputs, **buffers}
        self._run = lambda: step(everything)
        self._graph: torch.cuda.CUDAGraph | None = None
        if next(iter(buffers.values())).is_cuda:
            _on_another_stream(self._run)  # compiles; to write the same rows again changes nothing
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on with what they do on the device.
            with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
                self._outputs = self._run()

    def __call__(self, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run it without waiting for the device. The next call overwrites the outputs."""
        torch._foreach_copy_(list(self.inputs.values()), [values[name] for name in self.inputs])
        return self.replay()

    def replay(self) -> tuple[Tensor, ...]:
        """Run it once more on the same inputs."""
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._outputs


def _on_another_stream(action: Callable[[], Any]) -> None:
    """Run what is about to be captured outside of the default stream, as the capture will be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        action()
    torch.cuda.current_stream().wait_stream(stream)
