"""Attention of a block of queries over a range of cached keys, the loops that all attention kernels share.

The rows of a block are queries of all heads that share a key head (grouped-query attention), so that each tile of keys
and values is read and decoded once for all of them. Of the S * g rows of a key head, row r is query r // g of head
r % g in the group.
"""

# Triton unrolls loops over pieces, in which tuples grow, and knows no starred elements.
# mypy: allow-untyped-defs, disable-error-code=assignment
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from skipstone.kernels.softmax import (
    LOG2_E,
    accumulate,
    in_values,
    load_queries,
    logits_of,
    new_state,
    operand_dtype,
)
from skipstone.kernels.tiles import across, buffer_start, down, load_channels, load_tile, pieces


@triton.jit
def attend(
    q_rows, present, position, lowest, keys, values, k_static, v_static, batch, head, begin, end, until, scale, softcap,
    K_FORM: tl.constexpr, K_GROUP: tl.constexpr, K_ALIGN: tl.constexpr, K_WIDTH: tl.constexpr,
    V_FORM: tl.constexpr, V_GROUP: tl.constexpr, V_ALIGN: tl.constexpr, V_WIDTH: tl.constexpr,
    MODEL: tl.constexpr, ARCH: tl.constexpr, CAP: tl.constexpr, FIRST: tl.constexpr, BLOCK_N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """The state after the keys ``begin .. end - 1`` as they are in the cache, with sums in the units of the values.

    Args:
        q_rows, present: pointers to the queries of the rows [M], and whether to read them.
        position, lowest: of each row's query and of the first key that it sees, int32 [M].
        keys, values: caches, see `skipstone.kernels.tiles`.
        k_static, v_static: static tensors of the formats that have one.
        batch, head: sequence and key head, int64.
        until: first key of each row that is not read from here but in full precision, int32 [M], and
        FIRST: number of keys at the beginning of which the same holds.
        scale, softcap: of the logits; `softcap` if CAP.
    """
    k_dtype: tl.constexpr = operand_dtype(K_FORM, MODEL)
    v_dtype: tl.constexpr = operand_dtype(V_FORM, MODEL)
    k_parts: tl.constexpr = pieces(K_FORM, K_ALIGN)
    v_parts: tl.constexpr = pieces(V_FORM, V_ALIGN)
    query, factor = load_queries(q_rows, present, k_static, head, K_FORM, K_WIDTH, k_parts, k_dtype, KEYS_FIRST)
    factor = factor * scale if CAP else factor * (scale * LOG2_E)
    until = down(tl.minimum(until, end), KEYS_FIRST)
    lowest = down(lowest, KEYS_FIRST)
    state = new_state(q_rows.shape[0], V_WIDTH, v_parts, KEYS_FIRST)
    for first in range(begin, end, BLOCK_N):
        row = tl.cast(first, tl.int64)
        key = first + tl.arange(0, BLOCK_N)
        inside = key < end
        visible = (across(key, KEYS_FIRST) < until) & (across(key, KEYS_FIRST) >= lowest)
        if FIRST > 0:
            visible = visible & across(key >= FIRST, KEYS_FIRST)
        tile = load_tile(
            keys, batch, head, row, BLOCK_N, inside, K_FORM, K_GROUP, K_ALIGN, K_WIDTH, k_dtype, ARCH, False
        )
        logits = logits_of(query, factor, tile, softcap, K_FORM, k_parts, CAP, KEYS_FIRST)
        tile = load_tile(
            values, batch, head, row, BLOCK_N, inside, V_FORM, V_GROUP, V_ALIGN, V_WIDTH, v_dtype, ARCH, KEYS_FIRST
        )
        state = accumulate(state, logits, visible, tile, V_FORM, v_parts, v_dtype, KEYS_FIRST)
    return in_values(state, v_static, head, V_FORM, V_WIDTH, v_parts, KEYS_FIRST)


@triton.jit
def attend_exact(
    state, q_rows, present, position, lowest, keys, values, k_new, v_new, batch, head, start, begin, end, until, scale,
    softcap,
    K_FORM: tl.constexpr, K_PARTS: tl.constexpr, K_WIDTH: tl.constexpr,
    V_FORM: tl.constexpr, V_ALIGN: tl.constexpr, V_PARTS: tl.constexpr, V_WIDTH: tl.constexpr,
    MODEL: tl.constexpr, CAP: tl.constexpr, FIRST: tl.constexpr, RING: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """The state after the keys that are read in full precision: each row's own from `until` on, and the FIRST.

    Args:
        state: from `attend`.
        k_new, v_new: buffers of the new rows, which stand at `start` and behind; not in the ring yet.
        K_PARTS, V_PARTS: number of the format's own buffers; the ring and the first rows follow them.
        RING: rows of the ring, 0 without one.
    """
    v_parts: tl.constexpr = pieces(V_FORM, V_ALIGN)
    query, factor = load_queries(q_rows, present, q_rows, head, "full", K_WIDTH, 1, MODEL, KEYS_FIRST)
    factor = factor * scale if CAP else factor * (scale * LOG2_E)
    early = tl.minimum(FIRST, end)
    late = tl.maximum(tl.maximum(begin, early), tl.min(until, axis=0))
    # These keys are few, and their rows are anywhere: small tiles need few registers for pointers.
    for first in range(0, early + tl.maximum(end - late, 0), 16):
        number = first + tl.arange(0, 16)
        key = tl.where(number < early, number, number - early + late)
        inside = key < end
        row = across(key, KEYS_FIRST)
        visible = (row >= down(until, KEYS_FIRST)) | (row < FIRST)
        visible = visible & (row <= down(position, KEYS_FIRST)) & (row >= down(lowest, KEYS_FIRST))
        visible = visible & across(inside, KEYS_FIRST)
        rows = exact_rows(keys, k_new, batch, head, key, start, K_FORM, K_PARTS, FIRST, RING)
        tile = load_channels(rows, inside, K_WIDTH, 1, 0, False).to(MODEL)
        logits = logits_of(query, factor, ((tile,), 1.0), softcap, "full", 1, CAP, KEYS_FIRST)
        rows = exact_rows(values, v_new, batch, head, key, start, V_FORM, V_PARTS, FIRST, RING)
        tiles = ()
        for part in tl.static_range(v_parts):
            tiles = tiles + (load_channels(rows, inside, V_WIDTH, v_parts, part, KEYS_FIRST).to(MODEL),)
        state = accumulate(state, logits, visible, (tiles, 1.0), "full", v_parts, MODEL, KEYS_FIRST)
    return state


@triton.jit
def exact_rows(
    cache, new, batch, head, key, start,
    form: tl.constexpr, parts: tl.constexpr, first: tl.constexpr, ring: tl.constexpr,
):  # fmt: skip
    """Pointers to the rows of keys [N] in full precision: in the cache itself, or else new, in the ring, or first."""
    # Not two returns: Triton compiles what follows a return too, and this cache has no other rows.
    if form == "full":
        rows = buffer_start(cache[0], batch, head) + key.to(tl.int64) * cache[0][3]
    else:
        rows = buffer_start(new, batch, head) + (key - start).to(tl.int64) * new[3]
        if ring > 0:
            recent = buffer_start(cache[parts], batch, head) + (key % ring).to(tl.int64) * cache[parts][3]
            rows = tl.where(key >= start, rows, recent)
        if first > 0:
            held = cache[parts + 1] if ring > 0 else cache[parts]
            rows = tl.where(
                (key >= start) | (key >= first), rows, buffer_start(held, batch, head) + key.to(tl.int64) * held[3]
            )
    return rows


@triton.jit
def first_seen(position, window, KIND: tl.constexpr):
    """The first key that queries at these positions see."""
    lowest = position * 0
    if KIND == "sliding":
        lowest = tl.maximum(position - window + 1, 0)
    elif KIND == "chunked":
        lowest = position // window * window
    return lowest


@triton.jit
def block_of_queries(
    block, start, count, queries, window, batch, head,
    KIND: tl.constexpr, HEADS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The rows of a block, and the keys that it may see.

    Args:
        block: number of the block.
        start, count: int64 [B], rows in the cache before, and new ones that are in it now; None for S.
        queries: S.
        window: of the kinds that have one, see `skipstone.ir.attention.Kind`.
        HEADS: g, query heads to a key head.
        RESIDUAL: newest keys of each query that are read in full precision.
    Returns:
        of each row [M]: query head, query, whether there is one, position, first key that it sees, and `until`, see
        `attend`; and of the block: position of query 0, first key that a row sees, and the one behind the last.
    """
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // HEADS
    present = query < queries
    first = tl.load(start + batch).to(tl.int32)
    valid = first + (queries if count is None else tl.load(count + batch).to(tl.int32))
    position = first + query
    lowest = first_seen(position, window, KIND)
    begin = tl.min(tl.where(present, lowest, valid), axis=0)
    end = tl.minimum(tl.max(tl.where(present, position + 1, 0), axis=0), valid)
    until = tl.maximum(position + 1 - RESIDUAL, 0)
    return head * HEADS + row % HEADS, query, present, position, lowest, until, first, begin, end
