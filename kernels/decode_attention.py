"""Attention of a few new tokens over a quantized cache, with the keys split among programs (Flash-Decoding).

Each program attends to its share of the keys; a second kernel combines the shares. These follow from the lengths on the
device, the grid from sizes that the host knows: programs that get no share end at once, so that a captured CUDA
graph stays right while the sequences grow.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipstone.kernels.attend import attend, attend_exact, block_of_queries
from skipstone.kernels.call import Call
from skipstone.kernels.launch import Launch, buffer
from skipstone.kernels.softmax import output_factor, store_rows
from skipstone.kernels.tiles import pieces
from skipstone.kernels.tuning import Tile, constants

SHARE = 256
"""Keys that are worth a program of their own."""


ROUNDS = 4
"""Most times that programs for a single block of queries follow each other on a processor."""

ROUND = 0.95
"""How much of the speed each further round leaves: measured, 2% to 5% are lost."""


def splits(call: Call, tile: Tile, processors: int) -> int:
    """How many programs share the keys of a block, however long the cache is.

    As many as run at a time, unless that leaves so many processors idle that several rounds of smaller programs are
    faster. A prompt, which is many blocks, has them all at a time or is for `prefill_attention`.
    """
    blocks = triton.cdiv(call.queries * call.group, tile.rows) * call.kv_heads * call.batch
    at_a_time, most = tile.programs * processors, triton.cdiv(call.capacity, SHARE)

    def speed(shares: int) -> float:
        rounds = triton.cdiv(blocks * shares, at_a_time)
        return float(shares / rounds * ROUND**rounds)

    rounds = range(1, 1 + (ROUNDS if call.queries * call.group <= tile.rows else 1))
    return max((max(1, min(each * at_a_time // blocks, most)) for each in rounds), key=speed)


def decode_attention(call: Call, out: Tensor, tile: Tile, shares: int) -> tuple[Launch, Launch]:
    """Attention of few queries: the two launches that write it to `out` [B, N, S, Dv], by `shares` programs a block."""
    # `shares` is no constant of the kernels: it follows from the batch, and numbers would be compiled anew.
    batch, heads, queries, width = out.shape
    sums = torch.empty((batch, heads, queries, shares, width), dtype=torch.float32, device=out.device)
    peaks, totals = torch.empty((2, batch, heads, queries, shares), dtype=torch.float32, device=out.device)
    share = Launch(
        attend_share,
        (triton.cdiv(queries * call.group, tile.rows) * shares, call.kv_heads, batch),
        {**call.arguments(), "sums": sums, "peaks": peaks, "totals": totals, "shares": shares},
        constants(call, tile),
        tile.warps,
        tile.stages,
        tile.registers,
    )
    combine = Launch(
        combine_shares,
        (queries, heads, batch),
        {"sums": sums, "peaks": peaks, "totals": totals, "shares": shares, "sinks": call.sinks, "out": buffer(out)},
        {
            "WIDTH": width,
            "BLOCK_D": triton.next_power_of_2(width),
            "BLOCK_SPLITS": min(64, triton.next_power_of_2(shares)),
        },
        warps=8,
    )
    return share, combine


@triton.jit(do_not_specialize=["shares"])
def attend_share(
    q, keys, values, k_static, v_static, k_new, v_new, start, count, sums, peaks, totals, scale, softcap, window,
    queries, shares,
    K_FORM: tl.constexpr, K_GROUP: tl.constexpr, K_ALIGN: tl.constexpr, K_PARTS: tl.constexpr, K_WIDTH: tl.constexpr,
    V_FORM: tl.constexpr, V_GROUP: tl.constexpr, V_ALIGN: tl.constexpr, V_PARTS: tl.constexpr, V_WIDTH: tl.constexpr,
    MODEL: tl.constexpr, ARCH: tl.constexpr, KIND: tl.constexpr, CAP: tl.constexpr, HEADS: tl.constexpr,
    RESIDUAL: tl.constexpr, FIRST: tl.constexpr, RING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Sums [B, N, S, shares, Dv], largest logits and totals [B, N, S, shares] of one share of the keys, float32."""
    split, block = tl.program_id(0) % shares, tl.program_id(0) // shares
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_head, query, present, position, lowest, until, first, begin, end = block_of_queries(
        block, start, count, queries, window, batch, head, KIND, HEADS, RESIDUAL, BLOCK_M
    )
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), shares) * BLOCK_N
    share_begin = begin + split * share
    share_end = tl.minimum(share_begin + share, end)
    place = ((batch * tl.num_programs(1) * HEADS + q_head) * queries + query) * shares + split
    if share_begin < share_end:
        q_rows = q[0] + batch * q[1] + q_head * q[2] + query * q[3]
        state = attend(
            q_rows, present, position, lowest, keys, values, k_static, v_static, batch, head, share_begin, share_end,
            until, scale, softcap,
            K_FORM, K_GROUP, K_ALIGN, K_WIDTH, V_FORM, V_GROUP, V_ALIGN, V_WIDTH, MODEL, ARCH, CAP, FIRST, BLOCK_N,
            KEYS_FIRST,
        )  # fmt: skip
        if RESIDUAL + FIRST > 0:
            # Keys in full precision are few, and belong to the first share.
            state = attend_exact(
                state, q_rows, present, position, lowest, keys, values, k_new, v_new, batch, head, first, begin,
                tl.where(split == 0, end, 0), until, scale, softcap,
                K_FORM, K_PARTS, K_WIDTH, V_FORM, V_ALIGN, V_PARTS, V_WIDTH, MODEL, CAP, FIRST, RING, KEYS_FIRST,
            )  # fmt: skip
        weighted, peak, total, _ = state
        one = tl.full(place.shape, 1.0, tl.float32)
        store_rows(sums + place * V_WIDTH, present, weighted, one, V_WIDTH, pieces(V_FORM, V_ALIGN), KEYS_FIRST)
        tl.store(peaks + place, peak, mask=present)
        tl.store(totals + place, total, mask=present)
    else:
        tl.store(peaks + place, float("-inf"), mask=present)


@triton.jit(do_not_specialize=["shares"])
def combine_shares(
    sums, peaks, totals, shares, sinks, out,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """The output [Dv] of one query and head of the buffer `out` [B, N, S, Dv], from the shares of `attend_share`."""
    query, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + query) * shares
    peak = float("-inf")
    for first in range(0, shares, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        peak = tl.maximum(peak, tl.max(tl.load(peaks + place + split, split < shares, float("-inf")), axis=0))
    reference = tl.where(peak == float("-inf"), 0.0, peak)
    channel = tl.arange(0, BLOCK_D)
    mixed, total = tl.zeros((BLOCK_D,), tl.float32), 0.0
    for first in range(0, shares, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        share_peak = tl.load(peaks + place + split, split < shares, float("-inf"))
        # Whoever had no share wrote nothing but its peak.
        shared = share_peak != float("-inf")
        weight = tl.exp2(share_peak - reference)
        total += tl.sum(weight * tl.load(totals + place + split, shared, 0.0), axis=0)
        mask = shared[:, None] & (channel < WIDTH)[None, :]
        rows = tl.load(sums + (place + split)[:, None] * WIDTH + channel[None, :], mask, 0.0)
        mixed += tl.sum(weight[:, None] * rows, axis=0)
    sink = float("-inf") if sinks is None else tl.load(sinks + head).to(tl.float32)
    mixed *= output_factor(peak, total, sink)
    start = out[0] + batch * out[1] + head * out[2] + query * out[3]
    tl.store(start + channel, mixed.to(out[0].dtype.element_ty), mask=channel < WIDTH)
