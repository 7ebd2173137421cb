"""Softmax attention of a block of queries over keys that come a tile at a time: what all attention kernels share.

A running state ``(sums, peak, total, unit)`` holds the sums of weighted values in units of `unit`, in the pieces of
their tiles, the largest logit so far [M] and the sum of the weights [M]. Logits are in base 2, for `exp2`.

A matrix product of tensor cores has at least 16 rows, but may have 8 columns. Few queries are therefore columns
(`KEYS_FIRST`): logits are [N, M] then and sums [columns, M], instead of [M, N] and [M, columns].
"""

# Triton unrolls loops over pieces, in which tuples grow, and knows no starred elements.
# mypy: allow-untyped-defs, disable-error-code=assignment
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from skipstone.kernels.tiles import (
    across,
    channels,
    columns,
    down,
    load_channels,
    load_static,
    static_scaled,
    token_scaled,
)

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
    form: tl.constexpr, width: tl.constexpr, parts: tl.constexpr, dtype: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Queries as operands for keys of a format.

    Args:
        rows, present: pointers to them [M], and whether to read them.
        static, head: static tensor of the keys' format, where it has one, and key head.
        parts: number of pieces.
    Returns:
        the pieces [M, columns], transposed if KEYS_FIRST, and a factor of each row's products, float32 [M].
    """
    tiles = ()
    largest = tl.zeros((rows.shape[0],), tl.float32)
    for part in tl.static_range(parts):
        tile = load_channels(rows, present, width, parts, part, False)
        if form != "full":
            tile = tile.to(tl.float32)
            if static_scaled(form):
                tile = tile * load_static(static, head, form, width, parts, part)[None, :]
            largest = tl.maximum(largest, tl.max(tl.abs(tile), axis=1))
        tiles = tiles + (tile,)
    # What a query times a scale can be is too much for the exponents of float16, but not relative to its largest.
    largest = tl.where(largest > 0.0, largest, 1.0)
    operands = ()
    for part in tl.static_range(parts):
        tile = (tiles[part] if form == "full" else tiles[part] / largest[:, None]).to(dtype)
        operands = operands + (tl.trans(tile) if KEYS_FIRST else tile,)
    return operands, largest


@triton.jit
def new_state(rows: tl.constexpr, width: tl.constexpr, parts: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """The state before any key."""
    shape: tl.constexpr = (columns(width, parts), rows) if KEYS_FIRST else (rows, columns(width, parts))
    sums = ()
    for _ in tl.static_range(parts):
        sums = sums + (tl.zeros(shape, tl.float32),)
    return sums, tl.full((rows,), float("-inf"), tl.float32), tl.zeros((rows,), tl.float32), TINY


@triton.jit
def logits_of(
    query, factor, keys, softcap, form: tl.constexpr, parts: tl.constexpr, CAP: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """Logits in base 2, float32 [M, N], transposed if KEYS_FIRST, of queries from `load_queries` and a tile of keys.

    Args:
        factor: [M], the queries' own times the scale of the logits, and log2(e) without CAP.
        keys: from `load_tile`.
        form, parts: format of the keys, and number of pieces.
        softcap: cap of the logits, if CAP.
    """
    rows: tl.constexpr = factor.shape[0]
    tokens: tl.constexpr = keys[0][0].shape[0]
    logits = tl.zeros((tokens, rows) if KEYS_FIRST else (rows, tokens), tl.float32)
    for part in tl.static_range(parts):
        if KEYS_FIRST:
            logits = multiply(keys[0][part], query[part], logits)
        else:
            logits = multiply(query[part], tl.trans(keys[0][part]), logits)
    logits *= down(factor, KEYS_FIRST)
    if token_scaled(form):
        logits *= across(keys[1], KEYS_FIRST)
    if CAP:
        logits = tanh(logits / softcap) * softcap * LOG2_E
    return logits


@triton.jit
def accumulate(
    state, logits, visible, values,
    form: tl.constexpr, parts: tl.constexpr, dtype: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """The state after a tile.

    Args:
        logits, visible: [M, N], transposed if KEYS_FIRST.
        values: from `load_tile`, transposed if KEYS_FIRST.
        form, parts: format of the values, and number of pieces.
        dtype: type of the tile.
    """
    over_keys: tl.constexpr = 0 if KEYS_FIRST else 1
    sums, peak, total, unit = state
    logits = tl.where(visible, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=over_keys))
    # A row that has seen nothing yet must not compute inf - inf.
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(logits - down(reference, KEYS_FIRST))
    shrink = tl.exp2(peak - reference)
    total = total * shrink + tl.sum(weights, axis=over_keys)
    if token_scaled(form):
        # Scales go to the weights, in units of the largest so far: by themselves they may be too small for float16.
        scale = values[1]
        new_unit = tl.maximum(unit, tl.max(tl.where(scale == scale, scale, 0.0), axis=0))
        inverse = 1.0 / new_unit
        weights = tl.where(visible, weights * across(scale * inverse, KEYS_FIRST), 0.0)
        shrink *= unit * inverse
        unit = new_unit
    weights = weights.to(dtype)
    new_sums = ()
    for part in tl.static_range(parts):
        shrunk = sums[part] * down(shrink, KEYS_FIRST)
        if KEYS_FIRST:
            new_sums = new_sums + (multiply(values[0][part], weights, shrunk),)
        else:
            new_sums = new_sums + (multiply(weights, values[0][part], shrunk),)
    return new_sums, new_peak, total, unit


@triton.jit
def in_values(
    state, static, head, form: tl.constexpr, width: tl.constexpr, parts: tl.constexpr, KEYS_FIRST: tl.constexpr
):  # fmt: skip
    """The state with sums in the units of the values themselves, from sums over tiles of a format."""
    sums, peak, total, unit = state
    scaled = ()
    for part in tl.static_range(parts):
        each = sums[part]
        if token_scaled(form):
            each = each * unit
        if static_scaled(form):
            each = each * across(load_static(static, head, form, width, parts, part), KEYS_FIRST)
        scaled = scaled + (each,)
    return scaled, peak, total, unit


@triton.jit
def store_rows(rows, present, sums, factor, width: tl.constexpr, parts: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Write the sums of a state, times `factor` [M], to pointers to rows [M]."""
    for part in tl.static_range(parts):
        channel = channels(width, parts, part)
        pointers = down(rows, KEYS_FIRST) + across(channel, KEYS_FIRST)
        mask = down(present, KEYS_FIRST) & across(channel < width, KEYS_FIRST)
        tl.store(pointers, (sums[part] * down(factor, KEYS_FIRST)).to(rows.dtype.element_ty), mask=mask)


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
