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

from skipstone.kernels.append import append_row
from skipstone.kernels.attend import attend, attend_exact, block_of_queries, first_seen
from skipstone.kernels.call import Call
from skipstone.kernels.launch import Launch, buffer
from skipstone.kernels.overlap import begin_early, wait_for_kernels
from skipstone.kernels.softmax import output_factor, store_rows
from skipstone.kernels.tiles import ask_for_rows, pieces
from skipstone.kernels.tuning import Tile, constants

SHARE = 64
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
        {
            **call.arguments(),
            "sums": sums,
            "peaks": peaks,
            "totals": totals,
            "shares": shares,
            "capacity": call.capacity,
        },
        {**constants(call, tile), "APPEND": call.is_step, "OVERLAP": call.overlaps},
        tile.warps,
        tile.stages,
        tile.registers,
        overlaps=call.overlaps,
    )
    combine = Launch(
        combine_shares,
        (queries, heads, batch),
        {"sums": sums, "peaks": peaks, "totals": totals, "shares": shares, "sinks": call.sinks, "out": buffer(out)},
        {
            "WIDTH": width,
            "BLOCK_D": triton.next_power_of_2(width),
            "BLOCK_SPLITS": min(64, triton.next_power_of_2(shares)),
            "OVERLAP": call.overlaps,
        },
        warps=8,
        overlaps=call.overlaps,
    )
    return share, combine


@triton.jit(do_not_specialize=["shares"])
def attend_share(
    q, keys, values, k_static, v_static, k_new, v_new, start, count, sums, peaks, totals, scale, softcap, window,
    queries, shares, capacity,
    K_FORM: tl.constexpr, K_GROUP: tl.constexpr, K_ALIGN: tl.constexpr, K_PARTS: tl.constexpr, K_WIDTH: tl.constexpr,
    V_FORM: tl.constexpr, V_GROUP: tl.constexpr, V_ALIGN: tl.constexpr, V_PARTS: tl.constexpr, V_WIDTH: tl.constexpr,
    MODEL: tl.constexpr, ARCH: tl.constexpr, KIND: tl.constexpr, CAP: tl.constexpr, HEADS: tl.constexpr,
    RESIDUAL: tl.constexpr, FIRST: tl.constexpr, RING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr, APPEND: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sums [B, N, S, shares, Dv], largest logits and totals [B, N, S, shares] of one share of the keys, float32.

    If APPEND, there is one new token, which whoever reads it writes to the cache first.
    """
    begin_early(OVERLAP)
    split, block = tl.program_id(0) % shares, tl.program_id(0) // shares
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if OVERLAP:
        # The rows of earlier steps are there. How many they are may not be yet, and is read anew below: not from the
        # processor's own cache.
        last = tl.maximum(tl.minimum(tl.load(start + batch, cache_modifier=".cg"), capacity - 1), 0).to(tl.int32)
        begin = first_seen(last, window, KIND)
        share = tl.cdiv(tl.cdiv(last + 1 - begin, BLOCK_N), shares) * BLOCK_N
        row = begin + split * share + tl.arange(0, BLOCK_N)
        ask_for_rows(keys, batch, head, row, row <= last, K_FORM, K_WIDTH, K_PARTS)
        ask_for_rows(values, batch, head, row, row <= last, V_FORM, V_WIDTH, V_PARTS)
    wait_for_kernels(OVERLAP)
    q_head, query, present, position, lowest, until, first, begin, end = block_of_queries(
        block, start, count, queries, window, batch, head, KIND, HEADS, RESIDUAL, BLOCK_M
    )
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), shares) * BLOCK_N
    share_begin = begin + split * share
    share_end = tl.minimum(share_begin + share, end)
    place = ((batch * tl.num_programs(1) * HEADS + q_head) * queries + query) * shares + split
    if APPEND:
        append_row(
            k_new, v_new, keys, values, k_static, v_static, batch, head, 0, first.to(tl.int64),
            (first >= share_begin) & (first < tl.minimum(share_end, capacity)),
            K_FORM, K_GROUP, K_WIDTH, V_FORM, V_GROUP, V_WIDTH,
        )  # fmt: skip
        tl.debug_barrier()  # other threads of the program read the row
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
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The output [Dv] of one query and head of the buffer `out` [B, N, S, Dv], from the shares of `attend_share`."""
    begin_early(OVERLAP)
    wait_for_kernels(OVERLAP)
    query, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + query) * shares
    peak, total, mixed = float("-inf"), 0.0, tl.zeros((BLOCK_D,), tl.float32)
    channel = tl.arange(0, BLOCK_D)
    for first in range(0, shares, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        present = split < shares
        mask = present[:, None] & (channel < WIDTH)[None, :]
        share_peak = tl.load(peaks + place + split, present, float("-inf"))
        share_total = tl.load(totals + place + split, present, 0.0)
        rows = tl.load(sums + (place + split)[:, None] * WIDTH + channel[None, :], mask, 0.0)
        # Whoever had no share wrote nothing but its peak.
        shared = share_peak != float("-inf")
        larger = tl.maximum(peak, tl.max(share_peak, axis=0))
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        weight, left = tl.exp2(share_peak - reference), tl.exp2(peak - reference)
        total = total * left + tl.sum(tl.where(shared, weight * share_total, 0.0), axis=0)
        mixed = mixed * left + tl.sum(tl.where(shared[:, None], weight[:, None] * rows, 0.0), axis=0)
        peak = larger
    sink = float("-inf") if sinks is None else tl.load(sinks + head).to(tl.float32)
    mixed *= output_factor(peak, total, sink)
    start = out[0] + batch * out[1] + head * out[2] + query * out[3]
    tl.store(start + channel, mixed.to(out[0].dtype.element_ty), mask=channel < WIDTH)
