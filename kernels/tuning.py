"""Tile sizes of the attention kernels: as large as registers allow without spilling on sm_80 and sm_90."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from skipstone.kernels.call import Call

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        rows: queries times heads of a group, a power of two, at least 16.
        keys: tokens of the cache, a power of two, at least 16.
        warps: threads / 32.
        stages: of the software pipeline.
    """

    rows: int
    keys: int
    warps: int
    stages: int


# Products of float32 numbers are three of their halves, which takes the registers of more rows.
FLOAT32 = Tile(16, 16, 8, 2)


def decode_tile(call: Call) -> Tile:
    """The tile of `decode_attention`: a stage is worked on while two come from memory, which is what limits it."""
    if call.q.dtype == torch.float32:
        return FLOAT32
    # All warps of a program hold its queries, so that more rows or channels take registers of more threads: eight warps
    # at a time on a processor, as two programs or as one.
    if widest(call) > 128:
        return Tile(16, 32, 8, 3)
    return Tile(16, 64, 4, 3) if call.group * call.queries <= 16 else Tile(32, 32, 8, 3)


def prefill_tile(call: Call) -> Tile:
    """The tile of `prefill_attention`."""
    if call.q.dtype == torch.float32:
        return FLOAT32
    if widest(call) > 128:
        return Tile(32, 32, 8, 2)
    if call.arch >= 90 and not any(call.exact):
        # The tensor cores of sm_90 have an instruction for 64 rows. Keys in full precision come with a loop and with
        # registers of their own, and leave none for it.
        return Tile(64, 32, 4, 2)
    return Tile(32, 32, 4, 3)


def widest(call: Call) -> int:
    """The larger head size of keys and values."""
    return max(call.k.shape[-1], call.v.shape[-1])


def constants(call: Call, tile: Tile) -> Mapping[str, Any]:
    """The constants of an attention kernel."""
    residual, first, ring = call.exact
    return {
        **call.formats("FORM", "GROUP", "ALIGN", "PARTS", "WIDTH"),
        "MODEL": TYPES[call.q.dtype],
        "ARCH": call.arch,
        "KIND": call.kind,
        "CAP": call.softcap > 0,
        "HEADS": call.group,
        "RESIDUAL": residual,
        "FIRST": first,
        "RING": ring,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
    }
