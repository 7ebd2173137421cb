"""Encoding of new tokens into a quantized cache, bit for bit as `skipstone.ir.formats` does it."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from skipstone.kernels.call import Call
from skipstone.kernels.decoding import decode_e4m3, decode_e8m0
from skipstone.kernels.encoding import (
    divide,
    encode_e2m1,
    encode_e4m3,
    encode_integer,
    encode_mx_exponent,
    is_finite,
)
from skipstone.kernels.launch import Launch, buffer
from skipstone.kernels.overlap import begin_early, wait_for_kernels
from skipstone.kernels.tiles import buffer_start, channels, columns


def append(call: Call) -> Launch:
    """Write the new keys and values to the codes and scales of the cache."""
    return Launch(
        append_rows,
        (call.k.shape[2], call.kv_heads, call.batch),
        {
            "k_new": buffer(call.k),
            "v_new": buffer(call.v),
            "keys": tuple(map(buffer, call.k_cache)),
            "values": tuple(map(buffer, call.v_cache)),
            "k_static": call.k_static,
            "v_static": call.v_static,
            "start": call.start,
            "count": call.count,
            "capacity": call.capacity,
        },
        {**call.formats("FORM", "GROUP", "WIDTH"), "OVERLAP": call.overlaps},
        warps=1,
        overlaps=call.overlaps,
    )


def keep(call: Call) -> Launch:
    """Write the new keys and values to the rows in full precision, once attention has read the old ones."""
    _, first, ring = call.exact
    return Launch(
        keep_rows,
        (call.k.shape[2], call.kv_heads, call.batch),
        {
            "k_new": buffer(call.k),
            "v_new": buffer(call.v),
            "keys": tuple(map(buffer, call.k_cache)),
            "values": tuple(map(buffer, call.v_cache)),
            "start": call.start,
            "count": call.count,
        },
        {**call.formats("FORM", "PARTS", "WIDTH"), "FIRST": first, "RING": ring, "OVERLAP": call.overlaps},
        warps=1,
        overlaps=call.overlaps,
    )


@triton.jit
def append_rows(
    k_new, v_new, keys, values, k_static, v_static, start, count, capacity,
    K_FORM: tl.constexpr, K_GROUP: tl.constexpr, K_WIDTH: tl.constexpr,
    V_FORM: tl.constexpr, V_GROUP: tl.constexpr, V_WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write one token of one head: key and value, from buffers [B, KH, S, D] to the caches' row ``start + token``."""
    begin_early(OVERLAP)
    wait_for_kernels(OVERLAP)
    token, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.load(start + batch) + token
    valid = tl.num_programs(0) if count is None else tl.load(count + batch)
    append_row(
        k_new, v_new, keys, values, k_static, v_static, batch, head, token, row, (token < valid) & (row < capacity),
        K_FORM, K_GROUP, K_WIDTH, V_FORM, V_GROUP, V_WIDTH,
    )  # fmt: skip


