"""`skipstone::row_linear` on CUDA devices: a program multiplies few columns of the weights with all rows.

What limits it is memory, and the time between one kernel and the next. On sm_90 and later a program therefore begins
while the kernel before is still running (programmatic dependent launch): it asks for its part of the weights first, and
waits for the rows then.
"""

# Triton unrolls loops over rows, in which tuples grow, and knows no starred elements.
# mypy: allow-untyped-defs, disable-error-code=assignment
# ruff: noqa: RUF005
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipstone.ir.errors import Unsupported
from skipstone.ir.row_linear import MOST_ROWS, check_operands, columns, row_linear
from skipstone.kernels.launch import FIRST_TO_OVERLAP, PROCESSOR_REGISTERS, REGISTERS, Launch
from skipstone.kernels.overlap import begin_early, wait_for_kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = 80
BLOCK = 8
"""Most columns of a program."""
DEEPEST = 8192
"""Elements of a row that a program multiplies at a time."""
FEWEST_REGISTERS = 96
"""Of a thread, for its elements of two weights."""
REACH = 2**31
"""Elements that a tile may span: within it, offsets have 32 bits."""


@dataclass(frozen=True)
class Tile:
    """What a program multiplies.

    Attributes:
        columns: of each weight.
        depth: elements of each row at a time.
        warps: threads / 32.
        registers: that a thread may use.
    """

    columns: int
    depth: int
    warps: int
    registers: int


