"""Running a lowered program: compiled by Inductor, and a token at a time as a CUDA graph."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipstone.ir.program import Program, Role
from skipstone.runtime.cache import KVCache
from skipstone.runtime.session import ProgramSession, cache_layout, check_cache, step_inputs, written_buffers
from skipstone.runtime.triton.cache import Pool
from skipstone.runtime.triton.compiled import CompiledGraph
from skipstone.runtime.triton.greedy import MOST, GreedySteps
from skipstone.runtime.triton.lower import check_kernels, decode_graph, lower
from skipstone.runtime.triton.steps import StaticStep

WHOLE, SINGLE = "whole", "single"
"""The graph for any number of tokens, and that for one of each sequence."""

DECODE: Mapping[str, Any] = {"combo_kernels": True}
"""Options of Inductor for steps of one token: kernels that could run at the same time become one. Each is so short that
to begin it counts."""

EXAMPLES: Mapping[str, Sequence[tuple[int, int]]] = {
    WHOLE: ((32, 256), (33, 256), (512, 1024), (513, 1024)),
    SINGLE: ((1, 256), (1, 512), (1, 1024), (1, 2048)),
}
"""New tokens and capacities of caches that stand for others. The first are those that code is compiled with ahead of
time; among all of them are those that kernels are launched for with different constants."""

TUNED: Mapping[str, Any] = {"max_autotune": True, "coordinate_descent_tuning": True}
"""Options of Inductor that choose among kernels by their times; it keeps its choices on disk."""


@dataclass(eq=False)
class Steps:
    """The decode steps of a session over the buffers of a cache, as far as they were asked for."""

    single: StaticStep | None = None
    greedy: GreedySteps | None = None


class TritonSession(ProgramSession):
    """Runs a program through Inductor; see `skipstone.runtime.session.Session`.

    A program is compiled when it is first run: for prompts, whatever their lengths, and for single tokens, once for
    each size of a batch. Steps of single tokens are CUDA graphs over the buffers of their cache. On a CPU everything is
    the same but the graphs: Inductor makes C++, and the dialect's operators run as their references.

    Threads take turns: a step's inputs stay where they are until it is launched.

    Args:
        program: on a CUDA device, or on the CPU.
        is_tuned: whether Inductor measures its kernels to choose among them, which takes minutes.
    Attributes:
        graphs: by name, `WHOLE` and `SINGLE`.
    Raises:
        Unsupported: see `skipstone.runtime.triton.lower`.
    """

    def __init__(self, program: Program, is_tuned: bool = False) -> None:
        self.program = program
        self.layout = cache_layout(program)
        self._written = written_buffers(program)
        lowered = lower(program)
        if program.source.device.type == "cuda":
            check_kernels(lowered)
        self._memory: Any = None
        self._steps: weakref.WeakSet[Steps] = weakref.WeakSet()
        self._outputs = [port.name for port in lowered.outputs]
        self._columns = [port.name for port in program.inputs if port.role in (Role.TOKENS, Role.LOGIT_ROWS)]
        tensors = lowered.tensors()
        tuned = TUNED if is_tuned else {}
        self._whole = CompiledGraph(lowered.graph, tensors, tuned)
        self._single = CompiledGraph(decode_graph(lowered), tensors, {**DECODE, **tuned}, is_batch_fixed=True)
        self.graphs: Mapping[str, CompiledGraph] = {WHOLE: self._whole, SINGLE: self._single}
        self._pool = Pool(self.layout, program.source.device)
        self._turn = threading.RLock()

    @torch.no_grad()
    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Session.run`."""
        with self._turn:
            contiguous = torch.contiguous_format
            buffers = {name: values[name].clone(memory_format=contiguous) for name in self._written.values()}
            results = self._run(self._whole, {**values, **buffers})
            written = {name: buffers[buffer] for name, buffer in self._written.items()}
            return dict(zip(self._outputs, results, strict=True)) | written

    @torch.no_grad()
    def step_outputs(self, values: Mapping[str, Tensor], cache: KVCache, names: Sequence[str]) -> tuple[Tensor, ...]:
        """See `ProgramSession.step_outputs`."""
        with self._turn:
            if all(values[name].shape[1] == 1 for name in self._columns):
                steps = self._steps_over(cache)
                if steps.single is None:
                    steps.single = StaticStep(self._run_single, values, cache.buffers, self._memory)
                results = steps.single(values)
            else:
                results = self._run(self._whole, {**values, **cache.buffers})
            by_name = dict(zip(self._outputs, results, strict=True))
            return tuple(by_name[name] for name in names)

    @torch.no_grad()
    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, count: int) -> Tensor:
        """See `GreedySession.decode`."""
        with self._turn:
            check_cache(self.layout, tokens, cache, count)
            one, row = torch.ones_like(cache.lengths), torch.zeros_like(tokens)
            parts = []
            for begin in range(0, count, MOST):
                values = step_inputs(self.program, tokens, positions + begin, one, row, cache)
                steps = self._steps_over(cache)
                if steps.greedy is None:
                    logits = next(place for place, port in enumerate(self.program.outputs) if port.role == Role.LOGITS)
                    name = self.program.outputs[logits].name
                    steps.greedy = GreedySteps(
                        self.program, self._run_single, self._outputs.index(name), values, cache.buffers, self._memory
                    )
                part = min(count - begin, MOST)
                parts.append(steps.greedy(values, part))
                tokens = parts[-1][:, -1:]
                cache.stepped = part
                cache.advance(one * part)
            return torch.cat(parts, dim=1)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """See `Session.new_cache`."""
        with self._turn:
            return self._pool.new_cache(batch, capacity)

    def cache_over(self, buffers: dict[str, Tensor], like: KVCache) -> KVCache:
        """See `ProgramSession.cache_over`."""
        with self._turn:
            cache = super().cache_over({**buffers, **self._pool.held(like)}, like)
            self._pool.hold(cache, like)
        return cache

    def example_inputs(self, graph: str, batch: int) -> list[Tensor]:
        """Inputs of a graph that read a prompt of `batch` sequences, or go on with them, and give one row of logits."""
        columns, capacity = EXAMPLES[graph][0]
        cache = KVCache.allocate(self.layout, batch, capacity, self.program.source.device)
        values = self._example(columns, cache) | cache.buffers
        return [values[port.name] for port in self.program.inputs]

    def rehearse(self, graph: str, batch: int) -> None:
        """Launch what prompts of `batch` sequences launch, or greedy steps behind them."""
        for columns, capacity in EXAMPLES[graph]:
            cache = self.new_cache(batch, capacity)
            if graph == WHOLE:
                self.step_outputs(self._example(columns, cache), cache, ())
            else:
                tokens = torch.zeros(batch, columns, dtype=torch.int64, device=self.program.source.device)
                self.decode(tokens, torch.zeros_like(tokens), cache, count=2)

    def _example(self, columns: int, cache: KVCache) -> dict[str, Tensor]:
        """Inputs of the program that are no buffers, for so many new tokens of each sequence of an empty cache."""
        tokens = torch.zeros(cache.batch, columns, dtype=torch.int64, device=self.program.source.device)
        count = torch.ones_like(cache.lengths)
        return step_inputs(self.program, tokens, torch.zeros_like(tokens), count, tokens[:, :1].clone(), cache)

    def open_package(self, graph: str, path: Path, fixed_sizes: tuple[int, ...]) -> None:
        """See `CompiledGraph.open_package`: it runs code that lies in the file."""
        self.graphs[graph].open_package(path, fixed_sizes, self.program.source.device)

    def _steps_over(self, cache: KVCache) -> Steps:
        """The steps of this session over the buffers of a cache."""
        storage = self._pool.settle(cache)
        if self not in storage.steps:
            if cache.lengths.is_cuda and not self._steps:
                # The graphs share their memory, which ends with the last of them and cannot be used again then.
                self._memory = torch.cuda.graph_pool_handle()
            storage.steps[self] = Steps()
            self._steps.add(storage.steps[self])
        return storage.steps[self]  # type: ignore[no-any-return]

    def _run_single(self, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return self._run(self._single, values)

    def _run(self, graph: CompiledGraph, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return graph([values[port.name] for port in self.program.inputs])
