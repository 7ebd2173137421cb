"""A causal decoder over features instead of tokens (speech and vision prefixes): inputs_embeds [B, S, D] -> logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.tiny_models import randomize
from tests.workloads.layers import (
    BATCH,
    LAYERS,
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
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.ffn = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), causal=True)
        return x + self.ffn(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds + self.positions(torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and example inputs."""
    module = randomize(Decoder().eval(), seed)
    return module, {"inputs_embeds": torch.randn(batch, sequence, WIDTH, generator=generator(seed))}
