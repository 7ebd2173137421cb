"""Kernels that begin while the one before is still running (programmatic dependent launch, sm_90 and later).

A kernel that was launched so (`skipstone.kernels.launch.Launch.overlaps`) may read what no kernel before it writes, and
has to wait for everything else. It lets the next kernel do the same as soon as all of its own programs run.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PIECE = tl.constexpr(2048)
"""Bytes that one instruction asks for."""

FETCH = tl.constexpr("""{
.reg .pred present;
setp.ne.b32 present, $2, 0;
@present cp.async.bulk.prefetch.L2.global [$1], 2048;
mov.b32 $0, 0;
}""")


@triton.jit
def begin_early(OVERLAP: tl.constexpr):
    """Let the next kernel begin."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_kernels(OVERLAP: tl.constexpr):
    """Wait until what the kernels before have written can be read."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def fetch_ahead(x, number, programs, BYTES: tl.constexpr, LANES: tl.constexpr, OVERLAP: tl.constexpr):
    """Ask for the first BYTES at a pointer, so that they are in the L2 cache when they are read.

    All programs of a kernel do it together, with LANES threads each.
    """
    if OVERLAP:
        pieces: tl.constexpr = BYTES // PIECE
        lane = number * LANES + tl.arange(0, LANES)
        for first in range(0, pieces, programs * LANES):
            piece = first + lane
            where = x.to(tl.int64) + piece.to(tl.int64) * PIECE
            tl.inline_asm_elementwise(
                FETCH, "=r,l,r", [where, (piece < pieces).to(tl.int32)], tl.int32, is_pure=False, pack=1
            )
