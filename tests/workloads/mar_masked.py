"""Masked autoregression over continuous tokens (MAR): a bidirectional trunk, and an MLP head that removes noise.

x [B, S, C], masked [B, S] bool, noisy [B, S, C], time [B, S] -> {"noise" [B, S, C], "hidden" [B, S, D]}.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.tiny_models import randomize
from tests.workloads.layers import BATCH, LAYERS, SEQUENCE, WIDTH, Attention, FeedForward, generator, modulate

CHANNELS = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.ffn = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class NoiseHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time = nn.Linear(1, WIDTH)
        self.condition = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.ffn = nn.ModuleList(FeedForward() for _ in range(2))

    def forward(self, noisy: Tensor, time: Tensor, hidden: Tensor) -> Tensor:
        x, condition = self.enter(noisy), nn.functional.silu(hidden + self.time(time[..., None]))
        for linear, ffn in zip(self.condition, self.ffn, strict=True):
            shift, scale, gate = linear(condition).chunk(3, dim=-1)
            x = x + gate * ffn(modulate(x, shift, scale))
        return self.leave(x)


class MaskedTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(CHANNELS, WIDTH), NoiseHead()
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor, masked: Tensor, noisy: Tensor, time: Tensor) -> dict[str, Tensor]:
        hidden = torch.where(masked[..., None], self.mask_token, self.enter(x))
        for block in self.blocks:
            hidden = block(hidden)
        return {"noise": self.head(noisy, time, hidden), "hidden": hidden}


def build(seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and example inputs."""
    random = generator(seed)
    return randomize(MaskedTrunk().eval(), seed), {
        "x": torch.randn(batch, sequence, CHANNELS, generator=random),
        "masked": torch.rand(batch, sequence, generator=random) < 0.5,
        "noisy": torch.randn(batch, sequence, CHANNELS, generator=random),
        "time": torch.rand(batch, sequence, generator=random),
    }
