"""Hyper-connections: N residual streams; each branch reads a mixture of them and writes to all, mixed per token.

input_ids [B, S] -> logits [B, S, V].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.tiny_models import randomize
from tests.workloads.layers import BATCH, LAYERS, SEQUENCE, VOCABULARY, WIDTH, Attention, FeedForward, generator

STREAMS = 3


class Mixer(nn.Module):
    """How one branch is wired: weights to read with, to write with, and a matrix from streams to streams."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dynamic = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, STREAMS + 2, bias=False)
        self.read = nn.Parameter(torch.full((STREAMS,), 1 / STREAMS))
        self.write = nn.Parameter(torch.ones(STREAMS))
        self.mix = nn.Parameter(torch.eye(STREAMS))

    def forward(self, streams: Tensor, branch: nn.Module, **options: bool) -> Tensor:
        change = self.dynamic(self.norm(streams)).tanh()  # [B, S, N, N + 2]
        read, write, mix = self.read + change[..., 0], self.write + change[..., 1], self.mix + change[..., 2:]
        out = branch((read[..., None] * streams).sum(-2), **options)
        return mix.transpose(-1, -2) @ streams + write[..., None] * out[..., None, :]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer1, self.mixer2 = Mixer(), Mixer()
        self.attention, self.ffn = Attention(), FeedForward()

    def forward(self, streams: Tensor) -> Tensor:
        return self.mixer2(self.mixer1(streams, self.attention, causal=True), self.ffn)


class HyperDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        streams = self.words(input_ids)[..., None, :].expand(-1, -1, STREAMS, -1)
        for block in self.blocks:
            streams = block(streams)
        return self.head(self.norm(streams.sum(-2)))


def build(seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and example inputs."""
    tokens = torch.randint(VOCABULARY, (batch, sequence), generator=generator(seed))
    return randomize(HyperDecoder().eval(), seed), {"input_ids": tokens}
