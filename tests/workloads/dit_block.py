"""Diffusion transformer (DiT): bidirectional blocks with adaLN-zero gates from time and class.

x [B, S, C], time [B], label [B] -> (noise [B, S, C], variance [B, S, C]).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.tiny_models import randomize
from tests.workloads.layers import BATCH, LAYERS, SEQUENCE, WIDTH, generator, modulate
from tests.workloads.var_block_causal import Block

DYNAMIC = {"x": (0, 1), "time": (0,), "label": (0,)}
CHANNELS = 6


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, 2 * CHANNELS)
        self.time, self.labels = nn.Linear(WIDTH, WIDTH), nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.condition = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        waves = time[:, None] * torch.exp(-torch.arange(WIDTH // 2, device=x.device) / 4)
        condition = self.time(torch.cat([waves.cos(), waves.sin()], dim=-1)) + self.labels(label)
        condition = nn.functional.silu(condition)[:, None, :]
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, condition, None)
        shift, scale = self.condition(condition).chunk(2, dim=-1)
        noise, variance = self.leave(modulate(x, shift, scale)).chunk(2, dim=-1)
        return noise, variance


def build(seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights (gates included: zero gates would hide every block), and example inputs."""
    random = generator(seed)
    return randomize(DiT().eval(), seed), {
        "x": torch.randn(batch, sequence, CHANNELS, generator=random),
        "time": 10 * torch.rand(batch, generator=random),
        "label": torch.randint(10, (batch,), generator=random),
    }
