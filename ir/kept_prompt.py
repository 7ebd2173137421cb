"""Which rows of a prompt's keys and values are worth keeping, and where a sequence goes on once the others are gone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.ir.attention import attention_weights, query_key_products


def prompt_scores_reference(
    q: Tensor,
    k: Tensor,
    count: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    observed: int,
    first: int = 0,
    pool: int = 1,
    redundancy: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """In plain PyTorch operators; see `prompt_scores`."""
    batch, heads, rows, width = q.shape
    kv_heads = k.shape[1]
    columns = torch.arange(rows, device=q.device)
    newest = count.unsqueeze(1) - observed + torch.arange(observed, device=q.device)  # [B, observed]
    places = newest.clamp(min=0)[:, None, :, None].expand(batch, heads, observed, width)
    # A query before the first token sees nothing: its weights are zeros.
    allowed = columns <= newest[:, None, :, None]
    products = query_key_products(q.gather(2, places), k) * scale
    weights = attention_weights(products, allowed, None, sinks, softcap)  # [B, N, observed, S]
    mean = weights.sum(dim=2) / count.clamp(1, observed)[:, None, None]
    of_group = mean.reshape(batch, kv_heads, heads // kv_heads, rows).amax(dim=2)
    scores = F.max_pool2d(of_group, (1, pool), stride=1, padding=(0, pool // 2))  # max_pool1d would fix S when traced
    valid = (columns < count.unsqueeze(1)).unsqueeze(1)  # [B, 1, S]
    if redundancy > 0:
        unit = F.normalize(k.to(weights.dtype), dim=-1).masked_fill(~valid.unsqueeze(-1), 0)
        alike = ((unit * unit.sum(dim=2, keepdim=True)).sum(dim=-1) - 1) / count[:, None, None]
        repeated = alike.masked_fill(~valid, -torch.inf).softmax(dim=-1)
        scores = (1 - redundancy) * scores - redundancy * repeated
    always = (columns < first) | (columns >= (count - observed).unsqueeze(1))  # [B, S]
    return scores.masked_fill(always.unsqueeze(1), torch.inf).masked_fill(~valid, -torch.inf)


@torch.library.custom_op("skipstone::prompt_scores", mutates_args=())
def prompt_scores(
    q: Tensor,
    k: Tensor,
    count: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    observed: int,
    first: int = 0,
    pool: int = 1,
    redundancy: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """How much the end of a prompt looks at each of its tokens: what is worth keeping of its keys and values.

    A token's importance to a key-value head is the mean attention that the last `observed` queries pay to it, the
    largest of the head's query heads and of the `pool` tokens around it (SnapKV, arXiv 2404.14469). From it goes what
    others say, too (FlowCache, arXiv 2602.10825): ``(1 - redundancy) * importance - redundancy * repeated``, where
    `repeated` is the softmax over the tokens of the mean cosine between a token's key and all others.

    Args:
        q: [B, N, S, D]; k: [B, KH, S, D], the whole prompt, right-padded.
        count: int64 [B], valid tokens of each sequence.
        sinks: [N], learned sink logits.
        scale, softcap: as in `skipstone.ir.dialect.attention`.
        observed: how many of the last queries are asked.
        first: tokens at the beginning of a sequence that are always kept, as the last `observed` are.
        pool: odd number of tokens.
        redundancy: from 0 to 1.
    Returns:
        [B, KH, S] in the wider of float32 and q's dtype: infinity where a token is always kept, -infinity for padding.
    """
    options = {"scale": scale, "observed": observed, "first": first, "pool": pool, "redundancy": redundancy}
    return prompt_scores_reference(q, k, count, sinks, softcap=softcap, **options)  # type: ignore[arg-type]


@prompt_scores.register_fake
def _(q, k, count, sinks=None, **_options):  # type: ignore[no-untyped-def]
    torch._check(q.shape[0] == k.shape[0] == count.shape[0], lambda: "q, k and count differ in size")
    return q.new_empty(k.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def kept_start_reference(start: Tensor, decode_start: Tensor, *, rows: int) -> Tensor:
    """In plain PyTorch operators; see `kept_start`."""
    return start - (decode_start - rows).clamp(min=0)


@torch.library.custom_op("skipstone::kept_start", mutates_args=())
def kept_start(start: Tensor, decode_start: Tensor, *, rows: int) -> Tensor:
    """The cache row that a sequence goes on at, where no more than `rows` rows of its prompt are kept.

    Args:
        start: int64 [B], tokens that each sequence has.
        decode_start: int64 [B], how many of them are its prompt.
        rows: the most rows that are kept of a prompt.
    Returns:
        int64 [B].
    """
    return kept_start_reference(start, decode_start, rows=rows)


@kept_start.register_fake
def _(start, decode_start, *, rows):  # type: ignore[no-untyped-def]
    torch._check(start.shape == decode_start.shape, lambda: "a step needs one prompt a sequence")
    return torch.empty_like(start)


PROMPT_SCORES = torch.ops.skipstone.prompt_scores.default
KEPT_START = torch.ops.skipstone.kept_start.default
