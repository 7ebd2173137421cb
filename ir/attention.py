"""The arithmetic of attention, in plain PyTorch: what the dialect's attention operators mean."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


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
    """``q @ k.T`` of queries [B, N, S, D] and the keys [B, KH, T, D] of their groups: [B, N, S, T], in float32 up."""
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


def key_bias_products(
    q: Tensor, key_bias: Tensor | None, frequencies: Tensor | None, columns: int, first_position: int
) -> Tensor | None:
    """The products of queries with a constant that all keys share before their rotation; None where there is none.

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
    if key_bias is None or frequencies is None:
        return None
    exact = torch.promote_types(q.dtype, torch.float32)
    positions = torch.arange(columns, device=q.device, dtype=exact) + first_position
    angles = positions * frequencies.to(exact).unsqueeze(1)  # [D, T]
    group = q.shape[1] // key_bias.shape[1]
    constant, turned = key_bias.to(exact).repeat_interleave(group, dim=1).unsqueeze(2)  # each [N, 1, D]
    q = q.to(exact)
    return torch.matmul(q * constant, angles.cos()) + torch.matmul(q * turned, angles.sin())
