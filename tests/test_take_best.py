"""The choice of a greedy step: the operator, its kernels in the interpreter, compiled, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skipstone.errors import Unsupported
from skipstone.ir.take_best import take_best_
from tests import take_best_cases
from tests.interpreter import run_interpreted

pytestmark = pytest.mark.usefixtures("one_thread")


def operands(dtype: torch.dtype = torch.bfloat16, device: str = "cpu", width: int = 40) -> tuple[Any, ...]:
    integers = [torch.zeros(2, *size, dtype=torch.int64, device=device) for size in ((1,), (7,), (), (), (1,))]
    tokens, chosen, number, start, positions = integers
    return torch.zeros(2, width, dtype=dtype, device=device), tokens, chosen, number, [start, positions]


@pytest.mark.parametrize("dtype", take_best_cases.DTYPES, ids=str)
@pytest.mark.parametrize("width", take_best_cases.WIDTHS)
def test_the_best_token_is_taken(width: int, dtype: torch.dtype) -> None:
    take_best_cases.check(take_best_, width, dtype)


def test_schema_and_fake() -> None:
    torch.library.opcheck(take_best_, operands())


def test_in_the_interpreter() -> None:
    """Runs `interpreted_take_best.py` where triton interprets."""
    pytest.importorskip("triton", reason="needs the extra `triton`")
    run_interpreted("interpreted_take_best.py")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_are_small(arch: str) -> None:
    pytest.importorskip("triton", reason="needs the extra `triton`")
    from skipstone.kernels.compile import capability, usage
    from skipstone.kernels.take_best import choice_launches

    for launch in choice_launches(*operands(device="meta", width=151_936), capability(arch)):
        needs = usage(launch, arch)
        assert needs.spilled == 0 and needs.registers <= 64 and launch.overlaps == (arch == "sm_90")


def test_another_dtype_is_refused() -> None:
    take_best = pytest.importorskip("skipstone.kernels.take_best", reason="needs the extra `triton`")
    with pytest.raises(Unsupported, match=r"chooses tokens by logits in torch\.float64"):
        take_best.choice_launches(*operands(torch.float64), 90)


@pytest.mark.gpu
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", take_best_cases.DTYPES, ids=str)
@pytest.mark.parametrize("width", [*take_best_cases.WIDTHS, 151_936])
def test_on_a_gpu(width: int, dtype: torch.dtype, strided: bool) -> None:
    pytest.importorskip("skipstone.kernels.take_best", reason="needs triton")
    take_best_cases.check(take_best_, width, dtype, device="cuda", strided=strided)
