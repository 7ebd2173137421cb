"""The reference executable: the program's graph, run by PyTorch as it stands."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from skipstone.ir.dialect import GATE
from skipstone.ir.gates import spared
from skipstone.ir.program import Program
from skipstone.runtime.cache import KVCache
from skipstone.runtime.session import ProgramSession, cache_layout, written_buffers


class EagerSession(ProgramSession):
    """Runs a program with plain PyTorch; see `skipstone.runtime.session.Session`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layout = cache_layout(program)
        self._written = written_buffers(program)
        has_gates = any(True for _ in program.nodes(GATE))
        self._execute = _Gated(program) if has_gates else program.module

    @torch.no_grad()
    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Session.run`."""
        results = self._execute(*(values[port.name] for port in self.program.inputs))
        return {port.name: value for port, value in zip(self.program.outputs, results, strict=True)}

    @torch.no_grad()
    def step_outputs(self, values: Mapping[str, Tensor], cache: KVCache, names: Sequence[str]) -> tuple[Tensor, ...]:
        """See `ProgramSession.step_outputs`."""
        outputs = self.run({**values, **cache.buffers})
        for name, buffer in self._written.items():  # the graph is functional: new buffers take the place of the old
            cache.buffers[buffer] = outputs[name]
        return tuple(outputs[name] for name in names)


class _Gated(fx.Interpreter):
    """Runs a program without what its gates spare: where every row skips, the gate's value is zeros."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.extra_traceback = False
        self.gate_of = {node: gate for gate in program.nodes(GATE) for node in (*spared(gate), gate)}

    def __call__(self, *inputs: Any) -> Any:
        return copy.copy(self).run(*inputs)  # a run keeps its values in the interpreter, and threads may run at once

    def run_node(self, n: fx.Node) -> Any:
        gate = self.gate_of.get(n)
        skip: Any = None if gate is None else self.env[gate.args[1]]  # type: ignore[index]
        if skip is None or not bool(skip.all()):
            return super().run_node(n)
        value = n.meta["val"]
        return skip.new_zeros((*skip.shape, value.shape[-1]), dtype=value.dtype) if n is gate else None
