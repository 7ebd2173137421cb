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
    products: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped heads, in the wider of float32 and the input's dtype.

    Args:
        q: [B, N, S, D]; k: [B, KH, T, D]; v: [B, KH, T, Dv], N a multiple of KH.
        allowed, bias, sinks, softcap: see `attention_weights`.
        scale: factor of the products of queries and keys.
        products: [B, N, S, T], added to those products before they are scaled; see `key_bias_products`.
    Returns:
        [B, N, S, Dv] in q's dtype.
    """
    logits = query_key_products(q, k)
    if products is not None:
        logits = logits + products
    weights = attention_weights(logits * scale, allowed, bias, sinks, softcap)
    return weighted_values(weights, v).to(q.dtype)


def query_key_products(q: Tensor, k: Tensor) -> Tensor:
    """``q @ k.T`` of queries [B, N, S, D] and the keys [B, KH, T, D] of their groups: [B, N, S, T], float32 or wider."""
    batch, heads, rows, width = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(exact).reshape(batch, kv_heads, heads // kv_heads * rows, width)
    return torch.matmul(grouped, k.to(exact).transpose(2, 3)).reshape(batch, heads, rows, columns)


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """``weights @ v`` of weights [B, N, S, T] and the values [B, KH, T, Dv] of their groups: [B, N, S, Dv]."""
    batch, heads, rows, columns = weights.shape
    kv_heads = v.shape[1]
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads * rows, columns)
    return torch.matmul(grouped, v.to(weights.dtype)).reshape(batch, heads, rows, v.shape[-1])


def attention_weights(
    logits: Tensor, allowed: Tensor | None, bias: Tensor | None, sinks: Tensor | None, softcap: float
) -> Tensor:
    """The softmax of scaled logits [B, N, S, T].

    Args:
        allowed: bool, broadcasts to the logits; a query that may attend to nothing gets zeros.
        bias: float, broadcasts to the logits, added after the cap.
        sinks: [N], one extra logit per head that takes probability and gives nothing.
        softcap: 0 for none, else logits become ``softcap * tanh(logits / softcap)``.
    """
    exact, heads = logits.dtype, logits.shape[1]
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.to(exact)
    if allowed is not None:
        logits = torch.where(allowed, logits, torch.full((), -torch.inf, dtype=exact, device=logits.device))
    peak = logits.amax(dim=-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.to(exact).reshape(1, heads, 1, 1))
    peak = torch.where(peak == -torch.inf, torch.zeros_like(peak), peak)
    weights = torch.exp(logits - peak)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.to(exact).reshape(1, heads, 1, 1) - peak)
    return weights / torch.where(total == 0, torch.ones_like(total), total)


def key_bias_products(q: Tensor, key_bias: Tensor, frequencies: Tensor, columns: int, first_position: int) -> Tensor:
    """The products of queries with a constant that all keys share before their rotation.

    The constant b of a key projection's bias reaches the key of position p as ``R(p) b``, with R the rotary embedding
    (arXiv 2104.09864). So ``q . R(p) b = (q * b) . cos(p w) + (q * b') . sin(p w)`` with ``b' = rotate_half(b)``, and
    keys can be stored without it.

    Args:
        q: [B, N, S, D], rotated.
        key_bias: [2, KH, D], b and b'.
        frequencies: [D], the angle w that each channel turns by from one position to the next; 0 where none does.
        columns: number of keys T; key j stands at position ``first_position + j``.
    Returns:
        [B, N, S, T], float32 or wider.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    positions = torch.arange(columns, device=q.device, dtype=exact) + first_position
    angles = positions * frequencies.to(exact).unsqueeze(1)  # [D, T]
    group = q.shape[1] // key_bias.shape[1]
    constant, turned = key_bias.to(exact).repeat_interleave(group, dim=1).unsqueeze(2)  # each [N, 1, D]
    q = q.to(exact)
    return torch.matmul(q * constant, angles.cos()) + torch.matmul(q * turned, angles.sin())


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    frequencies: Tensor | None = None,
    *,
    scale: float,
    kind: str,
    window: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
    first_position: int = 0,
) -> Tensor:
    """One attention over a whole sequence, in plain PyTorch operators; see `attention`."""
    queries = torch.arange(q.shape[2], device=q.device).unsqueeze(1)
    keys = torch.arange(k.shape[2], device=q.device).unsqueeze(0)
    allowed = visible(kind, window, queries, keys)
    if mask is not None:
        allowed = mask if allowed is None else mask & allowed
    products = _key_bias_products(q, key_bias, frequencies, k.shape[2], first_position)
    return attend(q, k, v, allowed, bias, sinks, scale, softcap, products)


