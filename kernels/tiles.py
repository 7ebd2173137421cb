"""Tiles of a cached key or value: how a block of tokens becomes an operand of a matrix product.

A cache is a tuple of buffers, the parts of its format in order; a buffer is ``(pointer, stride of the batch, stride of
the head, stride of the row)``, its elements side by side. Formats of 4 bits hold two channels to a byte, an even and an
odd one. Bringing them together again would move every element between threads, so a tile of such a format is two: its
even channels and its odd ones, and whoever multiplies with it does the same with the other operand.

Scales that all channels of a token share, or all tokens of a channel, are not applied to the tile: whoever multiplies
with it applies them to the smaller side. See `token_scaled` and `load_static`.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from skipstone.kernels.decoding import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    decode_int4,
    decode_int8,
    decode_uint4,
    opaque,
)

FORMATS = ("full", "int8_channel", "int8_token", "fp8_token", "int4_channel", "int4_group", "nvfp4", "mxfp4")


@triton.constexpr_function
def packed(form):
    """Whether a byte holds two channels."""
    return form in ("int4_channel", "int4_group", "nvfp4", "mxfp4")


@triton.constexpr_function
def token_scaled(form):
    """Whether the scale of a token stands outside its tile."""
    return form in ("int8_token", "fp8_token", "mxfp4")


@triton.constexpr_function
def static_scaled(form):
    """Whether a scale per channel or head that belongs to no token stands outside the tile."""
    return form in ("int8_channel", "int4_channel", "nvfp4")


@triton.constexpr_function
def half(width, split):
    """Columns of a tile for a head size: a power of two that tensor cores take. Half the channels when split."""
    return max(16, triton.next_power_of_2(-(-width // 2) if split else width))


@triton.jit
def channels(width: tl.constexpr, split: tl.constexpr, odd: tl.constexpr):
    """Channel of each column of a tile, int32 [half(width, split)]."""
    columns = tl.arange(0, half(width, split))
    return columns * 2 + odd if split else columns


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


@triton.jit
def load_channels(rows, present, width: tl.constexpr, split: tl.constexpr, odd: tl.constexpr):
    """The channels of one tile from pointers to rows [N]; 0 beyond `width` and where a row is not `present`."""
    channel = channels(width, split, odd)
    return tl.load(rows[:, None] + channel[None, :], mask=present[:, None] & (channel < width)[None, :], other=0)


@triton.jit
def load_static(static, head, form: tl.constexpr, width: tl.constexpr, split: tl.constexpr, odd: tl.constexpr):
    """float32 factor of each column of a tile: the static tensor [KH, D] or [KH, 1] of the format."""
    channel = channels(width, split, odd)
    if form == "nvfp4":
        # The 2^14 that `decode_e2m1` leaves out is applied here, where it cannot overflow.
        return tl.load(static + head + channel * 0) * 16384.0
    return tl.load(static + head * width + channel, mask=channel < width, other=0.0)


@triton.jit
def load_tile(
    cache, batch, head, first, tokens: tl.constexpr, present, form: tl.constexpr, group: tl.constexpr,
    align: tl.constexpr, width: tl.constexpr, dtype: tl.constexpr, arch: tl.constexpr,
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
        [N, half] with all channels, or with the even ones of a packed format; the same with the odd ones, or with all
        again; and the scale of each token, float32 [N], or 1 where the format has none.
    """
    codes = row_pointers(cache[0], batch, head, first, tokens, align[0])
    if packed(form):
        pairs_per_group: tl.constexpr = half(width, True) if form == "int4_channel" else group // 2
        groups: tl.constexpr = half(width, True) // pairs_per_group
        shape: tl.constexpr = (tokens, groups * pairs_per_group)
        number = tl.arange(0, groups)
        column = number[:, None] * pairs_per_group + tl.arange(0, pairs_per_group)[None, :]
        inside = present[:, None, None] & (column < (width + 1) // 2)[None, :, :]
        pairs = tl.load(codes[:, None, None] + column[None, :, :], mask=inside, other=0)
        even, odd, token = _decode_groups(
            cache, pairs, batch, head, first, tokens, present, number, form, group, align, width, dtype, arch
        )
        even, odd = tl.reshape(even, shape), tl.reshape(odd, shape)
    else:
        even = load_channels(codes, present, width, False, 0)
        token = 1.0
        if token_scaled(form):
            token = tl.load(row_pointers(cache[1], batch, head, first, tokens, align[1]), mask=present, other=0.0)
        if form == "fp8_token":
            even = decode_e4m3(even, arch)
        elif form != "full":
            even = decode_int8(even, arch)
        even = even.to(dtype)
        odd = even
    return even, odd, token


@triton.jit
def _decode_groups(
    cache, pairs, batch, head, first, tokens: tl.constexpr, present, number, form: tl.constexpr, group: tl.constexpr,
    align: tl.constexpr, width: tl.constexpr, dtype: tl.constexpr, arch: tl.constexpr,
):  # fmt: skip
    """Even and odd channels, and scale of the token, of packed bytes [N, groups, bytes a group]."""
    token = 1.0
    number = number[None, :]
    complete = present[:, None] & (number < width // group) if form != "int4_channel" else present
    if form == "int4_channel":
        even, odd = decode_int4(pairs, arch)
        even, odd = even.to(dtype), odd.to(dtype)
    elif form == "int4_group":
        even, odd = decode_uint4(pairs, arch)
        factor = tl.load(
            row_pointers(cache[1], batch, head, first, tokens, align[1])[:, None] + number, mask=complete, other=0
        )
        shift = tl.load(
            row_pointers(cache[2], batch, head, first, tokens, align[2])[:, None] + number, mask=complete, other=0
        )
        factor, shift = factor.to(dtype)[:, :, None], shift.to(dtype)[:, :, None]
        even, odd = even.to(dtype) * factor + shift, odd.to(dtype) * factor + shift
    else:
        factor = tl.load(
            row_pointers(cache[1], batch, head, first, tokens, align[1])[:, None] + number, mask=complete, other=0
        )
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
