"""A transformer that is handed its masks (parallel decoding, interleaved modalities): x [B, S, D], mask [B, 1, S, S].

The mask is added to the scores, and differs between the rows of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.tiny_models import randomize
from tests.workloads.layers import BATCH, LAYERS, SEQUENCE, WIDTH, Attention, FeedForward, generator

DYNAMIC = {"x": (0, 1), "mask": (0, 2, 3)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.ffn = Attention(), FeedForward()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))


class MaskedTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


def build(seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and example inputs; every token may at least see itself."""
    random = generator(seed)
    seen = torch.rand(batch, 1, sequence, sequence, generator=random).lt(0.6) | torch.eye(sequence, dtype=torch.bool)
    return randomize(MaskedTransformer().eval(), seed), {
        "x": torch.randn(batch, sequence, WIDTH, generator=random),
        "mask": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
    }
