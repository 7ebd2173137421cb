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
        rows: of x.
        width: of each row.
        skip: "some" or "all" rows, if any can.
        lanes: of the weights, and of everything whose first letter is in `own`: "x", "gain", "residual".
        parts: columns of each weight.
        heads: sizes of heads that are rotated, of each weight.
    """

    rows: int = 1
    width: int = 48
    parts: tuple[int, ...] = (40,)
    bias: bool = False
    norm: bool = False
    gain: bool = True
    offset: float = 0.0
    residual: bool = False
    activation: str = "none"
    is_gated: bool = False
    skip: str = ""
    lanes: int = 1
    own: str = ""
    heads: tuple[int, ...] = ()


CASES = {
    "plain": Case(),
    "odd": Case(3, 33, (17,), bias=True),
    "one": Case(1, 1, (1,)),
    "heads": Case(1, 96, (64, 24, 24), bias=True, norm=True),
    "heads of rows": Case(2, 80, (33, 7), norm=True, gain=False),
    "output": Case(2, 64, (72,), residual=True),
    "gated": Case(1, 40, (56, 56), norm=True, activation="silu", is_gated=True),
    "gated rows": Case(4, 70, (19, 19), bias=True, norm=True, offset=1.0, activation="gelu_tanh", is_gated=True),
    "exact gelu": Case(2, 64, (130,), bias=True, activation="gelu"),
    "relu": Case(2, 16, (5,), activation="relu", residual=True),
    "squared": Case(8, 20, (30,), norm=True, activation="relu_squared"),
    "deep": Case(2, 8200, (6, 3), norm=True),  # more than a program multiplies at a time
    "lanes": Case(1, 48, (40, 24), norm=True, residual=True, lanes=3, own="xgr"),
    "lanes of one row": Case(2, 33, (17,), bias=True, norm=True, residual=True, lanes=5, own="g"),
    "lanes that share a gain": Case(
        1, 64, (16, 16), bias=True, norm=True, activation="silu", is_gated=True, lanes=2, own="x"
    ),
    "one that may skip": Case(1, 40, (24, 24), norm=True, activation="silu", is_gated=True, skip="some"),
    "some skip": Case(3, 40, (24,), bias=True, residual=True, skip="some"),
    "some lanes skip": Case(2, 40, (24, 9), bias=True, norm=True, skip="some", lanes=3, own="xg"),
    "all skip": Case(3, 40, (24, 9), bias=True, skip="all"),
    "all skip, but for a sum": Case(2, 40, (24,), residual=True, skip="all"),
    "rotated": Case(1, 48, (32, 16, 16), bias=True, norm=True, heads=(16, 16, 0)),
    "rotated rows": Case(3, 33, (9, 30), norm=True, skip="some", heads=(0, 10)),
    "rotated lanes": Case(2, 40, (24, 12, 6), norm=True, lanes=3, own="g", heads=(12, 12, 0)),
    "rotated, all skip": Case(2, 40, (24, 6), bias=True, heads=(12, 0), skip="all"),
    "deep and rotated": Case(1, 8193, (4, 3), heads=(2, 0)),
    "deep and gated": Case(1, 8193, (3, 3), bias=True, residual=True, activation="silu", is_gated=True),
}

Run = Callable[..., Tensor]
"""An implementation of `skipstone.ir.row_linear.row_linear`."""


def operands(case: Case, dtype: torch.dtype, device: str = "cpu", strided: bool = False) -> dict[str, Any]:
    """Random operands; `strided` weights are parts of larger ones."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(dtype).to(device)

    def weight(count: int) -> Tensor:
        wide = random(case.lanes, count + strided, case.width + 16 * strided, size=case.width**-0.5)
        return wide[:, :count, : case.width]

    def lanes(name: str) -> int:
        return case.lanes if name in case.own else 1

    total = case.parts[0] if case.is_gated else sum(case.parts)
    return {
        "x": random(lanes("x"), case.rows, case.width, size=3.0),
        "weights": [weight(part) for part in case.parts],
        "biases": [random(case.lanes, part) if case.bias else None for part in case.parts],
        "gain": random(lanes("g"), case.width) if case.norm and case.gain else None,
        "residual": random(lanes("r"), case.rows, total) if case.residual else None,
        "skip": _skip(case, device),
        "cos": random(case.rows, max(case.heads)) if case.heads else None,
        "sin": random(case.rows, max(case.heads)) if case.heads else None,
        "head_sizes": case.heads or None,
        "eps": 1e-2 if case.norm else None,
        "offset": case.offset,
        "activation": case.activation,
        "is_gated": case.is_gated,
    }


def _skip(case: Case, device: str) -> Tensor | None:
    rows = torch.arange(case.rows, device=device)
    return {"": None, "some": rows % 2 == 1, "all": rows >= 0}[case.skip]


def in_float64(given: dict[str, Any]) -> Tensor:
    """The result, written down once more."""
    x = given["x"].double()
    if given["eps"] is not None:
        x = x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + given["eps"]).sqrt()
        if given["gain"] is not None:
            x = x * (given["offset"] + given["gain"].double())[:, None]
    products = []
    for weight, bias in zip(given["weights"], given["biases"], strict=True):
        product = torch.einsum("lrd,lfd->lrf", x.expand(weight.shape[0], -1, -1), weight.double())
        products.append(product if bias is None else product + bias.double()[:, None])
    if given["head_sizes"]:
        products = [
            _rotated(y, given, size) if size else y for y, size in zip(products, given["head_sizes"], strict=True)
        ]
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
    if given["skip"] is not None:
        result = result * (~given["skip"]).double()[:, None]
    return result if given["residual"] is None else result + given["residual"].double()


def _rotated(y: Tensor, given: dict[str, Any], size: int) -> Tensor:
    """Pairs of channels, half a head apart, times a matrix of two rows and columns."""
    cos, sin = (given[name].double()[:, None] for name in ("cos", "sin"))
    heads = y.reshape(*y.shape[:2], -1, size)
    a, b = heads[..., : size // 2], heads[..., size // 2 :]
    first = a * cos[..., : size // 2] - b * sin[..., : size // 2]
    return torch.cat([first, b * cos[..., size // 2 :] + a * sin[..., size // 2 :]], -1).reshape(y.shape)


def check(run: Run, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", strided: bool = False) -> None:
    """The result has the shape and dtype of float64's and is as near as the dtype allows."""
    given = operands(case, dtype, device, strided)
    wanted = in_float64(given)
    result = run(**given)
    assert result.dtype == dtype and result.shape == wanted.shape
    error, size = (float(each.abs().max()) for each in (result.double() - wanted, wanted))
    assert error <= TOLERANCE[dtype] * size, error
