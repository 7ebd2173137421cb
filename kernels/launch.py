"""A kernel with everything that it is launched with, so that what is compiled without a device is what runs on one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from skipstone.ir.errors import InvalidInput

Buffer = tuple[Tensor, int, int, int]

REGISTERS = 255
"""As many as a thread can have. Unless told so, ptxas spills some where that makes room for one more program."""

PROCESSOR_REGISTERS = 65536
"""Of 32 bits, that all threads of a processor of sm_80 and sm_90 share."""

FIRST_TO_OVERLAP = 90
"""The oldest devices on which a kernel can begin while the one before is still running."""


observers: list[Callable[[Any], None]] = []
"""What is called with the compiled kernel of each launch, see `skipstone.kernels.binaries`."""


def buffer(x: Tensor) -> Buffer:
    """A tensor [B, H, rows, width] as kernels address it: with the strides of its first three dimensions."""
    if x.ndim != 4 or (x.shape[3] > 1 and x.stride(3) != 1):
        raise InvalidInput(
            f"Kernels read tensors [B, H, rows, width] whose rows lie in one piece, not strides {x.stride()}."
        )
    return x, x.stride(0), x.stride(1), x.stride(2)


def alignment(x: Tensor) -> int:
    """The largest power of two, up to 16 bytes, that divides all row addresses of a tensor [B, H, rows, width]."""
    return math.gcd(16, x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3]))


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: the function decorated with `triton.jit`.
        grid: number of programs in each dimension; never depends on data on the device.
        arguments: by name: tensors, numbers, None, and tuples of them.
        constants: by name, the arguments that are known when compiling.
        warps, stages: of each program, and of its software pipeline.
        registers: that a thread may use.
        overlaps: whether it begins while the kernel before is still running, see `skipstone.kernels.overlap`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int
    stages: int = 1
    registers: int = REGISTERS
    overlaps: bool = False

    @property
    def options(self) -> Mapping[str, int]:
        """What Triton is told about compiling it."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        return {**options, "launch_pdl": True} if self.overlaps else options

    def __call__(self) -> None:
        """Launch it on the current stream, without waiting."""
        compiled = self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
        for observe in observers:
            observe(compiled)
