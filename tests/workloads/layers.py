"""What the workloads share: sizes, self-attention, a feed-forward block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 3, 61
BATCH, SEQUENCE, MEMORY = 3, 7, 5
"""Example sizes: distinct primes, so that no axis is mistaken for another."""


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to `memory`."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, memory: Tensor | None = None
    ) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (split(t) for t in (self.query(x), self.key(source), self.value(source)))
        return self.out(merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)))


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """[B, S, H * D] -> [B, H, S, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H * D]."""
    return x.transpose(1, 2).flatten(-2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then a scale and a shift per token."""
    return F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift


def generator(seed: int) -> torch.Generator:
    """A source of example inputs."""
    return torch.Generator().manual_seed(seed)
