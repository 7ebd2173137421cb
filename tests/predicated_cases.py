"""What `skipstone::predicated_linear` is asked for wherever it runs, and the check against products in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error over the largest result."""

SHAPES = [
    (1, 1, 64, 48),
    (3, 1, 33, 17),  # nothing that 16 divides
    (1, 16, 300, 40),  # just one tile of rows, several steps along them
    (2, 9, 48, 130),
    (1, 40, 70, 96),  # more rows than while decoding
    (2, 70, 64, 144),  # a prompt
    (1, 600, 16, 130),  # more tiles of rows than go together
    (1, 1, 1, 1),
]
"""Batch, length, H and N."""

DECISIONS = ("none", "some", "first", "last", "all")

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""An implementation of `skipstone.ir.predicated.predicated_linear`."""


def decide(who: str, batch: int, length: int) -> Tensor:
    """bool [B, S]: who skips; "first" and "last" leave a tile of rows or more in which all do, if there are so many."""
    rows = torch.arange(batch * length)
    skip = {
        "none": rows < 0,
        "some": rows % 3 == 1,
        "first": rows < batch * length - 1,
        "last": rows > 0,
        "all": rows >= 0,
    }[who]
    return skip.reshape(batch, length)


def check(
    run: Run,
    shape: tuple[int, int, int, int],
    who: str = "some",
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    transposed: bool = False,
    strided: bool = False,
) -> None:
    """Rows that skip are zeros whatever x holds there, the others are exact.

    Args:
        shape: one of `SHAPES`.
        who: one of `DECISIONS`.
        transposed: the weight is stored as [H, N].
        strided: neither the weight nor x, skip and bias lie in one piece.
    """
    batch, length, width, columns = shape
    x, skip = torch.randn(batch, length, width, dtype=dtype), decide(who, batch, length)
    weight = torch.randn(width, columns, dtype=dtype).t() if transposed else torch.randn(columns, width, dtype=dtype)
    offset = torch.randn(columns, dtype=dtype) if bias else None
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    x[skip] = float("nan")
    operands: list[Any] = [None if each is None else each.to(device) for each in (x, weight, skip, offset)]
    if strided:
        operands = [None if each is None else torch.stack([each, each], dim=-1)[..., 1] for each in operands]
    given = run(*operands).cpu()
    assert given.shape == exact.shape and given.dtype == dtype
    assert not given[skip].any()
    if not skip.all():
        assert (given[~skip].double() - exact[~skip]).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
