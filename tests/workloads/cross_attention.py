"""A causal decoder that also attends to a memory (speech recognition, captioning, text to speech).

input_ids [B, S], memory [B, M, D] -> logits [B, S, V].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.tiny_models import randomize
from tests.workloads.layers import (
    BATCH,
    LAYERS,
    MEMORY,
    SEQUENCE,
    VOCABULARY,
    WIDTH,
    Attention,
    FeedForward,
    generator,
)  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention, self.cross, self.ffn = Attention(), Attention(), FeedForward()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), causal=True)
        x = x + self.cross(self.norm2(x), memory=memory)
        return x + self.ffn(self.norm3(x))


class CrossDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, memory: Tensor) -> Tensor:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x, memory)
        return self.head(self.norm(x))


def build(
    seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE, memory: int = MEMORY
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and example inputs."""
    random = generator(seed)
    return randomize(CrossDecoder().eval(), seed), {
        "input_ids": torch.randint(VOCABULARY, (batch, sequence), generator=random),
        "memory": torch.randn(batch, memory, WIDTH, generator=random),
    }
