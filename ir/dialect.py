"""The dialect: the `skipstone::` operators that programs use beside ATen.

Each operator is a `torch.library.custom_op` with an explicit fake and a plain-PyTorch body. That body is at once the
CPU kernel, the test oracle and the specification. Programs are functional: no operator writes to its arguments.
"""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.ir.experts import EXPERTS as EXPERTS
from skipstone.ir.experts import Activation as Activation
from skipstone.ir.experts import Layout as Layout
from skipstone.ir.experts import experts as experts


class Kind(StrEnum):
    """Which keys a query may attend to, before any mask.

    With query position i, key position j and window w: causal ``j <= i``; sliding ``i - w < j <= i``; chunked
    ``j <= i and j // w == i // w``; block-causal ``j // w <= i // w``; bidirectional all keys, or ``|i - j| <= w`` when
    ``w > 0``; explicit leaves everything to the mask.
    """

    CAUSAL = "causal"
    SLIDING = "sliding"
    CHUNKED = "chunked"
    BLOCK_CAUSAL = "block_causal"
    BIDIRECTIONAL = "bidirectional"
    EXPLICIT = "explicit"


def visible(kind: str, window: int, queries: Tensor, keys: Tensor) -> Tensor | None:
    """The boolean pattern of `kind` for integer positions that broadcast; None when all keys are visible."""
    match Kind(kind):
        case Kind.CAUSAL:
            return keys <= queries
        case Kind.SLIDING:
            return (keys <= queries) & (keys > queries - window)
        case Kind.CHUNKED:
            return (keys <= queries) & (_block(keys, window) == _block(queries, window))
        case Kind.BLOCK_CAUSAL:
            return _block(keys, window) <= _block(queries, window)
        case Kind.BIDIRECTIONAL:
            return (keys - queries).abs() <= window if window > 0 else None
        case Kind.EXPLICIT:
            return None


