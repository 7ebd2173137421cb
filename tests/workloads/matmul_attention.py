"""A decoder as research code writes it: matmul, softmax, matmul; the causal mask made inside; grouped queries repeated.

input_ids [B, S], position_ids [B, S] -> logits [B, S, V].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.tiny_models import randomize
from tests.workloads.layers import (
    BATCH,
    HEADS,
    LAYERS,
    SEQUENCE,
    VOCABULARY,
    WIDTH,
    FeedForward,
    generator,
    merge,
    split,
)  # fmt: skip

KV_HEADS, HEAD_DIM = HEADS // 2, WIDTH // HEADS


class GroupedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, KV_HEADS * HEAD_DIM) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = split(self.query(x))
        k, v = (split(t, KV_HEADS).repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (self.key(x), self.value(x)))
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
        return self.out(merge(scores.softmax(-1) @ v))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.ffn = GroupedAttention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class ResearchDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and example inputs."""
    return randomize(ResearchDecoder().eval(), seed), {
        "input_ids": torch.randint(VOCABULARY, (batch, sequence), generator=generator(seed)),
        "position_ids": torch.arange(sequence).repeat(batch, 1),
    }
