"""Tile sizes of the attention kernels: none spills registers on sm_80 and sm_90.

Those of decode attention were chosen by their times on an H200, see `benchmarks/kv_tiles.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from skipstone.kernels.call import Call
from skipstone.kernels.launch import PROCESSOR_REGISTERS, REGISTERS

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        rows: queries times heads of a group, a power of two, at least 16, or 8 if keys_first.
        keys: tokens of the cache, a power of two, at least 16.
        warps: threads / 32.
        stages: of the software pipeline.
        keys_first: whether keys, not queries, are the rows of matrix products, see `skipstone.kernels.softmax`.
        programs: how many of them a processor runs at a time.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    keys_first: bool = False
    programs: int = 2

    @property
    def registers(self) -> int:
        """As many as a thread can have if so many programs run at a time on a processor."""
        return min(REGISTERS, PROCESSOR_REGISTERS // (self.programs * self.warps * 32) // 8 * 8)


# Products of float32 numbers are three of their halves, which takes the registers of more rows.
FLOAT32 = Tile(16, 16, 8, 2, programs=1)

WIDE = {"full": 64, "int8_token": 128, "fp8_token": 128}
"""Keys of a tile for four warps, by the formats that such a tile is best for."""


def decode_tile(call: Call) -> Tile:
    """The tile of `decode_attention`."""
    rows = call.group * call.queries
    if rows > 16:
        keys = 16 if widest(call) > 128 else 32
        return FLOAT32 if call.q.dtype == torch.float32 else Tile(32, keys, 8, 3, programs=1)
    rows = 8 if rows <= 8 else 16
    if call.q.dtype == torch.float32:
        return Tile(rows, 32, 8, 2, keys_first=True, programs=1)
    if rows == 8 and widest(call) <= 128 and {call.k_format, call.v_format} <= WIDE.keys():
        # What is decoded in a few instructions, or in none, waits for memory alone: large tiles keep more on its way.
        return Tile(rows, min(WIDE[call.k_format], WIDE[call.v_format]), 4, 3, keys_first=True, programs=2)
    # A program of one warp waits for no other. What does not fit its registers is for two or four: keys in full
    # precision, and nvfp4 beside rows in full precision where finding a row's head takes a division.
    is_large = call.k_format == "full" or (
        "nvfp4" in (call.k_format, call.v_format) and any(call.exact) and call.group.bit_count() > 1
    )
    warps = max(1, rows // 8, 2 if is_large else 1) * (2 if widest(call) > 128 else 1)
    return Tile(rows, 32, warps, 3, keys_first=True, programs=8 // warps)


def prefill_tile(call: Call) -> Tile:
    """The tile of `prefill_attention`."""
    if call.q.dtype == torch.float32:
        return FLOAT32
    if widest(call) > 128:
        return Tile(32, 32, 8, 2)
    if call.arch >= 90 and not any(call.exact):
        # The tensor cores of sm_90 have an instruction for 64 rows. Keys in full precision come with a loop and with
        # registers of their own, and leave none for it.
        grouped = any(form.startswith("int4_group") for form in (call.k_format, call.v_format))
        return Tile(64, 32, 4, 3 if grouped else 2)
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
        "KEYS_FIRST": tile.keys_first,
    }