def tile_of(rows: int, total: int, width: int, is_gated: bool, dtype: torch.dtype, processors: int) -> Tile:
    """The tile for results of `total` columns, of all lanes together.

    A thread has 64 elements of a weight at most, in 16-byte loads that are all under way at once; 32 where the sums of
    many rows take registers, too. Narrow results have fewer columns a program, so that every processor has two. Gated
    ones have two weights, and half the columns. All programs run at a time, if there are registers enough.
    """
    depth = min(triton.next_power_of_2(width), DEEPEST)
    columns = max(2, min(BLOCK // 2 if is_gated else BLOCK, DEEPEST // depth))
    while columns > 1 and triton.cdiv(total, columns) < 2 * processors:
        columns //= 2
    elements, most = (64, 4) if rows <= 2 else (32, 8)
    warps = max(1, min(most, columns * depth // (32 * elements)))
    if rows > 2 or dtype == torch.float32:
        return Tile(columns, depth, warps, REGISTERS)
    at_a_time = triton.cdiv(triton.cdiv(total, columns), processors)
    registers = PROCESSOR_REGISTERS // (32 * warps * at_a_time) // 8 * 8
    return Tile(columns, depth, warps, min(registers, REGISTERS) if registers >= FEWEST_REGISTERS else 128)


def row_launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gain: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    head_sizes: Sequence[int] | None,
    eps: float | None,
    offset: float,
    activation: str,
    is_gated: bool,
    arch: int,
    processors: int,
) -> Launch:
    """The launch that writes the result to `out`.

    Args:
        x, weights, biases, gain, residual, skip, cos, sin: operands that fit each other.
        out: [L, R, F], contiguous and not empty.
        head_sizes, eps, offset, activation, is_gated: see `skipstone.ir.row_linear.row_linear`.
        arch: of the device, such as 90; 0 for Triton's interpreter.
        processors: how many it has.
    Raises:
        Unsupported: there is no kernel for the dtype, the device, so many rows or such weights.
    """
    lanes, rows, width = weights[0].shape[0], x.shape[1], x.shape[2]
    if x.dtype not in DTYPES:
        raise Unsupported(f"a Triton kernel for linear layers in {x.dtype}", hint="Use float16, bfloat16 or float32.")
    if 0 < arch < OLDEST:
        raise Unsupported(f"Triton kernels for devices of sm_{arch}", hint=f"They need sm_{OLDEST} or later.")
    if rows > MOST_ROWS:
        raise Unsupported(f"a kernel of row_linear for {rows} rows", hint=f"At most {MOST_ROWS}: use linear layers.")
    for weight in weights:
        if weight.stride(2) != 1 or weight.stride(1) * BLOCK >= REACH:
            raise Unsupported(f"a kernel of row_linear for a weight {tuple(weight.shape)} of strides {weight.stride()}")
    parts = [weights[0].shape[1]] if is_gated else [weight.shape[1] for weight in weights]
    heads = [*head_sizes] if head_sizes else [0] * len(parts)
    # A program has both columns of a pair that is rotated.
    pairs = [part // 2 if size else part for part, size in zip(parts, heads, strict=True)]
    tile = tile_of(rows, lanes * sum(pairs), width, is_gated, x.dtype, processors)
    block = math.gcd(tile.columns, *(size // 2 for size in heads))
    return Launch(
        multiply_few_rows,
        (sum(triton.cdiv(each, block) for each in pairs), lanes),
        {
            "x": x.contiguous(), "weights": tuple(weights),
            "biases": tuple(None if bias is None else bias.contiguous() for bias in biases),
            "gain": None if gain is None else gain.contiguous(),
            "residual": None if residual is None else residual.contiguous(),
            "skip": None if skip is None else skip.contiguous(),
            "cos": None if cos is None else cos.contiguous(), "sin": None if sin is None else sin.contiguous(),
            "out": out,
            "eps": 0.0 if eps is None else eps, "offset": offset,
        },
        {
            "PARTS": tuple(parts), "HEADS": tuple(heads), "LANES": tuple(weight.stride(0) for weight in weights),
            "STRIDES": tuple(weight.stride(1) for weight in weights), "WIDTH": width,
            "SHARED": tuple(each is None or each.shape[0] < lanes for each in (x, gain, residual)),
            "ROWS": rows, "BLOCK_N": block, "BLOCK_K": tile.depth, "NORM": eps is not None, "ACTIVATION": activation,
            "GATED": is_gated, "OVERLAP": arch >= FIRST_TO_OVERLAP,
        },
        tile.warps,
        registers=tile.registers,
        overlaps=arch >= FIRST_TO_OVERLAP,
    )  # fmt: skip


@row_linear.register_kernel("cuda")
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gain: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    head_sizes: Sequence[int] | None = None,
    eps: float | None = None,
    offset: float = 0.0,
    activation: str = "none",
    is_gated: bool = False,
) -> Tensor:
    check_operands(x, weights, biases, gain, residual, skip, cos, sin, head_sizes, activation, is_gated)
    properties = torch.cuda.get_device_properties(x.device)
    out = x.new_empty(weights[0].shape[0], x.shape[1], columns(weights, is_gated))
    if out.numel():
        arch = properties.major * 10 + properties.minor
        row_launch(
            x, weights, biases, gain, residual, skip, cos, sin, out, head_sizes, eps, offset, activation, is_gated,
            arch, properties.multi_processor_count,
        )()  # fmt: skip
    return out


@triton.jit
def multiply_few_rows(
    x, weights, biases, gain, residual, skip, cos, sin, out, eps, offset,
    PARTS: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr, STRIDES: tl.constexpr, WIDTH: tl.constexpr,
    SHARED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of a lane of the result [L, ROWS, sum of PARTS] of x [L, ROWS, WIDTH] and weights of the strides.

    SHARED says whether the lanes of x, the gain and the residual are one, HEADS which size heads have that are rotated.

    With OVERLAP, weights, biases and the gain are read before the kernels that were launched before are done, unless
    rows may skip: then it is the decisions that are read first.
    """
    begin_early(OVERLAP)
    number, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total: tl.constexpr = _sum(PARTS)
    out += lane * (ROWS * total)
    if not SHARED[0]:
        x += lane * (ROWS * WIDTH)
    if not SHARED[1]:
        gain += lane * WIDTH
    if not SHARED[2]:
        residual += lane * (ROWS * total)
    if GATED:
        _multiply_or_skip(
            x, weights[0] + lane * LANES[0], biases[0], weights[1] + lane * LANES[1], biases[1], gain, residual, skip,
            None, None, out, eps, offset, lane, number, 0, PARTS[0], total, 0, STRIDES[0], STRIDES[1], WIDTH, ROWS,
            BLOCK_N, BLOCK_K, NORM, ACTIVATION, GATED, OVERLAP,
        )  # fmt: skip
    else:
        # Which weight it is follows from the number of the program; each has code of its own.
        for part in tl.static_range(len(PARTS)):
            first = _blocks(PARTS, HEADS, part, BLOCK_N)
            if (number >= first) & (number < _blocks(PARTS, HEADS, part + 1, BLOCK_N)):
                weight = weights[part] + lane * LANES[part]
                _multiply_or_skip(
                    x, weight, biases[part], weight, biases[part], gain, residual, skip, cos, sin, out, eps, offset,
                    lane, number - first, _sum(PARTS, part), PARTS[part], total, HEADS[part], STRIDES[part],
                    STRIDES[part], WIDTH, ROWS, BLOCK_N, BLOCK_K, NORM, ACTIVATION, GATED, OVERLAP,
                )  # fmt: skip


@triton.constexpr_function
def _sum(parts, count=None):
    return sum(parts if count is None else parts[:count])


@triton.constexpr_function
def _blocks(parts, heads, count, block):
    """Programs of the first parts: pairs of columns that are rotated count once."""
    return sum(((part // 2 if heads[i] else part) + block - 1) // block for i, part in enumerate(parts[:count]))


@triton.jit
def _multiply_or_skip(
    x, weight, bias, other, other_bias, gain, residual, skip, cos, sin, out, eps, offset, lane, block, before,
    COLUMNS: tl.constexpr, TOTAL: tl.constexpr, HEAD: tl.constexpr, STRIDE: tl.constexpr, OTHER_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`_multiply`, unless all rows skip."""
    is_needed = True
    if skip is not None:
        wait_for_kernels(OVERLAP)
        skipping = 0
        for row in tl.static_range(ROWS):
            skipping += tl.load(skip + row).to(tl.int32)
        is_needed = skipping < ROWS
    if is_needed:
        _multiply(
            x, weight, bias, other, other_bias, gain, residual, skip, cos, sin, out, eps, offset, lane, block, before,
            COLUMNS, TOTAL, HEAD, STRIDE, OTHER_STRIDE, WIDTH, ROWS, BLOCK_N, BLOCK_K, NORM, ACTIVATION, GATED, OVERLAP,
        )  # fmt: skip
    else:
        column = _first_column(block, HEAD, BLOCK_N) + tl.arange(0, BLOCK_N)
        present = column < COLUMNS
        for row in tl.static_range(ROWS):
            place = row * TOTAL + before + column
            if residual is None:
                tl.store(out + place, tl.zeros((BLOCK_N,), out.dtype.element_ty), mask=present)
                if HEAD > 0:
                    tl.store(out + place + HEAD // 2, tl.zeros((BLOCK_N,), out.dtype.element_ty), mask=present)
            else:
                tl.store(out + place, tl.load(residual + place, present, 0.0), mask=present)


@triton.jit
def _multiply(
    x, weight, bias, other, other_bias, gain, residual, skip, cos, sin, out, eps, offset, lane, block, before,
    COLUMNS: tl.constexpr, TOTAL: tl.constexpr, HEAD: tl.constexpr, STRIDE: tl.constexpr, OTHER_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block of columns of one weight, whose results stand behind `before` others; of the lane but for biases.

    Columns have others that they are multiplied with, the same ones of the other weight, or rotated with, half a head
    further on.
    """
    begin = _first_column(block, HEAD, BLOCK_N)
    column = begin + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    present = column < COLUMNS
    half: tl.constexpr = HEAD // 2
    paired: tl.constexpr = GATED or HEAD > 0
    # Only where a tile begins takes 64 bits.
    weight += tl.cast(begin, tl.int64) * STRIDE
    tile = _tile(weight, depth, present, BLOCK_N, STRIDE, WIDTH)
    shift = _vector(bias, lane * COLUMNS + column, present)
    if paired:
        other += tl.cast(begin + half, tl.int64) * OTHER_STRIDE
        other_tile = _tile(other, depth, present, BLOCK_N, OTHER_STRIDE, WIDTH)
        other_shift = _vector(other_bias, lane * COLUMNS + column + half, present)
    factor = _factor(gain, offset, depth, WIDTH, NORM)
    wait_for_kernels(OVERLAP)
    # What is needed at last is asked for first, and a norm divides the sums: nothing waits twice.
    added, cosines, sines, other_cosines, other_sines, skipped = (), (), (), (), (), ()
    for row in tl.static_range(ROWS):
        added = added + (_vector(residual, row * TOTAL + before + column, present),)
        angle = row * HEAD + column % HEAD if HEAD > 0 else column
        cosines, sines = cosines + (_vector(cos, angle, present),), sines + (_vector(sin, angle, present),)
        other_cosines = other_cosines + (_vector(cos, angle + half, present),)
        other_sines = other_sines + (_vector(sin, angle + half, present),)
        skipped = skipped + (False if skip is None else tl.load(skip + row),)
    zeros = tl.zeros((BLOCK_N,), tl.float32)
    sums, other_sums, squares = (), (), ()
    for _ in tl.static_range(ROWS):
        sums, other_sums, squares = sums + (zeros,), other_sums + (zeros,), squares + (0.0,)
    for start in tl.static_range(0, WIDTH, BLOCK_K):
        if start > 0:
            depth = start + tl.arange(0, BLOCK_K)
            tile = _tile(weight, depth, present, BLOCK_N, STRIDE, WIDTH)
            if paired:
                other_tile = _tile(other, depth, present, BLOCK_N, OTHER_STRIDE, WIDTH)
            factor = _factor(gain, offset, depth, WIDTH, NORM)
        grown, other_grown, squares_grown = (), (), ()
        for row in tl.static_range(ROWS):
            values = tl.load(x + row * WIDTH + depth, depth < WIDTH, 0.0).to(tl.float32)
            if NORM:
                squares_grown = squares_grown + (squares[row] + tl.sum(values * values, axis=0),)
                values = values * factor
            grown = grown + (sums[row] + tl.sum(tile.to(tl.float32) * values[None, :], axis=1),)
            if paired:
                other_grown = other_grown + (
                    other_sums[row] + tl.sum(other_tile.to(tl.float32) * values[None, :], axis=1),
                )
        sums = grown
        if paired:
            other_sums = other_grown
        if NORM:
            squares = squares_grown
    for row in tl.static_range(ROWS):
        scale = tl.rsqrt(squares[row] / WIDTH + eps) if NORM else 1.0
        result = _activate(sums[row] * scale + shift, ACTIVATION)
        place = row * TOTAL + before + column
        if paired:
            second = other_sums[row] * scale + other_shift
            if GATED:
                result *= second
            else:
                turned = second * other_cosines[row] + result * other_sines[row]
                result = result * cosines[row] - second * sines[row]
                if skip is not None:
                    turned = tl.where(skipped[row], 0.0, turned)
                tl.store(out + place + half, turned.to(out.dtype.element_ty), mask=present)
        if skip is not None:
            result = tl.where(skipped[row], 0.0, result)
        tl.store(out + place, (result + added[row]).to(out.dtype.element_ty), mask=present)


@triton.jit
def _first_column(block, HEAD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a block begins: the blocks of a weight whose heads are rotated lie in their first halves."""
    begin = block * BLOCK_N
    if HEAD > 0:
        begin = begin // (HEAD // 2) * HEAD + begin % (HEAD // 2)
    return begin


@triton.jit
def _tile(weight, depth, present, BLOCK_N: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.arange(0, BLOCK_N)[:, None] * STRIDE + depth[None, :]
    return tl.load(weight + place, present[:, None] & (depth < WIDTH)[None, :], 0.0)


@triton.jit
def _vector(pointer, place, present):
    return 0.0 if pointer is None else tl.load(pointer + place, present, 0.0).to(tl.float32)


@triton.jit
def _factor(gain, offset, depth, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """The gain of a norm."""
    return 1.0 if gain is None or not NORM else tl.load(gain + depth, depth < WIDTH, 0.0).to(tl.float32) + offset


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu_squared":
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x