def _block(positions: Tensor, size: int) -> Tensor:
    return torch.div(positions, size, rounding_mode="floor")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Softmax attention with grouped heads, in the wider of float32 and the input's dtype.

    Args:
        q: [B, N, S, D]; k: [B, KH, T, D]; v: [B, KH, T, Dv], N a multiple of KH.
        allowed: bool, broadcasts to [B, N, S, T]; a query that may attend to nothing gets zeros.
        bias: float, broadcasts to [B, N, S, T], added after scale and softcap.
        sinks: [N], one extra logit per head that takes probability and gives nothing.
        softcap: 0 for none, else logits become ``softcap * tanh(logits / softcap)``.
    Returns:
        [B, N, S, Dv] in q's dtype.
    """
    batch, heads, rows, width = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    group = heads // kv_heads
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(exact).reshape(batch, kv_heads, group * rows, width)
    logits = (torch.matmul(grouped, k.to(exact).transpose(2, 3)) * scale).reshape(batch, heads, rows, columns)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.to(exact)
    if allowed is not None:
        logits = torch.where(allowed, logits, torch.full((), -torch.inf, dtype=exact, device=q.device))
    peak = logits.amax(dim=-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.to(exact).reshape(1, heads, 1, 1))
    peak = torch.where(peak == -torch.inf, torch.zeros_like(peak), peak)
    weights = torch.exp(logits - peak)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.to(exact).reshape(1, heads, 1, 1) - peak)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    mixed = torch.matmul(weights.reshape(batch, kv_heads, group * rows, columns), v.to(exact))
    return mixed.reshape(batch, heads, rows, v.shape[-1]).to(q.dtype)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    kind: str,
    window: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
) -> Tensor:
    """One attention over a whole sequence, in plain PyTorch operators; see `attention`."""
    queries = torch.arange(q.shape[2], device=q.device).unsqueeze(1)
    keys = torch.arange(k.shape[2], device=q.device).unsqueeze(0)
    allowed = visible(kind, window, queries, keys)
    if mask is not None:
        allowed = mask if allowed is None else mask & allowed
    return attend(q, k, v, allowed, bias, sinks, scale, softcap)


@torch.library.custom_op("skipstone::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    kind: str,
    window: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
) -> Tensor:
    """One attention over a whole sequence.

    Args:
        q: [B, N, S, D]; k: [B, KH, T, D]; v: [B, KH, T, Dv]. Heads are never expanded: N is a multiple of KH (GQA).
        mask: bool, broadcasts to [B, N, S, T], True where a query may attend; combined with `kind` by "and".
        bias: float, broadcasts to [B, N, S, T], added to the logits.
        sinks: [N], learned sink logits.
        scale: factor of the logits.
        kind, window: the visibility pattern, see `Kind`.
        softcap: tanh cap of the logits, 0 for none.
        slot: number of this attention in call order, which becomes its cache slot; -1 for cross attention.
    Returns:
        [B, N, S, Dv], contiguous.
    """
    options = {"scale": scale, "kind": kind, "window": window, "softcap": softcap}
    return attention_reference(q, k, v, mask, bias, sinks, **options).contiguous()  # type: ignore[arg-type]


@attention.register_fake
def _(q, k, v, mask=None, bias=None, sinks=None, *, scale, kind, window=0, softcap=0.0, slot=-1):  # type: ignore[no-untyped-def]
    _check_shapes(q, k, v, mask, bias)
    return q.new_empty(*q.shape[:3], v.shape[-1])


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor | None) -> None:
    """Refuse operands that do not fit; while tracing, this is what tells that their sizes are the same."""
    torch._check(q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3], lambda: "q, k and v differ in size")
    torch._check(q.shape[1] % k.shape[1] == 0, lambda: "query heads are no multiple of key heads")
    for mask in masks:
        if mask is not None:
            torch.broadcast_shapes(mask.shape, (*q.shape[:3], k.shape[2]))


def cached_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    kind: str,
    window: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention through a fixed-capacity cache, in plain PyTorch operators; see `cached_attention`."""
    rows, capacity = k.shape[2], k_cache.shape[2]
    positions = start.unsqueeze(1) + torch.arange(rows, device=q.device)  # [B, S]
    index = positions[:, None, :, None]
    keys = k_cache.scatter(2, index.expand(*k.shape), k.to(k_cache.dtype))
    values = v_cache.scatter(2, index.expand(*v.shape), v.to(v_cache.dtype))
    columns = torch.arange(capacity, device=q.device)
    allowed = visible(kind, window, positions[:, None, :, None], columns)
    if bias is not None:
        bias = F.pad(bias, (0, capacity - bias.shape[-1]))
    return attend(q, keys, values, allowed, bias, sinks, scale, softcap), keys, values


@torch.library.custom_op("skipstone::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    kind: str,
    window: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of S new tokens over a cache of fixed capacity C, which they are written into first.

    Row i of sequence b stands at position ``start[b] + i``: its key and value go to that row of the cache, and it
    attends to cache rows ``j <= start[b] + i`` that `kind` allows. Rows beyond the valid length of a right-padded
    sequence are written too; they lie after every valid query, so that they are overwritten before anyone reads them.

    Args:
        q: [B, N, S, D]; k: [B, KH, S, D]; v: [B, KH, S, Dv].
        k_cache: [B, KH, C, D]; v_cache: [B, KH, C, Dv], with ``start + S <= C``.
        start: int64 [B], the number of rows already in the cache.
        bias: float, broadcasts to [B, N, S, C]; sinks, scale, kind, window, softcap, slot: as in `attention`. `kind` is
            causal, sliding or chunked.
    Returns:
        the output [B, N, S, Dv] and both caches after the write.
    """
    options = {"scale": scale, "kind": kind, "window": window, "softcap": softcap}
    out, keys, values = cached_attention_reference(q, k, v, k_cache, v_cache, start, bias, sinks, **options)  # type: ignore[arg-type]
    return out.contiguous(), keys, values


@cached_attention.register_fake
def _(q, k, v, k_cache, v_cache, start, bias=None, sinks=None, *, scale, kind, window=0, softcap=0.0, slot=-1):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[-1]), torch.empty_like(k_cache), torch.empty_like(v_cache)


ATTENTION = torch.ops.skipstone.attention.default
CACHED_ATTENTION = torch.ops.skipstone.cached_attention.default
ATTENTION_OPS = (ATTENTION, CACHED_ATTENTION)
