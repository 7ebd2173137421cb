"""The dialect: the `skipstone::` operators that programs use beside ATen.

Each operator is a `torch.library.custom_op` with an explicit fake and a plain-PyTorch body. That body is at once the
CPU kernel, the test oracle and the specification. Programs are functional: no operator writes to its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from skipstone.ir.attention import Kind as Kind
from skipstone.ir.attention import attend as attend
from skipstone.ir.attention import attention_weights as attention_weights
from skipstone.ir.attention import key_bias_products as key_bias_products
from skipstone.ir.attention import query_key_products as query_key_products
from skipstone.ir.attention import visible as visible
from skipstone.ir.attention import weighted_values as weighted_values
from skipstone.ir.experts import EXPERTS as EXPERTS
from skipstone.ir.experts import Activation as Activation
from skipstone.ir.experts import Layout as Layout
from skipstone.ir.experts import experts as experts
from skipstone.ir.experts import experts_reference as experts_reference
from skipstone.ir.gates import GATE as GATE
from skipstone.ir.gates import SKIP_PREDICATE as SKIP_PREDICATE
from skipstone.ir.gates import gate as gate
from skipstone.ir.gates import skip_predicate as skip_predicate
from skipstone.ir.keeping import KEEP as KEEP
from skipstone.ir.keeping import WRITE_CACHE as WRITE_CACHE
from skipstone.ir.keeping import keep as keep
from skipstone.ir.keeping import write_cache as write_cache
from skipstone.ir.keeping import write_rows
from skipstone.ir.kept_prompt import KEPT_START as KEPT_START
from skipstone.ir.kept_prompt import PROMPT_SCORES as PROMPT_SCORES
from skipstone.ir.kept_prompt import kept_start as kept_start
from skipstone.ir.kept_prompt import prompt_scores as prompt_scores
from skipstone.ir.matmul_nbits import MATMUL_NBITS as MATMUL_NBITS
from skipstone.ir.matmul_nbits import matmul_nbits as matmul_nbits
from skipstone.ir.predicated import PREDICATED_LINEAR as PREDICATED_LINEAR
from skipstone.ir.predicated import predicated_linear as predicated_linear
from skipstone.ir.prompts import PROMPT_MEAN as PROMPT_MEAN
from skipstone.ir.prompts import PROMPT_TURN as PROMPT_TURN
from skipstone.ir.prompts import prompt_mean as prompt_mean
from skipstone.ir.prompts import prompt_turn as prompt_turn
from skipstone.ir.quantized import QUANTIZED_CACHED_ATTENTION as QUANTIZED_CACHED_ATTENTION
from skipstone.ir.quantized import quantized_cached_attention as quantized_cached_attention
from skipstone.ir.windowed import WINDOWED_ATTENTION as WINDOWED_ATTENTION
from skipstone.ir.windowed import windowed_attention as windowed_attention


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
    products = key_bias_products(q, key_bias, frequencies, k.shape[2], first_position)
    return attend(q, k, v, allowed, bias, sinks, scale, softcap, products)


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
        slot: number of this attention, -1 for cross attention; those of one number share a cache slot, in which each
            writes over what the one before has written for the same tokens.
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
    keys, values = write_rows(k_cache, k, start), write_rows(v_cache, v, start)
    columns = torch.arange(capacity, device=q.device)
    allowed = visible(kind, window, positions[:, None, :, None], columns)
    if bias is not None:
        bias = F.pad(bias, (0, capacity - bias.shape[-1]))
    products = key_bias_products(q, key_bias, frequencies, capacity, first_position)
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
        sinks, key_bias, frequencies, scale, kind, window, softcap, slot, first_position: as in `attention`; row 0 of
            the cache stands at `first_position`. `kind` is causal, sliding or chunked.
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
CACHED_OPS = (CACHED_ATTENTION, QUANTIZED_CACHED_ATTENTION, WINDOWED_ATTENTION)
ATTENTION_OPS = (ATTENTION, *CACHED_OPS)
WRITING_OPS = (*CACHED_OPS, WRITE_CACHE)

START_PLACE = 5
"""Which operand of `CACHED_OPS` is the cache row that the new tokens are written from on."""


def key_bias_of(node: fx.Node) -> Any:
    """The `key_bias` operand of one of `ATTENTION_OPS`, None where it has none."""
    places: dict[Any, int] = {ATTENTION: 6, CACHED_ATTENTION: 8, QUANTIZED_CACHED_ATTENTION: 10}
    place = places.get(node.target)
    return node.args[place] if place is not None and len(node.args) > place else None


def cache_operands(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The buffers of the keys and those of the values that one of `WRITING_OPS` takes; see `first_buffer`."""
    place = 2 if node.target == WRITE_CACHE else 3
    keys, values = (list(each) if isinstance(each, list | tuple) else [each] for each in node.args[place : place + 2])
    return keys, values  # type: ignore[return-value]


def kept_rows(node: fx.Node) -> int:
    """The most rows of a prompt that the cache of one of `ATTENTION_OPS` holds, 0 for all of them."""
    start: Any = node.args[START_PLACE] if node.target in CACHED_OPS else None
    return int(start.kwargs["rows"]) if start is not None and start.target == KEPT_START else 0


def first_buffer(node: fx.Node) -> int:
    """Which output of one of `WRITING_OPS` replaces the first of its buffers; the others follow in their order."""
    return 0 if node.target == WRITE_CACHE else 1
