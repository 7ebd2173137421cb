"""Tiles of a cached key or value: how a block of tokens becomes an operand of a matrix product.

A cache is a tuple of buffers, the parts of its format in order; a buffer is ``(pointer, stride of the batch, stride of
the head, stride of the row)``, its elements side by side. Codes are read as words of 16 bits, which hold two or four
channels: words go from shared memory to the threads that need them as numbers of 16 bits do, and become operands there.
Bringing the channels together again would move every element between threads, so a tile comes in pieces: piece p of n
has the channels p, p + n, p + 2 n and so on, and whoever multiplies with it does the same with the other operand.

Scales that all channels of a token share, or all tokens of a channel, are not applied to the tile: whoever multiplies
with it applies them to the smaller side. See `token_scaled` and `load_static`.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
from __future__ import annotations

import triton
import triton.language as tl

from skipstone.kernels.decoding import (
    decode_e2m1,
    decode_e4m3,
    decode_e4m3_pairs,
    decode_e8m0,
    decode_int4,
    decode_int8,
    decode_uint4,
    opaque,
)
from skipstone.kernels.overlap import ask_for

LINE = tl.constexpr(128)
"""Bytes of a line of the caches."""

FORMATS = ("full", "int8_channel", "int8_token", "fp8_token", "int4_channel", "int4_group", "nvfp4", "mxfp4")


@triton.constexpr_function
def pieces(form, align):
    """How many pieces a tile comes in; `align` is what divides the addresses of the rows of each buffer."""
    if form == "full":
        return 1
    if form in ("int4_group", "nvfp4", "mxfp4"):
        return 2
    words = align[0] % 2 == 0
    return (4 if words else 2) if form == "int4_channel" else (2 if words else 1)


@triton.constexpr_function
def token_scaled(form):
    """Whether the scale of a token stands outside its tile."""
    return form in ("int8_token", "fp8_token", "mxfp4")


@triton.constexpr_function
def static_scaled(form):
    """Whether a scale per channel or head that belongs to no token stands outside the tile."""
    return form in ("int8_channel", "int4_channel", "nvfp4")


@triton.constexpr_function
def columns(width, parts):
    """Columns of each of the pieces of a tile for a head size: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(-(-width // parts)))


@triton.jit
def channels(width: tl.constexpr, parts: tl.constexpr, part: tl.constexpr):
    """Channel of each column of a piece of a tile, int32 [columns(width, parts)]."""
    return tl.arange(0, columns(width, parts)) * parts + part


@triton.jit
def buffer_start(buffer, batch, head):
    """Pointer to the first row of one head of one sequence; batch and head are int64."""
    return buffer[0] + batch * buffer[1] + head * buffer[2]


@triton.jit
def row_pointers(buffer, batch, head, first, rows: tl.constexpr, aligned: tl.constexpr):
    """Pointers to the rows ``first .. first + rows - 1`` of one head of one sequence, all multiples of `aligned`."""
    # Only where the tile begins takes 64 bits, and that once, not for every thread.
    start = buffer_start(buffer, batch, head) + first * buffer[3]
    return tl.multiple_of(start + tl.arange(0, rows) * buffer[3], aligned)


@triton.constexpr_function
def row_elements(form, width):
    """Elements of a row of codes: bytes where two channels share one."""
    return -(-width // 2) if form in ("int4_channel", "int4_group", "nvfp4", "mxfp4") else width


@triton.jit
def ask_for_rows(cache, batch, head, row, present, form: tl.constexpr, width: tl.constexpr, PARTS: tl.constexpr):
    """`ask_for` the rows [N] of one head of one sequence, and for what stands beside their codes."""
    for part in tl.static_range(PARTS):
        _ask_for_rows(cache[part], batch, head, row, present, row_elements(form, width) if part == 0 else 1)


@triton.jit
def _ask_for_rows(buffer, batch, head, row, present, ELEMENTS: tl.constexpr):
    start = buffer_start(buffer, batch, head) + row.to(tl.int64) * buffer[3]
    each: tl.constexpr = LINE * 8 // start.dtype.element_ty.primitive_bitwidth
    for first in tl.static_range(0, ELEMENTS, each):
        ask_for(start + first, present)


@triton.jit
def down(x, TRANSPOSED: tl.constexpr):
    """A vector as one column of a matrix; as one row of the transposed matrix."""
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def across(x, TRANSPOSED: tl.constexpr):
    """A vector as one row of a matrix; as one column of the transposed matrix."""
    return x[:, None] if TRANSPOSED else x[None, :]


@triton.jit
def load_grid(rows, present, column, inside, TRANSPOSED: tl.constexpr):
    """Elements [N, columns] from pointers to rows [N], and 0 those that are not `present` and `inside`.

    If TRANSPOSED, they are [columns, N] from the start: Triton then reads shared memory the other way, while it would
    move elements between threads to transpose what was decoded.
    """
    mask = down(present, TRANSPOSED) & across(inside, TRANSPOSED)
    return tl.load(down(rows, TRANSPOSED) + across(column, TRANSPOSED), mask=mask, other=0)


@triton.jit
def load_channels(
    rows, present, width: tl.constexpr, parts: tl.constexpr, part: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """A piece of a tile from pointers to rows [N]; 0 beyond `width` and where a row is not `present`."""
    channel = channels(width, parts, part)
    return load_grid(rows, present, channel, channel < width, TRANSPOSED)


@triton.jit
def load_static(static, head, form: tl.constexpr, width: tl.constexpr, parts: tl.constexpr, part: tl.constexpr):
    """float32 factor of each column of a piece: the static tensor [KH, D] or [KH, 1] of the format."""
    channel = channels(width, parts, part)
    if form == "nvfp4":
        # The 2^14 that `decode_e2m1` leaves out is applied here, where it cannot overflow.
        return tl.load(static + head + channel * 0) * 16384.0
    return tl.load(static + head * width + channel, mask=channel < width, other=0.0)


@triton.jit
def load_tile(
    cache, batch, head, first, tokens: tl.constexpr, present, form: tl.constexpr, group: tl.constexpr,
    align: tl.constexpr, width: tl.constexpr, dtype: tl.constexpr, arch: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Tokens of a cache as operands of type `dtype`.

    Args:
        cache: the buffers.
        batch, head, first: int64.
        tokens: the rows ``first .. first + tokens - 1``; N is `tokens`.
        present: which of them to read, bool [N]; the others become something finite.
        form, group: base name of the format, and how many channels share a scale.
        align: what divides the addresses of the rows of each buffer.
        width: head size.
        arch: see `skipstone.kernels.decoding`.
    Returns:
        the `pieces` [N, columns], or [columns, N] if TRANSPOSED; and the scale of each token, float32 [N], or 1 where
        the format has none.
    """
    parts: tl.constexpr = pieces(form, align)
    codes = row_pointers(cache[0], batch, head, first, tokens, align[0])
    token = 1.0
    if token_scaled(form) and form != "mxfp4":
        token = tl.load(row_pointers(cache[1], batch, head, first, tokens, align[1]), mask=present, other=0.0)
    if form == "full":
        tile = (load_channels(codes, present, width, 1, 0, TRANSPOSED).to(dtype),)
    elif form == "int4_channel":
        if parts == 4:
            words = load_codes(codes.to(tl.pointer_type(tl.int16), bitcast=True), present, width, parts, TRANSPOSED)
            first, second, third, fourth = decode_int4(words, arch)
            tile = (first.to(dtype), second.to(dtype), third.to(dtype), fourth.to(dtype))
        else:
            first, second, third, fourth = decode_int4(
                load_codes(codes, present, width, parts, TRANSPOSED).to(tl.int16), 0
            )
            tile = (first.to(dtype), second.to(dtype))
    elif form == "int8_channel" or form == "int8_token" or form == "fp8_token":
        if parts == 2:
            words = load_codes(codes.to(tl.pointer_type(tl.int16), bitcast=True), present, width, parts, TRANSPOSED)
            if form == "fp8_token":
                first, second = decode_e4m3_pairs(words, arch)
            else:
                first, second = decode_int8(words, arch)
            tile = (first.to(dtype), second.to(dtype))
        else:
            code = load_codes(codes, present, width, parts, TRANSPOSED)
            code = decode_e4m3(code, arch) if form == "fp8_token" else code.to(tl.float16)
            tile = (code.to(dtype),)
    else:
        pairs_per_group: tl.constexpr = group // 2
        groups: tl.constexpr = columns(width, 2) // pairs_per_group
        shape: tl.constexpr = (tokens, columns(width, 2))
        # The shape with groups is for the scales; threads read rows as they lie in memory.
        pairs = tl.reshape(load_codes(codes, present, width, 2, False), (tokens, groups, pairs_per_group))
        even, odd, token = _decode_groups(
            cache, pairs, batch, head, first, tokens, present, tl.arange(0, groups), form, group, align, width, dtype,
            arch,
        )  # fmt: skip
        even, odd = tl.reshape(even, shape), tl.reshape(odd, shape)
        tile = (tl.trans(even), tl.trans(odd)) if TRANSPOSED else (even, odd)
    return tile, token


@triton.jit
def load_codes(rows, present, width: tl.constexpr, parts: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Codes [N, columns] of `parts` channels each, from pointers to rows [N]; as `load_grid`."""
    column = tl.arange(0, columns(width, parts))
    return load_grid(rows, present, column, column < (width + parts - 1) // parts, TRANSPOSED)


@triton.jit
def _decode_groups(
    cache, pairs, batch, head, first, tokens: tl.constexpr, present, number, form: tl.constexpr, group: tl.constexpr,
    align: tl.constexpr, width: tl.constexpr, dtype: tl.constexpr, arch: tl.constexpr,
):  # fmt: skip
    """Even and odd channels, and scale of the token, of packed bytes [N, groups, bytes a group]."""
    token = 1.0
    number = number[None, :]
    complete = present[:, None] & (number < width // group)
    factor = tl.load(
        row_pointers(cache[1], batch, head, first, tokens, align[1])[:, None] + number, mask=complete, other=0
    )
    if form == "int4_group":
        even, odd = decode_uint4(pairs, arch)
        shift = tl.load(
            row_pointers(cache[2], batch, head, first, tokens, align[2])[:, None] + number, mask=complete, other=0
        )
        factor, shift = factor.to(dtype)[:, :, None], shift.to(dtype)[:, :, None]
        even, odd = tl.fma(even.to(dtype), factor, shift), tl.fma(odd.to(dtype), factor, shift)
    else:
        if form == "nvfp4":
            # An element times its block scale is exact in float16, up to the 2^-14 of `decode_e2m1` as well.
            factor = decode_e4m3(factor, arch)
        else:
            token, factor = _relative_exponents(factor, arch)
        even, odd = decode_e2m1(pairs, arch)
        factor = factor.to(dtype)[:, :, None]
        even, odd = even.to(dtype) * factor, odd.to(dtype) * factor
    return even, odd, token


@triton.jit
def _relative_exponents(code, arch: tl.constexpr):
    """MXFP4 block scales [N, G] as their largest, float32 [N], and float16 [N, G] multiples of it.

    A power of two of 8 bits of exponent does not fit float16; relative to the largest of its token it does: what is too
    small then is too small beside the others. The multiples contain the 2^14 that `decode_e2m1` leaves out.
    """
    code = opaque(code.to(tl.int32), arch)
    known = tl.where(code == 255, 0, code)
    largest = tl.max(known, axis=1)
    exponent = tl.maximum(known - largest[:, None] + 14 + 15, 0)
    bits = tl.where(code == 255, 0x7E00, exponent << 10)
    return decode_e8m0(largest), bits.to(tl.int16).to(tl.float16, bitcast=True)
