"""A causal decoder with two heads (early exit, semantic and acoustic tokens): input_ids [B, S] -> two logits.

One head reads the stream of a middle layer, the other the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.tiny_models import randomize
from tests.workloads.inputs_embeds import Block
from tests.workloads.layers import BATCH, SEQUENCE, VOCABULARY, WIDTH, generator


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.lower, self.upper = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
        self.early, self.late = nn.Linear(WIDTH, 11), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(input_ids)
        for block in self.lower:
            x = block(x)
        early = self.early(x)
        for block in self.upper:
            x = block(x)
        return early, self.late(x)


def build(seed: int = 0, batch: int = BATCH, sequence: int = SEQUENCE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and example inputs."""
    tokens = torch.randint(VOCABULARY, (batch, sequence), generator=generator(seed))
    return randomize(TwoHeads().eval(), seed), {"input_ids": tokens}
