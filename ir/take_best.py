"""`skipstone::take_best_`: the choice of a greedy decode step, and what makes its result the input of the next step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("skipstone::take_best_", mutates_args=("tokens", "chosen", "number", "counted"))
def take_best_(logits: Tensor, tokens: Tensor, chosen: Tensor, number: Tensor, counted: Sequence[Tensor]) -> None:
    """Write the best token of each sequence where the next step reads it and into a list of them, and count.

    The best one is that of `torch.argmax`: of several, the first; not a number is better than any number.

    Args:
        logits: [B, V].
        tokens: int64 [B, 1], the input of the next step.
        chosen: int64 [B, M], whose column ``number[b]`` gets the token of sequence b.
        number: int64 [B], in [0, M), one more afterwards.
        counted: int64 of B elements each, one more afterwards.
    """
    tokens.copy_(logits.argmax(dim=-1, keepdim=True))
    chosen.scatter_(1, number.unsqueeze(1), tokens)
    for each in (number, *counted):
        each.add_(1)


@take_best_.register_fake
def _(logits, tokens, chosen, number, counted):  # type: ignore[no-untyped-def]
    return None
