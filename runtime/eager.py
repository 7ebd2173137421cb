"""The reference executable: the program's graph, run by PyTorch as it stands."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from skipstone.ir.program import Program, Role
from skipstone.runtime.cache import KVCache
from skipstone.runtime.session import cache_layout, check_cache, step_inputs, written_buffers


class EagerSession:
    """Runs a program with plain PyTorch; see `skipstone.runtime.session.Session`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layout = cache_layout(program)
        self._written = written_buffers(program)

    @torch.no_grad()
    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Session.run`."""
        return self.program.run(**values)

    @torch.no_grad()
    def step(self, tokens: Tensor, positions: Tensor, count: Tensor, logit_rows: Tensor, cache: KVCache) -> Tensor:
        """See `Session.step`."""
        check_cache(self.layout, tokens, cache)
        values = step_inputs(self.program, tokens, positions, count, logit_rows, cache)
        outputs = self.program.run(**values, **cache.buffers)
        for (
            name,
            buffer,
        ) in self._written.items():  # the graph is functional: new buffers take the place of the old ones
            cache.buffers[buffer] = outputs[name]
        return next(outputs[port.name] for port in self.program.outputs if port.role == Role.LOGITS)
