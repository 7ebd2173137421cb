"""Visual autoregression by scales (VAR): a token sees its own and all coarser scales; AdaLN by class and scale.

x [B, S, D], level [B, S] (scale of each token), label [B] -> logits [B, S, V].
"""

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
    modulate,
)  # fmt: skip

DYNAMIC = {"x": (0, 1), "level": (0, 1), "label": (0,)}
LEVELS = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.ffn = Attention(), FeedForward()
        self.condition = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attention(modulate(x, shift1, scale1), mask)
        return x + gate2 * self.ffn(modulate(x, shift2, scale2))


class ScaleDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.labels, self.levels = nn.Embedding(10, WIDTH), nn.Embedding(LEVELS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor, level: Tensor, label: Tensor) -> Tensor:
        condition = nn.functional.silu(self.labels(label)[:, None, :] + self.levels(level))
        mask = (level[:, :, None] >= level[:, None, :])[:, None]
        for block in self.blocks:
            x = block(x, condition, mask)
        return self.head(self.norm(x))


def build(seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and example inputs."""
    random = generator(seed)
    return randomize(ScaleDecoder().eval(), seed), {
        "x": torch.randn(batch, sequence, WIDTH, generator=random),
        # Scales grow: 1 token, then 2, then 4, ... of the next one.
        "level": (torch.arange(sequence) + 1).log2().floor().long().clamp(max=LEVELS - 1).repeat(batch, 1),
        "label": torch.randint(10, (batch,), generator=random),
    }
