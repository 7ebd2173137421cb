"""What `skipstone::take_best_` is asked for wherever it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WIDTHS = (1, 99, 1024, 1025, 5000)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST = 7

Run = Callable[..., Any]
"""An implementation of `skipstone.ir.take_best.take_best_`."""


def logits_of(width: int, dtype: torch.dtype) -> Tensor:
    """[9, width]: rows with many equal numbers, zeros of both signs, infinities, and what is not a number."""
    logits = torch.randint(-4, 4, (9, width)).to(dtype)
    logits[0] = float("-inf")
    logits[1, width // 2] = float("nan")
    logits[2, -1] = 9
    logits[3] = -0.0
    logits[3, width // 3] = 0.0
    logits[4] = -torch.rand(width).to(dtype) - 1
    logits[5, width // 2 :] = float("inf")
    logits[6] = float("nan")
    logits[7, -1], logits[7, 0] = float("nan"), float("inf")
    return logits


def check(run: Run, width: int, dtype: torch.dtype, *, device: str = "cpu", strided: bool = False) -> None:
    """Each sequence gets its best token, in its next column, and is counted; nothing else is written."""
    logits = logits_of(width, dtype)
    batch = len(logits)
    number = torch.arange(batch) % MOST
    tokens, chosen = torch.full((batch, 1), -1), torch.full((batch, MOST), -1)
    counted = [torch.arange(batch) * 3, torch.arange(batch).unsqueeze(1) + 1]
    given = torch.stack([logits, logits], dim=1)[:, 1] if strided else logits
    there: list[Any] = [each.clone().to(device) for each in (tokens, chosen, number)]
    counts = [each.clone().to(device) for each in counted]
    run(given.to(device), *there, counts)
    best = logits.argmax(dim=-1, keepdim=True)
    wanted = [best, chosen.scatter(1, number.unsqueeze(1), best), number + 1, *(each + 1 for each in counted)]
    for found, each in zip((*there, *counts), wanted, strict=True):
        assert torch.equal(found.cpu(), each)
