"""A decoder with partial, interleaved rotary positions, normed queries and keys, and soft-capped scores.

input_ids [B, S], position_ids [B, S] -> logits [B, S, V].
"""

from __future__ import annotations

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

HEAD_DIM, ROTATED, CAP = WIDTH // HEADS, 4, 3.0


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the first `ROTATED` channels of each head, in neighbouring pairs, by angles [B, 1, S, ROTATED / 2]."""
    turned, kept = x[..., :ROTATED].unflatten(-1, (-1, 2)), x[..., ROTATED:]
    a, b = turned.unbind(-1)
    turned = torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)
    return torch.cat([turned.flatten(-2), kept], dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query_norm, self.key_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.qkv, self.out, self.ffn = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), FeedForward()

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (split(t) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        q, k = rotate(self.query_norm(q), angles), rotate(self.key_norm(k), angles)
        scores = CAP * (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5 / CAP).tanh()
        future = torch.full((x.shape[1], x.shape[1]), -torch.inf, device=x.device).triu(1)
        x = x + self.out(merge((scores + future).softmax(-1) @ v))
        return x + self.ffn(self.norm2(x))


class RotaryDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(0, ROTATED, 2) / ROTATED), persistent=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x, angles = self.words(input_ids), (position_ids[..., None] * self.frequencies)[:, None]
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.norm(x))


def build(seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and example inputs."""
    return randomize(RotaryDecoder().eval(), seed), {
        "input_ids": torch.randint(VOCABULARY, (batch, sequence), generator=generator(seed)),
        "position_ids": torch.arange(sequence).repeat(batch, 1),
    }
