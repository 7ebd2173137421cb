"""Linear layers of few rows without a GPU: the operator, its kernel in the interpreter, and what it compiles to."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from skipstone.ir.errors import InvalidInput
from skipstone.ir.row_linear import row_linear
from tests import row_linear_cases
from tests.interpreter import run_interpreted
from tests.row_linear_cases import CASES, Case

LLAMA = {  # of Llama 3 with 8 billion parameters: the products of a layer
    "heads": Case(1, 4096, (4096, 1024, 1024), norm=True),
    "rotated": Case(1, 4096, (4096, 1024, 1024), norm=True, heads=(128, 128, 0)),
    "output": Case(1, 4096, (4096,), residual=True),
    "gated": Case(1, 4096, (14336, 14336), norm=True, activation="silu", is_gated=True),
    "down": Case(1, 14336, (4096,), residual=True),
    "eight": Case(8, 4096, (14336, 14336), norm=True, activation="silu", is_gated=True),
    "head": Case(1, 4096, (128256,)),
    "lanes": Case(1, 640, (640, 640, 640), norm=True, lanes=24, own="g"),
    "wide": Case(1, 61440, (640,)),
    "may skip": Case(1, 4096, (14336, 14336), norm=True, activation="silu", is_gated=True, skip="some"),
}


def rotated(size: int = 8, **others: Any) -> dict[str, Any]:
    """A rotary embedding, but for what is changed."""
    return {"cos": torch.ones(1, size), "sin": torch.ones(1, size), "head_sizes": [size], **others}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_operator(name: str, dtype: torch.dtype) -> None:
    tolerance = {**row_linear_cases.TOLERANCE, torch.float64: 1e-13}
    given = row_linear_cases.operands(CASES[name], dtype)
    wanted, result = row_linear_cases.in_float64(given), row_linear(**given)
    assert result.dtype == dtype
    assert (result.double() - wanted).abs().max() <= tolerance[dtype] * wanted.abs().max()


@pytest.mark.parametrize(
    "name", ["odd", "heads of rows", "gated rows", "lanes of one row", "some skip", "rotated rows"]
)
def test_operator_is_registered_well(name: str) -> None:
    given = row_linear_cases.operands(CASES[name], torch.float32)
    positional = [given.pop(key) for key in ("x", "weights", "biases", "gain", "residual", "skip", "cos", "sin")]
    torch.library.opcheck(torch.ops.skipstone.row_linear.default, tuple(positional), given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "'tanh' is none of none, silu"),
        ({"weights": []}, "0 weights with 1 biases"),
        ({"weights": [torch.ones(1, 4, 7)]}, r"Weights \(1, 4, 7\) do not fit rows \(1, 1, 48\)"),
        ({"is_gated": True}, "two weights of one shape"),
        ({"biases": [torch.ones(1, 41)]}, r"A bias \(1, 41\) does not fit a weight \(1, 40, 48\)"),
        ({"gain": torch.ones(1, 47)}, r"A gain \(1, 47\)"),
        ({"gain": torch.ones(2, 48)}, r"A gain \(2, 48\)"),
        ({"skip": torch.ones(2, dtype=torch.bool)}, r"Decisions torch.bool \(2,\) on cpu are not one bool a row"),
        ({"x": torch.ones(2, 1, 48)}, r"Rows of 2 lanes with weights of \[1\]"),
        ({"residual": torch.ones(1, 1, 41)}, r"Rows \(1, 1, 41\) cannot be added"),
        ({"cos": torch.ones(1, 8), "head_sizes": [8]}, "cosines, sines and head sizes, or none of them"),
        ({"cos": torch.ones(1, 8), "sin": torch.ones(1, 8)}, "cosines, sines and head sizes, or none of them"),
        (rotated(activation="silu"), "Nothing but a rotary embedding"),
        (rotated(residual=torch.ones(1, 1, 40)), "Nothing but a rotary embedding"),
        (rotated(head_sizes=[10]), r"Heads of \[10\] channels do not fit cosines of 8"),
        (rotated(head_sizes=[8, 8]), r"Heads of \[8, 8\] channels"),
        (rotated(cos=torch.ones(2, 8)), r"Cosines \(2, 8\) and sines \(1, 8\) do not fit 1 rows"),
        (rotated(16), "not of whole heads"),
        (rotated(5), r"Cosines \(1, 5\)"),
        ({"gain": torch.ones(1, 48, dtype=torch.float64)}, "operands of other dtypes or devices"),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        row_linear(**{**row_linear_cases.operands(CASES["plain"], torch.float32), **change})


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs the extra `triton`")
    run_interpreted("interpreted_row_linear.py")


def launch_of(case: Case, dtype: torch.dtype, arch: int) -> Any:
    """The launch of a case on tensors without data, for a device with as many processors as an H100."""
    pytest.importorskip("triton", reason="needs the extra `triton`")
    from skipstone.kernels.row_linear import row_launch

    total = case.parts[0] if case.is_gated else sum(case.parts)
    with torch.device("meta"):
        return row_launch(
            torch.empty(1, case.rows, case.width, dtype=dtype),
            [torch.empty(case.lanes, part, case.width, dtype=dtype) for part in case.parts],
            [torch.empty(case.lanes, part, dtype=dtype) if case.bias else None for part in case.parts],
            torch.empty(case.lanes, case.width, dtype=dtype) if case.norm and case.gain else None,
            torch.empty(1, case.rows, total, dtype=dtype) if case.residual else None,
            torch.empty(case.rows, dtype=torch.bool) if case.skip else None,
            torch.empty(case.rows, max(case.heads), dtype=dtype) if case.heads else None,
            torch.empty(case.rows, max(case.heads), dtype=dtype) if case.heads else None,
            torch.empty(case.lanes, case.rows, total, dtype=dtype),
            case.heads, 1e-6 if case.norm else None, case.offset, case.activation, case.is_gated, arch, 132,
        )  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", LLAMA)
def test_registers(name: str, arch: int) -> None:
    launch = launch_of(LLAMA[name], torch.bfloat16, arch)
    from skipstone.kernels.compile import usage

    needs = usage(launch, f"sm_{arch}")
    assert needs.spilled == 0 and needs.registers <= 255, needs


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["heads", "gated"])
def test_registers_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    launch = launch_of(LLAMA[name], dtype, 90)
    from skipstone.kernels.compile import usage

    assert usage(launch, "sm_90").spilled == 0


@pytest.mark.parametrize("name", ["heads", "rotated", "output", "gated", "down"])
def test_weights_are_read_before_the_kernels_before_are_done(name: str) -> None:
    """On sm_90, in 16-byte loads; on sm_80 nothing waits."""
    case = LLAMA[name]
    launch = launch_of(case, torch.bfloat16, 90)
    from skipstone.kernels.compile import compile_launch

    ptx = compile_launch(launch, "sm_90").asm["ptx"]
    starts = [part for part in ptx.split("griddepcontrol.launch_dependents")[1:]]
    assert len(starts) == 1
    for before in starts[0].split("griddepcontrol.wait")[:-1]:
        loads = re.findall(r"ld\.global\S*", before)
        block, depth, threads = launch.constants["BLOCK_N"], launch.constants["BLOCK_K"], 32 * launch.warps
        each = block * depth // threads // 8 * (2 if case.is_gated else 1)
        assert sum(load.endswith(".v4.b32") for load in loads) >= each, loads
    assert "griddepcontrol" not in compile_launch(launch_of(case, torch.bfloat16, 80), "sm_80").asm["ptx"]


def test_weights_are_read_behind_the_decisions() -> None:
    """Where rows may skip: nothing but bytes is read in front of the first branch behind the wait."""
    launch = launch_of(LLAMA["may skip"], torch.bfloat16, 90)
    from skipstone.kernels.compile import compile_launch

    ptx = compile_launch(launch, "sm_90").asm["ptx"]
    before, _, behind = ptx.partition("griddepcontrol.wait")
    assert "ld.global" not in before
    decision, _, rest = behind.partition(" bra ")
    assert set(re.findall(r"ld\.global\S*", decision)) == {"ld.global.b8"}
    assert ".v4.b32" in rest
