"""`skipstone::take_best_` on CUDA devices: the best of each part of the logits, then the best of these.

One program for a whole row would take longer than some layers of a small model: choosing one of 151936 tokens so made
a step 0.05 ms longer on an H200. Value and place are one number of 64 bits, so that a maximum is all there is to find.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipstone.ir.errors import Unsupported
from skipstone.ir.take_best import take_best_
from skipstone.kernels.launch import FIRST_TO_OVERLAP, Launch
from skipstone.kernels.overlap import begin_early, wait_for_kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PART = 1024
"""Logits of one program."""
LARGEST = 1024
"""Of the parts, how many are compared at a time."""
NOTHING = tl.constexpr(-(2**63))
"""Less than any packed logit."""


def choice_launches(
    logits: Tensor, tokens: Tensor, chosen: Tensor, number: Tensor, counted: Sequence[Tensor], arch: int
) -> tuple[Launch, Launch]:
    """The two launches of the operator.

    Args:
        logits, tokens, chosen, number, counted: its operands, contiguous but for the rows of `logits`.
        arch: of the device, such as 90.
    Raises:
        Unsupported: there is no kernel for the dtype.
    """
    if logits.dtype not in DTYPES:
        hint = "Use float16, bfloat16 or float32."
        raise Unsupported(f"a Triton kernel that chooses tokens by logits in {logits.dtype}", hint=hint)
    batch, width = logits.shape
    parts = triton.cdiv(width, PART)
    bests = torch.empty((batch, parts), dtype=torch.int64, device=logits.device)
    overlaps = arch >= FIRST_TO_OVERLAP
    first = Launch(
        best_of_part,
        (parts, batch),
        {"logits": logits, "bests": bests, "width": width, "stride": logits.stride(0)},
        {"PART": PART, "OVERLAP": overlaps},
        warps=4,
        overlaps=overlaps,
    )
    second = Launch(
        take_best,
        (batch,),
        {
            "bests": bests,
            "tokens": tokens,
            "chosen": chosen,
            "number": number,
            "counted": tuple(counted),
            "parts": parts,
            "width": width,
            "most": chosen.shape[1],
        },
        {"COUNTED": len(counted), "BLOCK": min(LARGEST, triton.next_power_of_2(parts)), "OVERLAP": overlaps},
        warps=4,
        overlaps=overlaps,
    )
    return first, second


@take_best_.register_kernel("cuda")
def _(logits: Tensor, tokens: Tensor, chosen: Tensor, number: Tensor, counted: Sequence[Tensor]) -> None:
    major, minor = torch.cuda.get_device_capability(logits.device)
    rows = logits if logits.stride(-1) == 1 else logits.contiguous()
    for launch in choice_launches(rows, tokens, chosen, number, counted, major * 10 + minor):
        launch()


@triton.jit
def best_of_part(logits, bests, width, stride, PART: tl.constexpr, OVERLAP: tl.constexpr):
    """The best of one part of a row of the logits [B, V], packed."""
    begin_early(OVERLAP)
    wait_for_kernels(OVERLAP)
    part, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = part * PART + tl.arange(0, PART)
    x = tl.load(logits + batch * stride + place, mask=place < width, other=0.0).to(tl.float32)
    # As integers, numbers in floating point have the order of their sizes, those below zero a reversed one.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 is no less than 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(x != x, 0x7FFFFFFF, ordered)
    packed = (ordered.to(tl.int64) << 32) | (width - 1 - place).to(tl.int64)  # the first place is the largest
    best = tl.max(tl.where(place < width, packed, NOTHING), axis=0)
    tl.store(bests + batch * tl.num_programs(0) + part, best)


@triton.jit
def take_best(
    bests, tokens, chosen, number, counted, parts, width, most,
    COUNTED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Take the best of the parts of a row, and count."""
    begin_early(OVERLAP)
    wait_for_kernels(OVERLAP)
    batch = tl.program_id(0).to(tl.int64)
    best = tl.full((BLOCK,), NOTHING, tl.int64)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(bests + batch * parts + part, mask=part < parts, other=NOTHING))
    token = width - 1 - (tl.max(best, axis=0) & 0xFFFFFFFF)
    column = tl.load(number + batch)
    tl.store(tokens + batch, token)
    tl.store(chosen + batch * most + column, token)
    tl.store(number + batch, column + 1)
    for each in tl.static_range(COUNTED):
        tl.store(counted[each] + batch, tl.load(counted[each] + batch) + 1)