@triton.jit
def append_row(
    k_new, v_new, keys, values, k_static, v_static, batch, head, token, row, present,
    K_FORM: tl.constexpr, K_GROUP: tl.constexpr, K_WIDTH: tl.constexpr,
    V_FORM: tl.constexpr, V_GROUP: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write key and value of one token of one head to a row of the caches, if it is `present`.

    They are read in any case: that need not wait until it is known which row it is.
    """
    x = buffer_start(k_new, batch, head) + token * k_new[3]
    _store_row(x, keys, batch, head, row, present, k_static, K_FORM, K_GROUP, K_WIDTH)
    x = buffer_start(v_new, batch, head) + token * v_new[3]
    _store_row(x, values, batch, head, row, present, v_static, V_FORM, V_GROUP, V_WIDTH)


@triton.jit
def _store_row(
    x, cache, batch, head, row, present, static, form: tl.constexpr, group: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """Encode the vector at pointer `x` into the row of a cache, if it is `present`."""
    codes = buffer_start(cache[0], batch, head) + row * cache[0][3]
    if form == "full":
        channel = channels(width, 1, 0)
        inside = channel < width
        values = tl.load(x + channel, mask=inside).to(cache[0][0].dtype.element_ty)
        tl.store(codes + channel, values, mask=inside & present)
    elif form == "int8_channel":
        channel = channels(width, 1, 0)
        inside = channel < width
        code = _encode_channel(x, static + head * width, channel, inside, -128, 127)
        tl.store(codes + channel, code.to(tl.int8), mask=inside & present)
    elif form == "int4_channel":
        channel = channels(width, 2, 0)
        even = _encode_channel(x, static + head * width, channel, channel < width, -8, 7) + 8
        odd = _encode_channel(x, static + head * width, channel + 1, channel + 1 < width, -8, 7) + 8
        _store_pairs(codes, channel, even, odd, present, width)
    elif form == "int8_token" or form == "fp8_token":
        channel = channels(width, 1, 0)
        inside = channel < width
        values = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
        high: tl.constexpr = 127.0 if form == "int8_token" else 448.0
        scale = tl.div_rn(tl.max(tl.abs(values), axis=0), high)
        scale = tl.where(_all_finite(values, 0), scale, float("nan"))
        tl.store(buffer_start(cache[1], batch, head) + row * cache[1][3], scale, mask=present)
        quotient = divide(values, scale)
        code = encode_integer(quotient, -127.0, 127.0) if form == "int8_token" else encode_e4m3(quotient)
        tl.store(codes + channel, code.to(codes.dtype.element_ty), mask=inside & present)
    else:
        _store_groups(x, codes, cache, batch, head, row, present, static, form, group, width)


@triton.jit
def _encode_channel(x, scales, channel, inside, low: tl.constexpr, high: tl.constexpr):
    values = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + channel, mask=inside, other=0.0)
    # With the reciprocal, as the format says, which rounds differently next to a tie.
    return encode_integer(values * divide(1.0, scale), low, high)


@triton.jit
def _all_finite(values, axis: tl.constexpr):
    return tl.max(tl.where(is_finite(values), 0, 1), axis=axis) == 0


@triton.jit
def _store_pairs(codes, channel, even, odd, present, width: tl.constexpr):
    """Write two 4-bit codes to a byte; `channel` is that of the even one."""
    tl.store(codes + channel // 2, (even | (odd << 4)).to(tl.uint8), mask=(channel < width) & present)


@triton.jit
def _store_groups(
    x, codes, cache, batch, head, row, present, static, form: tl.constexpr, group: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """`_store_row` for the formats whose groups of channels have scales."""
    groups: tl.constexpr = columns(width, 2) * 2 // group
    number = tl.arange(0, groups)
    channel = number[:, None] * group + 2 * tl.arange(0, group // 2)[None, :]
    inside = channel < width
    even = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(x + channel + 1, mask=inside, other=0.0).to(tl.float32)
    complete = number * group < width
    scales = buffer_start(cache[1], batch, head) + row * cache[1][3] + number
    finite = _all_finite(even, 1) & _all_finite(odd, 1)
    if form == "int4_group":
        # NaN is not ordered: it is put in by hand.
        known = (even == even) & (odd == odd)
        low = tl.min(tl.minimum(even, odd), axis=1)
        high = tl.max(tl.maximum(even, odd), axis=1)
        low = tl.where(tl.min(tl.where(known, 1, 0), axis=1) == 1, low, float("nan"))
        offset = low.to(tl.float16)
        scale = tl.div_rn(high - low, 15.0).to(tl.float16)
        stored = is_finite(scale.to(tl.float32)) & is_finite(offset.to(tl.float32))
        scale = tl.where(stored, scale, float("nan"))
        tl.store(scales, scale, mask=complete & present)
        tl.store(buffer_start(cache[2], batch, head) + row * cache[2][3] + number, offset, mask=complete & present)
        step, zero = scale.to(tl.float32)[:, None], offset.to(tl.float32)[:, None]
        even = encode_integer(divide(even - zero, step), 0.0, 15.0)
        odd = encode_integer(divide(odd - zero, step), 0.0, 15.0)
    else:
        amax = tl.maximum(tl.max(tl.abs(even), axis=1), tl.max(tl.abs(odd), axis=1))
        if form == "nvfp4":
            g = tl.load(static + head)
            scale = tl.where(finite, divide(tl.div_rn(amax, 6.0), g), float("nan"))
            code = encode_e4m3(scale)
            step = decode_e4m3(code, 0).to(tl.float32) * g
        else:
            code = tl.where(finite, encode_mx_exponent(amax), 255)
            step = decode_e8m0(code)
        tl.store(scales, code.to(tl.uint8), mask=complete & present)
        even = encode_e2m1(divide(even, step[:, None]))
        odd = encode_e2m1(divide(odd, step[:, None]))
    _store_pairs(codes, channel, even, odd, present, width)


@triton.jit
def keep_rows(
    k_new, v_new, keys, values, start, count,
    K_FORM: tl.constexpr, K_PARTS: tl.constexpr, K_WIDTH: tl.constexpr,
    V_FORM: tl.constexpr, V_PARTS: tl.constexpr, V_WIDTH: tl.constexpr,
    FIRST: tl.constexpr, RING: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Copy one token of one head to the rows in full precision: the ring of recent ones, and the FIRST."""
    begin_early(OVERLAP)
    wait_for_kernels(OVERLAP)
    token, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.load(start + batch) + token
    valid = tl.num_programs(0) if count is None else tl.load(count + batch)
    if token < valid:
        # Of tokens that share a place in the ring, the last one stays.
        newest = token >= valid - RING
        if K_FORM != "full":
            x = buffer_start(k_new, batch, head) + token * k_new[3]
            _keep_row(x, keys, batch, head, row, newest, K_PARTS, K_WIDTH, FIRST, RING)
        if V_FORM != "full":
            x = buffer_start(v_new, batch, head) + token * v_new[3]
            _keep_row(x, values, batch, head, row, newest, V_PARTS, V_WIDTH, FIRST, RING)


@triton.jit
def _keep_row(
    x, cache, batch, head, row, newest,
    parts: tl.constexpr, width: tl.constexpr, first: tl.constexpr, ring: tl.constexpr,
):  # fmt: skip
    channel = channels(width, 1, 0)
    inside = channel < width
    values = tl.load(x + channel, mask=inside)
    if ring > 0:
        recent = cache[parts]
        tl.store(buffer_start(recent, batch, head) + row % ring * recent[3] + channel, values, mask=inside & newest)
    if first > 0:
        held = cache[parts + 1] if ring > 0 else cache[parts]
        tl.store(buffer_start(held, batch, head) + row * held[3] + channel, values, mask=inside & (row < first))