def _key_bias_products(
    q: Tensor, key_bias: Tensor | None, frequencies: Tensor | None, columns: int, first_position: int
) -> Tensor | None:
    if key_bias is None or frequencies is None:
        return None
    return key_bias_products(q, key_bias, frequencies, columns, first_position)


@torch.library.custom_op("skipstone::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    frequencies: Tensor | None = None,
    *,
    scale: float,
    kind: str,
    window: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
    first_position: int = 0,
) -> Tensor:
    """One attention over a whole sequence.

    Args:
        q: [B, N, S, D]; k: [B, KH, T, D]; v: [B, KH, T, Dv]. Heads are never expanded: N is a multiple of KH (GQA).
        mask: bool, broadcasts to [B, N, S, T], True where a query may attend; combined with `kind` by "and".
        bias: float, broadcasts to [B, N, S, T], added to the logits.
        sinks: [N], learned sink logits.
        key_bias, frequencies: a rotated constant that belongs to every key but is not in `k`; `key_bias_products`.
        scale: factor of the logits.
        kind, window: the visibility pattern, see `Kind`.
        softcap: tanh cap of the logits, 0 for none.
        slot: number of this attention in call order, which becomes its cache slot; -1 for cross attention.
        first_position: position of the first key, for `key_bias`.
    Returns:
        [B, N, S, Dv], contiguous.
    """
    options = {"scale": scale, "kind": kind, "window": window, "softcap": softcap, "first_position": first_position}
    out = attention_reference(q, k, v, mask, bias, sinks, key_bias, frequencies, **options)  # type: ignore[arg-type]
    return out.contiguous()


@attention.register_fake
def _(q, k, v, mask=None, bias=None, *_constants, **_options):  # type: ignore[no-untyped-def]
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
    key_bias: Tensor | None = None,
    frequencies: Tensor | None = None,
    *,
    scale: float,
    kind: str,
    window: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
    first_position: int = 0,
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
    products = _key_bias_products(q, key_bias, frequencies, capacity, first_position)
    return attend(q, keys, values, allowed, bias, sinks, scale, softcap, products), keys, values


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
    key_bias: Tensor | None = None,
    frequencies: Tensor | None = None,
    *,
    scale: float,
    kind: str,
    window: int = 0,
    softcap: float = 0.0,
    slot: int = -1,
    first_position: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of S new tokens over a cache of fixed capacity C, which they are written into first.

    Row i of sequence b stands at position ``start[b] + i``: its key and value go to that row of the cache, and it
    attends to cache rows ``j <= start[b] + i`` that `kind` allows. Rows beyond the valid length of a right-padded
    sequence are written too; they lie after every valid query, so that they are overwritten before anyone reads them.

    Args:
        q: [B, N, S, D]; k: [B, KH, S, D]; v: [B, KH, S, Dv].
        k_cache: [B, KH, C, D]; v_cache: [B, KH, C, Dv], with ``start + S <= C``.
        start: int64 [B], the number of rows already in the cache.
        bias: float, broadcasts to [B, N, S, C].
        sinks, key_bias, frequencies, scale, kind, window, softcap, slot, first_position: as in `attention`; row 0 of the
            cache stands at `first_position`. `kind` is causal, sliding or chunked.
    Returns:
        the output [B, N, S, Dv] and both caches after the write.
    """
    options = {"scale": scale, "kind": kind, "window": window, "softcap": softcap, "first_position": first_position}
    operands = (q, k, v, k_cache, v_cache, start, bias, sinks, key_bias, frequencies)
    out, keys, values = cached_attention_reference(*operands, **options)  # type: ignore[arg-type]
    return out.contiguous(), keys, values


@cached_attention.register_fake
def _(q, k, v, k_cache, v_cache, *_operands, **_options):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[-1]), torch.empty_like(k_cache), torch.empty_like(v_cache)


ATTENTION = torch.ops.skipstone.attention.default
CACHED_ATTENTION = torch.ops.skipstone.cached_attention.default
ATTENTION_OPS = (ATTENTION, CACHED_ATTENTION)
