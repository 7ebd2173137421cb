"""What a prompt looks like from inside: features of whole prompts, by which the way they are continued is chosen.

Both operators look at the valid tokens of each sequence alone, so that neither padding nor the rest of a batch changes
what is chosen for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

_SMALLEST = 1e-12
"""Mean square below which a token's vector is not scaled up to unit size."""


@torch.library.custom_op("skipstone::prompt_turn", mutates_args=())
def prompt_turn(before: Tensor, after: Tensor, count: Tensor) -> Tensor:
    """How far a sublayer turns the stream over a prompt: the mean over its tokens of 1 - cosine.

    It is computed from the chord between unit vectors, see `skipstone.ir.similarity`.

    Args:
        before, after: the stream [B, S, H] before the sublayer, and after its result was added.
        count: int64 [B], valid tokens of each sequence, at least 1; they come first.
    Returns:
        [B], in the wider of float32 and the stream's dtype.
    """
    return prompt_turn_reference(before, after, count)


def prompt_turn_reference(before: Tensor, after: Tensor, count: Tensor) -> Tensor:
    """`prompt_turn` in plain PyTorch operators."""
    chord = normalize(_exact(before), dim=-1) - normalize(_exact(after), dim=-1)
    return _mean(chord.square().sum(dim=-1, keepdim=True) / 2, count).squeeze(-1)


@prompt_turn.register_fake
def _(before, after, count):  # type: ignore[no-untyped-def]
    torch._check(before.shape == after.shape, lambda: "the stream before and after differ in size")
    torch._check(before.shape[:1] == count.shape, lambda: "a prompt needs one count a sequence")
    return before.new_empty(before.shape[:1], dtype=torch.promote_types(before.dtype, torch.float32))


@torch.library.custom_op("skipstone::prompt_mean", mutates_args=())
def prompt_mean(x: Tensor, count: Tensor) -> Tensor:
    """The mean state of a prompt: of its tokens' vectors, each scaled to a mean square of 1.

    Args:
        x: the stream [B, S, H].
        count: int64 [B], valid tokens of each sequence, at least 1; they come first.
    Returns:
        [B, H], in the wider of float32 and the stream's dtype.
    """
    return prompt_mean_reference(x, count)


def prompt_mean_reference(x: Tensor, count: Tensor) -> Tensor:
    """`prompt_mean` in plain PyTorch operators; gradients pass through it."""
    exact = _exact(x)
    return _mean(exact * exact.square().mean(dim=-1, keepdim=True).clamp(min=_SMALLEST).rsqrt(), count)


@prompt_mean.register_fake
def _(x, count):  # type: ignore[no-untyped-def]
    torch._check(x.shape[:1] == count.shape, lambda: "a prompt needs one count a sequence")
    return x.new_empty((x.shape[0], x.shape[2]), dtype=torch.promote_types(x.dtype, torch.float32))


PROMPT_TURN = torch.ops.skipstone.prompt_turn.default
PROMPT_MEAN = torch.ops.skipstone.prompt_mean.default


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(values: Tensor, count: Tensor) -> Tensor:
    """The mean [B, W] over the first `count` rows of [B, S, W]."""
    valid = torch.arange(values.shape[1], device=values.device) < count.unsqueeze(1)
    return values.masked_fill(~valid.unsqueeze(-1), 0).sum(dim=1) / count.unsqueeze(1)
