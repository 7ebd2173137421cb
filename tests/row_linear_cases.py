"""What `skipstone::row_linear` is asked for wherever it runs, and the check against the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error over the largest result."""


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        rows: of x; their number is the product.
        width: of each row.
        parts: columns of each weight.
    """

    rows: tuple[int, ...] = (1, 1)
    width: int = 48
    parts: tuple[int, ...] = (40,)
    bias: bool = False
    norm: bool = False
    gain: bool = True
    offset: float = 0.0
    residual: bool = False
    activation: str = "none"
    is_gated: bool = False


CASES = {
    "plain": Case(),
    "odd": Case((1, 3), 33, (17,), bias=True),
    "one": Case((1, 1), 1, (1,)),
    "heads": Case((1, 1), 96, (64, 24, 24), bias=True, norm=True),
    "heads of rows": Case((2, 1), 80, (33, 7), norm=True, gain=False),
    "output": Case((2, 1), 64, (72,), residual=True),
    "gated": Case((1, 1), 40, (56, 56), norm=True, activation="silu", is_gated=True),
    "gated rows": Case((4, 1), 70, (19, 19), bias=True, norm=True, offset=1.0, activation="gelu_tanh", is_gated=True),
    "exact gelu": Case((1, 2), 64, (130,), bias=True, activation="gelu"),
    "relu": Case((1, 2), 16, (5,), activation="relu", residual=True),
    "squared": Case((8, 1), 20, (30,), norm=True, activation="relu_squared"),
    "deep": Case((2, 1), 8200, (6, 3), norm=True),  # more than a program multiplies at a time
    "deep and gated": Case((1, 1), 8193, (3, 3), bias=True, residual=True, activation="silu", is_gated=True),
}

Run = Callable[..., Tensor]
"""An implementation of `skipstone.ir.row_linear.row_linear`."""


def operands(case: Case, dtype: torch.dtype, device: str = "cpu", strided: bool = False) -> dict[str, Any]:
    """Random operands; `strided` weights are parts of larger ones."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(dtype).to(device)

    def weight(count: int) -> Tensor:
        wide = random(count, case.width + 16 * strided, size=case.width**-0.5)
        return wide[:, : case.width]

    total = case.parts[0] if case.is_gated else sum(case.parts)
    return {
        "x": random(*case.rows, case.width, size=3.0),
        "weights": [weight(part) for part in case.parts],
        "biases": [random(part) if case.bias else None for part in case.parts],
        "gain": random(case.width) if case.norm and case.gain else None,
        "residual": random(*case.rows, total) if case.residual else None,
        "eps": 1e-2 if case.norm else None,
        "offset": case.offset,
        "activation": case.activation,
        "is_gated": case.is_gated,
    }


def in_float64(given: dict[str, Any]) -> Tensor:
    """The result, written down once more."""
    x = given["x"].double()
    if given["eps"] is not None:
        x = x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + given["eps"]).sqrt()
        if given["gain"] is not None:
            x = x * (given["offset"] + given["gain"].double())
    products = []
    for weight, bias in zip(given["weights"], given["biases"], strict=True):
        products.append(torch.einsum("...d,fd->...f", x, weight.double()) + (0.0 if bias is None else bias.double()))
    named = {
        "none": lambda y: y,
        "silu": F.silu,
        "gelu": lambda y: y * (1 + torch.erf(y / 2**0.5)) / 2,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu": F.relu,
        "relu_squared": lambda y: torch.where(y > 0, y * y, torch.zeros_like(y)),
    }
    act = named[given["activation"]]
    result = act(products[0]) * products[1] if given["is_gated"] else torch.cat([act(y) for y in products], -1)
    return result if given["residual"] is None else result + given["residual"].double()


def check(run: Run, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", strided: bool = False) -> None:
    """The result has the shape and dtype of float64's and is as near as the dtype allows."""
    given = operands(case, dtype, device, strided)
    wanted = in_float64(given)
    result = run(**given)
    assert result.dtype == dtype and result.shape == wanted.shape
    error = float((result.double() - wanted).abs().max() / wanted.abs().max())
    assert error < TOLERANCE[dtype], error
