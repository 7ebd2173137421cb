"""Reading tokens into a cache, in as many steps as it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.runtime.cache import Cache
from skipstone.runtime.session import Session, longest_step


def read(session: Session, tokens: Tensor, positions: Tensor, counts: Tensor, rows: Tensor, cache: Cache) -> Tensor:
    """Run a session on new tokens, and count them in.

    Args:
        tokens: int64 [B, S], right-padded.
        positions: int64 [B, S].
        counts: int64 [B], valid tokens of each row.
        rows: int64 [B, R], the rows whose logits are wanted.
        cache: with room for S more tokens in each sequence.
    Returns:
        logits [B, R, V], which nothing overwrites.
    """
    width = tokens.shape[1]
    limit = longest_step(session.layout) or width
    if width <= limit:
        logits = session.step(tokens, positions, counts, rows, cache).clone()
        cache.advance(counts)
        return logits
    result: Tensor | None = None
    for begin in range(0, width, limit):
        end = min(begin + limit, width)
        inside = (rows >= begin) & (rows < end)
        wanted = inside.any(dim=0).nonzero().flatten()
        asked = wanted if len(wanted) else wanted.new_zeros(1)  # a step gives one row at least
        own = (rows[:, asked] - begin).clamp(0, end - begin - 1)
        valid = (counts - begin).clamp(0, end - begin)
        logits = session.step(tokens[:, begin:end], positions[:, begin:end], valid, own, cache)
        cache.advance(valid)
        if result is None:
            result = logits.new_zeros(*rows.shape, logits.shape[-1])
        result[:, asked] = torch.where(inside[:, asked].unsqueeze(-1), logits, result[:, asked])
    assert result is not None
    return result
