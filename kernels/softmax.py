"""Softmax attention of a block of queries over keys that come a tile at a time: what all attention kernels share.

A running state ``(even, odd, peak, total, unit)`` holds the sums of weighted values [M, half] in units of `unit`, the
largest logit so far [M] and the sum of the weights [M]. Logits are in base 2, for `exp2`.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from skipstone.kernels.tiles import channels, load_channels, load_static, packed, static_scaled, token_scaled

LOG2_E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-30)


@triton.constexpr_function
def operand_dtype(form, model):
    """Type of the operands of a product with a tile: float16 holds codes exactly, and weights best."""
    return model if form == "full" or model == tl.float32 else tl.float16


@triton.jit
def multiply(a, b, accumulator):
    """a @ b + accumulator in float32, also for float32 operands."""
    return tl.dot(a, b, acc=accumulator, input_precision="tf32x3")


@triton.jit
def load_queries(
    rows, present, static, head,
    form: tl.constexpr, width: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Queries as operands for keys of a format.

    Args:
        rows, present: pointers to them [M], and whether to read them.
        static, head: static tensor of the keys' format, where it has one, and key head.
    Returns:
        even channels [M, half], odd ones (or all, twice), and a factor of each row's products, float32 [M].
    """
    split: tl.constexpr = packed(form)
    even = load_channels(rows, present, width, split, 0)
    odd = load_channels(rows, present, width, split, 1) if split else even
    if form == "full":
        return even.to(dtype), odd.to(dtype), tl.full((rows.shape[0],), 1.0, tl.float32)
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    if static_scaled(form):
        even = even * load_static(static, head, form, width, split, 0)[None, :]
        odd = odd * load_static(static, head, form, width, split, 1)[None, :] if split else even
    # What a query times a scale can be is too much for the exponents of float16, but not relative to its largest.
    largest = tl.maximum(tl.max(tl.abs(even), axis=1), tl.max(tl.abs(odd), axis=1))
    largest = tl.where(largest > 0.0, largest, 1.0)
    return (even / largest[:, None]).to(dtype), (odd / largest[:, None]).to(dtype), largest


@triton.jit
def new_state(rows: tl.constexpr, columns: tl.constexpr):
    """The state before any key."""
    sums = tl.zeros((rows, columns), tl.float32)
    return sums, sums, tl.full((rows,), float("-inf"), tl.float32), tl.zeros((rows,), tl.float32), TINY


@triton.jit
def logits_of(query, factor, keys, softcap, form: tl.constexpr, CAP: tl.constexpr):
    """Logits in base 2, float32 [M, N], of queries from `load_queries` and keys from `load_tile`.

    Args:
        factor: [M], the queries' own times the scale of the logits, and log2(e) without CAP.
        form: format of the keys.
        softcap: cap of the logits, if CAP.
    """
    logits = tl.zeros((query[0].shape[0], keys[0].shape[0]), tl.float32)
    logits = multiply(query[0], tl.trans(keys[0]), logits)
    if packed(form):
        logits = multiply(query[1], tl.trans(keys[1]), logits)
    logits *= factor[:, None]
    if token_scaled(form):
        logits *= keys[2][None, :]
    if CAP:
        logits = tanh(logits / softcap) * softcap * LOG2_E
    return logits


@triton.jit
def accumulate(state, logits, visible, values, form: tl.constexpr, split: tl.constexpr, dtype: tl.constexpr):
    """The state after a tile.

    Args:
        logits, visible: [M, N].
        values: from `load_tile`.
        form: format of the values.
        split: whether the sums are split into even and odd channels.
        dtype: type of the tile.
    """
    even, odd, peak, total, unit = state
    logits = tl.where(visible, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    # A row that has seen nothing yet must not compute inf - inf.
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(logits - reference[:, None])
    shrink = tl.exp2(peak - reference)
    total = total * shrink + tl.sum(weights, axis=1)
    if token_scaled(form):
        # Scales go to the weights, in units of the largest so far: by themselves they may be too small for float16.
        scale = values[2]
        new_unit = tl.maximum(unit, tl.max(tl.where(scale == scale, scale, 0.0), axis=0))
        weights = tl.where(visible, weights * (scale / new_unit)[None, :], 0.0)
        shrink *= unit / new_unit
        unit = new_unit
    weights = weights.to(dtype)
    even = multiply(weights, values[0], even * shrink[:, None])
    if split:
        odd = multiply(weights, values[1], odd * shrink[:, None])
    return even, odd, new_peak, total, unit


@triton.jit
def in_values(state, static, head, form: tl.constexpr, width: tl.constexpr):
    """The state with sums in the units of the values themselves, from sums over tiles of a format."""
    even, odd, peak, total, unit = state
    split: tl.constexpr = packed(form)
    if token_scaled(form):
        even, odd = even * unit, odd * unit
    if static_scaled(form):
        even = even * load_static(static, head, form, width, split, 0)[None, :]
        if split:
            odd = odd * load_static(static, head, form, width, split, 1)[None, :]
    return even, odd, peak, total, unit


@triton.jit
def store_rows(rows, present, even, odd, width: tl.constexpr, split: tl.constexpr):
    """Write the columns of a state to pointers to rows [M]."""
    _store_columns(rows, present, even, channels(width, split, 0), width)
    if split:
        _store_columns(rows, present, odd, channels(width, split, 1), width)


@triton.jit
def _store_columns(rows, present, values, channel, width: tl.constexpr):
    pointers = rows[:, None] + channel[None, :]
    tl.store(pointers, values.to(rows.dtype.element_ty), mask=present[:, None] & (channel < width)[None, :])


@triton.jit
def output_factor(peak, total, sink):
    """What turns sums into outputs: float32, of the shape of `peak` and `total`.

    Args:
        sink: learned logit of nothing, which takes part of the weight and gives no value; base e, -inf for none.
    """
    sink = sink * LOG2_E
    new_peak = tl.maximum(peak, sink)
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = tl.exp2(peak - reference)
    total = total * shrink + tl.exp2(sink - reference)
    # A row that sees nothing gives zeros.
    return shrink / tl.where(total == 0.0, 1.0, total)


@triton.jit
def tanh(x):
    """The hyperbolic tangent, float32."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0.0, -magnitude, magnitude)
