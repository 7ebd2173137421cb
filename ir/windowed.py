"""Attention through a KV cache that keeps the newest tokens of a sequence and the first few: its size is fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.ir.attention import attend

STEP = 128
"""The most tokens of one step. A cache has room for them beside the window: they are written before they are read, and
as many can be cropped again."""


def window_rows(window: int, first: int) -> int:
    """Rows of a cache: those of the first tokens, a ring of recent ones, and one that takes what is not kept."""
    return first + window + STEP


def row_places(cache_rows: int, first: int, start: Tensor, count: Tensor, rows: int) -> Tensor:
    """int64 [B, S]: the rows of a cache that S new tokens of each sequence go to; see `windowed_attention`."""
    ring = cache_rows - first - 1
    steps = torch.arange(rows, device=start.device)
    positions = start.unsqueeze(1) + steps
    places = torch.where(positions < first, positions, first + (positions - first) % ring)
    return torch.where(steps < count.unsqueeze(1), places, cache_rows - 1)


def visible_rows(cache_rows: int, first: int, window: int, start: Tensor, count: Tensor, rows: int) -> Tensor:
    """bool [B, 1, S, rows of the cache]: what S new tokens attend to, themselves included, once they are written."""
    ring, end = cache_rows - first - 1, (start + count).unsqueeze(1)
    newest = end - 1 - first  # as the ring counts: place p holds the newest token that is p modulo its length
    held = first + newest - (newest - torch.arange(ring, device=start.device)) % ring
    early = torch.arange(first, device=start.device).expand(start.shape[0], first)
    nothing = torch.full_like(end, -1)
    tokens = torch.cat([torch.where(early < end, early, -1), torch.where(held >= first, held, -1), nothing], dim=1)
    tokens = tokens[:, None, None, :]
    queries = (start.unsqueeze(1) + torch.arange(rows, device=start.device))[:, None, :, None]
    return (tokens >= 0) & (tokens <= queries) & ((tokens > queries - window) | (tokens < first))


def write_places(cache: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """A cache [B, KH, C, D] with rows [B, KH, S, D] at `places`, int64 [B, S]."""
    return cache.scatter(2, places[:, None, :, None].expand(rows.shape), rows.to(cache.dtype))


def attend_to_window(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    count: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int,
    first: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """What `windowed_attention` returns [B, N, S, Dv], from its caches once the rows are written."""
    torch._check(q.shape[0] == keys.shape[0])  # else Inductor would compile it for one size of a batch
    allowed = visible_rows(keys.shape[2], first, window, start, count, q.shape[2])
    return attend(q, keys, values, allowed, None, sinks, scale, softcap)


def windowed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    count: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int,
    first: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """In plain PyTorch operators; see `windowed_attention`."""
    rows, cache_rows = k.shape[2], k_cache.shape[2]
    places = row_places(cache_rows, first, start, count, rows)
    keys, values = write_places(k_cache, k, places), write_places(v_cache, v, places)
    options = {"scale": scale, "window": window, "first": first, "softcap": softcap}
    return attend_to_window(q, keys, values, start, count, sinks, **options), keys, values  # type: ignore[arg-type]


@torch.library.custom_op("skipstone::windowed_attention", mutates_args=())
def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    count: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int,
    first: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of S new tokens to the newest tokens of their sequence and the first ones, and to no others.

    Row i of sequence b stands at position p = ``start[b] + i`` and attends to the positions ``p - window < j <= p`` and
    ``j < first`` (attention sinks, arXiv 2309.17453), whatever the number of tokens a step has. Others need not be
    kept. Position j is in row j of the cache if ``j < first``, else in row ``first + (j - first) % ring`` with ``ring =
    window + STEP - 1``; the last row takes what is beyond `count`.

    Args:
        q: [B, N, S, D]; k: [B, KH, S, D]; v: [B, KH, S, Dv], with S at most `STEP`.
        k_cache: [B, KH, `window_rows`, D]; v_cache: [B, KH, `window_rows`, Dv].
        start: int64 [B], tokens that each sequence has already.
        count: int64 [B], the valid ones among its new ones, which come first; the others are not kept.
        sinks, scale, softcap, slot: as in `skipstone.ir.dialect.attention`.
    Returns:
        the output [B, N, S, Dv], and both caches after the write.
    """
    torch._check(k.shape[2] <= STEP, lambda: f"a step of {k.shape[2]} tokens, more than {STEP}")
    _check_rows(k_cache, window, first)
    _check_rows(v_cache, window, first)
    options = {"scale": scale, "window": window, "first": first, "softcap": softcap}
    operands = (q, k, v, k_cache, v_cache, start, count, sinks)
    out, keys, values = windowed_attention_reference(*operands, **options)  # type: ignore[arg-type]
    return out.contiguous(), keys, values


@windowed_attention.register_fake
def _(q, k, v, k_cache, v_cache, *_operands, window, first=0, **_options):  # type: ignore[no-untyped-def]
    _check_rows(k_cache, window, first)
    _check_rows(v_cache, window, first)
    return q.new_empty(*q.shape[:3], v.shape[-1]), torch.empty_like(k_cache), torch.empty_like(v_cache)


def _check_rows(cache: Tensor, window: int, first: int) -> None:
    found, rows = cache.shape[2], window_rows(window, first)
    torch._check(found == rows, lambda: f"a cache of {found} rows, a window takes {rows}")


WINDOWED_ATTENTION = torch.ops.skipstone.windowed_attention.default
