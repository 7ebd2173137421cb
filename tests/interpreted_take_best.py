"""The kernels of `skipstone::take_best_` in Triton's interpreter.

`tests/test_take_best.py` runs this file in a process of its own: the interpreter is chosen before triton is imported.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skipstone.kernels import take_best
from tests import take_best_cases


def take(*operands: Any) -> None:
    """What is launched on a device."""
    for launch in take_best.choice_launches(*operands, arch=80):
        launch()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", take_best_cases.DTYPES, ids=str)
@pytest.mark.parametrize("width", take_best_cases.WIDTHS)
def test_the_best_token_is_taken(width: int, dtype: torch.dtype, strided: bool) -> None:
    take_best_cases.check(take, width, dtype, strided=strided)


def test_parts_that_are_not_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(take_best, "PART", 16)
    monkeypatch.setattr(take_best, "LARGEST", 4)
    take_best_cases.check(take, 999, torch.float32)
