"""The kernel of `skipstone::row_linear` in Triton's interpreter, against the same in float64.

`tests/test_row_linear.py` runs this file in a process of its own: the interpreter is chosen before triton is imported.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone.ir.errors import Unsupported
from skipstone.ir.row_linear import columns
from skipstone.kernels.row_linear import row_launch
from tests import row_linear_cases
from tests.row_linear_cases import CASES


def multiply(processors: int = 4, arch: int = 0, **given: Any) -> Tensor:
    """What is launched on a device with so many processors."""
    x, weights, is_gated = given["x"], given["weights"], given["is_gated"]
    out = torch.full((weights[0].shape[0], x.shape[1], columns(weights, is_gated)), float("nan"), dtype=x.dtype)
    row_launch(**given, out=out, arch=arch, processors=processors)()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results(name: str, dtype: torch.dtype) -> None:
    row_linear_cases.check(multiply, CASES[name], dtype)


@pytest.mark.parametrize("name", ["plain", "heads", "gated rows", "lanes", "lanes that share a gain"])
def test_weights_that_are_parts_of_wider_ones(name: str) -> None:
    row_linear_cases.check(multiply, CASES[name], strided=True)


@pytest.mark.parametrize("processors", [1, 20, 132])
@pytest.mark.parametrize("name", ["heads", "gated", "lanes"])
def test_tiles_of_any_width_give_the_same(name: str, processors: int) -> None:
    row_linear_cases.check(lambda **given: multiply(processors, **given), CASES[name])


def test_what_has_no_kernel_is_refused() -> None:
    given = row_linear_cases.operands(CASES["plain"], torch.float32)
    with pytest.raises(Unsupported, match=r"sm_75.* sm_80 or later"):
        multiply(arch=75, **given)
    with pytest.raises(Unsupported, match=r"9 rows.*At most 8: use linear layers"):
        multiply(**{**given, "x": torch.randn(1, 9, 48)})
    with pytest.raises(Unsupported, match=r"a weight \(1, 40, 48\) of strides \(1920, 1, 40\)"):
        multiply(**{**given, "weights": [torch.randn(1, 48, 40).mT]})
    with pytest.raises(Unsupported, match=r"a weight \(1, 2, 8\) of strides \(0, 1073741824, 1\)"):
        huge = torch.empty_strided((1, 2, 8), (0, 2**30, 1), device="meta")
        multiply(**{**given, "x": torch.randn(1, 1, 8), "weights": [huge]})
    with pytest.raises(Unsupported, match="float64"):
        multiply(**row_linear_cases.operands(CASES["plain"], torch.float64))


@pytest.mark.parametrize("residual", [False, True])
def test_nothing_is_read_where_every_row_skips(residual: bool) -> None:
    given = row_linear_cases.operands(CASES["all skip, but for a sum"], torch.float32)
    for tensor in (given["x"], *given["weights"]):
        tensor.fill_(float("nan"))
    given["residual"] = given["residual"] if residual else None
    out = multiply(**given)
    assert torch.equal(out, given["residual"] if residual else torch.zeros_like(out))
