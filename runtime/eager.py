"""The reference executable: the program's graph, run by PyTorch as it stands."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from skipstone.ir.program import Program, Role
from skipstone.runtime.cache import KVCache
from skipstone.runtime.session import check_cache, slot_shapes, step_inputs


class EagerSession:
    """Runs a program with plain PyTorch; see `skipstone.runtime.session.Session`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.slots = slot_shapes(program)

    @torch.no_grad()
    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Session.run`."""
        return self.program.run(**values)

    @torch.no_grad()
    def step(self, tokens: Tensor, positions: Tensor, start: Tensor, logit_rows: Tensor, cache: KVCache) -> Tensor:
        """See `Session.step`."""
        check_cache(self.slots, tokens, start, cache)
        values = step_inputs(self.program, tokens, positions, start, logit_rows)
        buffers = {Role.CACHE_KEY: cache.keys, Role.CACHE_VALUE: cache.values}
        values |= {port.name: buffers[port.role][port.slot] for port in self.program.inputs if port.slot is not None}
        outputs = self.program.run(**values)
        for port in self.program.outputs:
            if port.slot is not None:  # the graph is functional: new buffers take the place of the old ones
                buffers[port.role][port.slot] = outputs[port.name]
        return next(outputs[port.name] for port in self.program.outputs if port.role == Role.LOGITS)
