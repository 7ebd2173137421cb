"""`skipstone::predicated_linear` on CUDA devices: a linear layer that reads no weight where every row skips.

The host never learns who skips. The grid follows from sizes that it knows; a program looks at the decisions of its
rows first, and if all of them skip, it writes zeros and reads nothing else. So a captured CUDA graph stays right
whatever is decided, and tiles are chosen for programs that do the work: with nothing to do any tile is fast.

Decoding is limited by reading the weight, once. A program has all rows, few columns, and walks along the whole rows of
the weight, so that its columns belong to it alone: sums always have the same order, and there is nothing to add up.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipstone.ir.errors import Unsupported
from skipstone.ir.predicated import check_operands, predicated_linear
from skipstone.kernels.launch import Launch
from skipstone.kernels.softmax import multiply

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = 80
FEW = 32
"""Most rows for which reading the weight is what takes the time."""
WIDEST = 256
"""Of any tile, in any dimension."""
REACH = 2**31
"""Elements that a tile may span: within it, offsets have 32 bits."""


@dataclass(frozen=True)
class Tile:
    """What one program works on.

    Attributes:
        rows, columns: of the result, powers of two from 16 on.
        depth: elements of each row of x and of the weight at a time, a power of two from 16 on.
        warps: threads / 32.
        stages: of the software pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_of(rows: int, weight: Tensor, arch: int, processors: int) -> Tile:
    """The tile for a number of rows and a weight [N, H]; it follows from sizes alone, never from who skips."""
    # Products of float32 numbers are three of their parts, which take the registers of a larger tile.
    exact = weight.dtype == torch.float32
    if rows > FEW:
        if exact or rows <= 128:
            return Tile(64, 64, 32, 8, 4)
        # A pointer for every element, where nothing is known about their addresses, leaves no registers for more.
        is_aligned = all(size % 16 == 0 for size in weight.shape)
        return Tile(128, 128, 64, 8, 3) if arch >= 90 and is_aligned else Tile(128, 128, 32, 8, 4)
    # Two programs for each processor, so that one reads while the other waits: the widest tile that leaves as many.
    # Where it is columns that lie side by side in memory, narrow ones would share its lines.
    columns, narrowest = 64, 32 if weight.stride(0) == 1 else 16
    while columns > narrowest and triton.cdiv(weight.shape[0], columns) < 2 * processors:
        columns //= 2
    elements, stages = (1024, 6) if exact else (4096, 4)
    return Tile(max(16, triton.next_power_of_2(rows)), columns, elements // columns, 4, stages)


def linear_launch(
    x: Tensor, weight: Tensor, skip: Tensor, bias: Tensor | None, out: Tensor, arch: int, processors: int
) -> Launch:
    """The launch that writes the result to `out`.

    Args:
        x, weight, skip, bias: operands that fit each other.
        out: [B, S, N], contiguous and not empty.
        arch: of the device, such as 90.
        processors: how many it has.
    Raises:
        Unsupported: there is no kernel for the dtype, the device or so large a weight.
    """
    if x.dtype not in DTYPES:
        raise Unsupported(f"a Triton kernel for linear layers in {x.dtype}", hint="Use float16, bfloat16 or float32.")
    if arch < OLDEST:
        raise Unsupported(f"Triton kernels for devices of sm_{arch}", hint=f"They need sm_{OLDEST} or later.")
    if max(*weight.shape, *weight.stride()) * WIDEST >= REACH:
        raise Unsupported(f"a Triton kernel for a weight {tuple(weight.shape)} with strides {weight.stride()}")
    rows, columns = skip.numel(), weight.shape[0]
    tile = tile_of(rows, weight, arch, processors)
    return Launch(
        multiply_rows,
        (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),),
        {
            "x": x.contiguous(), "weight": weight, "skip": skip.contiguous(),
            "bias": None if bias is None else bias.contiguous(), "out": out, "rows": rows, "columns": columns,
            "width": x.shape[-1], "column_stride": weight.stride(0), "width_stride": weight.stride(1),
        },
        {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth},
        tile.warps,
        tile.stages,
    )  # fmt: skip


@predicated_linear.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, skip: Tensor, bias: Tensor | None = None) -> Tensor:
    check_operands(x, weight, skip, bias)
    properties = torch.cuda.get_device_properties(x.device)
    out = x.new_empty(*x.shape[:2], weight.shape[0])
    if out.numel():
        arch = properties.major * 10 + properties.minor
        linear_launch(x, weight, skip, bias, out, arch, properties.multi_processor_count)()
    return out


@triton.jit
def multiply_rows(
    x, weight, skip, bias, out, rows, columns, width, column_stride, width_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the result [rows, columns] of x [rows, width] and a weight [columns, width] with any strides."""
    tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    # Programs that run at the same time share rows and columns: eight tiles of rows go together.
    number = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(number // tiles[1], number % tiles[1], tiles[0], tiles[1], 8)
    # Only where a tile begins takes 64 bits.
    first_row, first_column = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    present, valid = row < rows - first_row, column < columns - first_column
    skipped = tl.load(skip + first_row + row, mask=present, other=True).to(tl.int1)
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.min(skipped.to(tl.int32), axis=0) == 0:
        x_tile = x + first_row * width
        weight_tile = weight + first_column * column_stride
        for start in range(0, width, BLOCK_K):
            depth = tl.arange(0, BLOCK_K)
            inside = depth < width - start
            a = tl.load(
                x_tile + start + row[:, None] * width + depth[None, :],
                mask=(skipped == 0)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(
                weight_tile + tl.cast(start, tl.int64) * width_stride
                + column[None, :] * column_stride + depth[:, None] * width_stride,
                mask=valid[None, :] & inside[:, None], other=0.0,
            )  # fmt: skip
            result = multiply(a, b, result)
        if bias is not None:
            result += tl.load(bias + first_column + column, mask=valid, other=0.0).to(tl.float32)[None, :]
        result = tl.where(skipped[:, None], 0.0, result)
    target = out + first_row * columns + first_column
    tl.store(
        target + row[:, None] * columns + column[None, :], result.to(out.dtype.element_ty),
        mask=present[:, None] & valid[None, :],
    )  # fmt: skip
