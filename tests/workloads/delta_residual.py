"""A causal decoder whose skip path erases along a direction: x - beta k (k^T x) + branch(x), beta and k per token.

input_ids [B, S] -> logits [B, S, V].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.tiny_models import randomize
from tests.workloads.layers import BATCH, LAYERS, SEQUENCE, VOCABULARY, WIDTH, Attention, FeedForward, generator


class Delta(nn.Module):
    """The skip path: a reflection or projection along a learned direction."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.direction, self.strength = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        k, beta = nn.functional.normalize(self.direction(h), dim=-1), 2 * self.strength(h).sigmoid()
        return x - beta * k * (k * x).sum(-1, keepdim=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.delta1, self.delta2 = Delta(), Delta()
        self.attention, self.ffn = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = self.delta1(x) + self.attention(self.norm1(x), causal=True)
        return self.delta2(x) + self.ffn(self.norm2(x))


class DeltaDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and example inputs."""
    tokens = torch.randint(VOCABULARY, (batch, sequence), generator=generator(seed))
    return randomize(DeltaDecoder().eval(), seed), {"input_ids": tokens}
