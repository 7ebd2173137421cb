"""Attention of many new tokens over a quantized cache that holds them already: a program for each block of queries."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from skipstone.kernels.attend import attend, attend_exact, block_of_queries
from skipstone.kernels.call import Call
from skipstone.kernels.launch import Launch, buffer
from skipstone.kernels.softmax import output_factor, store_rows
from skipstone.kernels.tiles import pieces
from skipstone.kernels.tuning import Tile, constants


def prefill_attention(call: Call, out: Tensor, tile: Tile) -> Launch:
    """Attention of many queries: the launch that writes it to `out` [B, N, S, Dv]."""
    return Launch(
        attend_block,
        (triton.cdiv(call.queries * call.group, tile.rows), call.kv_heads, call.batch),
        {**call.arguments(), "sinks": call.sinks, "out": buffer(out)},
        constants(call, tile),
        tile.warps,
        tile.stages,
    )


@triton.jit
def attend_block(
    q, keys, values, k_static, v_static, k_new, v_new, start, count, sinks, out, scale, softcap, window, queries,
    K_FORM: tl.constexpr, K_GROUP: tl.constexpr, K_ALIGN: tl.constexpr, K_PARTS: tl.constexpr, K_WIDTH: tl.constexpr,
    V_FORM: tl.constexpr, V_GROUP: tl.constexpr, V_ALIGN: tl.constexpr, V_PARTS: tl.constexpr, V_WIDTH: tl.constexpr,
    MODEL: tl.constexpr, ARCH: tl.constexpr, KIND: tl.constexpr, CAP: tl.constexpr, HEADS: tl.constexpr,
    RESIDUAL: tl.constexpr, FIRST: tl.constexpr, RING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Outputs of one block of queries, to the buffer `out` [B, N, S, Dv]."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    # The last blocks see the most keys: they go first, so that none of them is left for the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    q_head, query, present, position, lowest, until, first, begin, end = block_of_queries(
        block, start, count, queries, window, batch, head, KIND, HEADS, RESIDUAL, BLOCK_M
    )
    q_rows = q[0] + batch * q[1] + q_head * q[2] + query * q[3]
    state = attend(
        q_rows, present, position, lowest, keys, values, k_static, v_static, batch, head, begin, end, until, scale,
        softcap, K_FORM, K_GROUP, K_ALIGN, K_WIDTH, V_FORM, V_GROUP, V_ALIGN, V_WIDTH, MODEL, ARCH, CAP, FIRST, BLOCK_N,
        KEYS_FIRST,
    )  # fmt: skip
    if RESIDUAL + FIRST > 0:
        state = attend_exact(
            state, q_rows, present, position, lowest, keys, values, k_new, v_new, batch, head, first, begin, end, until,
            scale, softcap, K_FORM, K_PARTS, K_WIDTH, V_FORM, V_ALIGN, V_PARTS, V_WIDTH, MODEL, CAP, FIRST, RING,
            KEYS_FIRST,
        )  # fmt: skip
    sums, peak, total, _ = state
    sink = float("-inf") if sinks is None else tl.load(sinks + q_head).to(tl.float32)
    factor = output_factor(peak, total, sink)
    rows = out[0] + batch * out[1] + q_head * out[2] + query * out[3]
    store_rows(rows, present, sums, factor, V_WIDTH, pieces(V_FORM, V_ALIGN), KEYS_FIRST)
