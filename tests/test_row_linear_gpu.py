"""The kernel of `skipstone::row_linear` on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone.ir.errors import Unsupported
from skipstone.ir.row_linear import row_linear
from tests import row_linear_cases
from tests.row_linear_cases import CASES, Case

pytestmark = pytest.mark.gpu
pytest.importorskip("skipstone.kernels.row_linear", reason="needs triton")

LARGE = {
    "gated": Case(1, 4096, (14336, 14336), norm=True, activation="silu", is_gated=True),
    "down": Case(1, 14336, (4096,), residual=True),
    "lanes": Case(1, 640, (640, 640, 640), norm=True, lanes=24, own="g"),
    "wide": Case(1, 61440, (640,)),
    "heads of eight": Case(8, 4096, (4096, 1024, 1024), bias=True, norm=True),
}


def multiply(**given: Any) -> Tensor:
    """The operator, where an error is raised if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return row_linear(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_results(name: str, dtype: torch.dtype) -> None:
    row_linear_cases.check(multiply, {**CASES, **LARGE}[name], dtype, "cuda")


@pytest.mark.parametrize("name", ["plain", "heads", "gated rows", "lanes"])
def test_weights_that_are_parts_of_wider_ones(name: str) -> None:
    row_linear_cases.check(multiply, CASES[name], torch.bfloat16, "cuda", strided=True)


@pytest.mark.parametrize("is_captured", [False, True])
def test_products_that_begin_early_wait_for_what_they_read(is_captured: bool) -> None:
    """Many small products in a row, each of the result before: any that did not wait would read an older row."""
    torch.manual_seed(0)
    weights = [torch.randn(1, 256, 256, device="cuda") / 16 for _ in range(64)]
    start = torch.randn(1, 1, 256, device="cuda")

    def chain(x: Tensor) -> Tensor:
        for weight in weights:
            x = row_linear(x, [weight], [None], None, x, eps=1e-6)
        return x

    chain(start)  # compiles
    graph, x = torch.cuda.CUDAGraph(), start.clone()
    if is_captured:
        with torch.cuda.graph(graph):
            out = chain(x)
    for seed in range(20):
        x.copy_(torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(seed)))
        if is_captured:
            graph.replay()
        else:
            out = chain(x)
        wanted = x.double()
        for weight in weights:
            wanted = wanted + (wanted / (wanted.square().mean() + 1e-6).sqrt()) @ weight.double().mT
        assert (out - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_offsets_beyond_32_bits() -> None:
    """The last rows of a weight of more than 2^31 elements."""
    weight = torch.zeros(1, 2**17 + 64, 16384, dtype=torch.float16, device="cuda")
    last, x = torch.randn(64, 16384, dtype=torch.float16), torch.randn(1, 1, 16384, dtype=torch.float16)
    weight[0, -64:] = last.cuda()
    given = row_linear(x.cuda(), [weight], [None]).cpu()
    wanted = x.double() @ last.double().T
    assert not given[..., :-64].any()
    assert (given[..., -64:] - wanted).abs().max() <= 2e-3 * wanted.abs().max()


def test_runs_are_the_same_bit_for_bit() -> None:
    given = row_linear_cases.operands(LARGE["gated"], torch.bfloat16, "cuda")
    first = multiply(**given)
    assert all(torch.equal(multiply(**given), first) for _ in range(5))


def test_many_rows_are_refused() -> None:
    with pytest.raises(Unsupported, match="9 rows"):
        row_linear(torch.randn(1, 9, 16, device="cuda"), [torch.randn(1, 8, 16, device="cuda")], [None])
