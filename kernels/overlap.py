"""Kernels that begin while the one before is still running (programmatic dependent launch, sm_90 and later).

A kernel that was launched so (`skipstone.kernels.launch.Launch.overlaps`) may read what no kernel before it writes, and
has to wait for everything else. It lets the next kernel do the same as soon as all of its own programs run. Before that
it may ask for what it will read, whatever is written there in the meantime: lines come to the second-level cache,
which all processors share.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin_early(OVERLAP: tl.constexpr):
    """Let the next kernel begin."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def ask_for(pointers, mask):
    """Have the lines of these addresses brought to the second-level cache."""
    code: tl.constexpr = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }"
    addresses = pointers.to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(code, "=r,l,r", [addresses, mask.to(tl.int32)], tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_kernels(OVERLAP: tl.constexpr):
    """Wait until what the kernels before have written can be read."""
    if OVERLAP:
        gdc_wait()
