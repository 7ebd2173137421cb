"""Triton kernels without a GPU: what they compute, in the interpreter, and what they need, compiled."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs the extra `triton`")

HERE = Path(__file__).parent


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(chosen: str) -> None:
    """Runs `interpreted_kernels.py` where triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-x", "-m", chosen]
    result = subprocess.run(
        [*command, str(HERE / "interpreted_kernels.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


SHARED = {"sm_80": 163, "sm_90": 227}
"""KiB of shared memory that a program may have."""

FORMATS = ("full", "int8_channel", "int4_channel", "int8_token", "fp8_token", "int4_group", "nvfp4", "mxfp4")
PAIRS = [(form, form) for form in FORMATS]
PAIRS += [("int8_token", "int4_group"), ("fp8_token", "nvfp4"), ("full", "int8_token")]
"""Formats of keys and values: each with itself, and keys that are more exact."""


def check_that_it_fits(arch: str, *options: Any, **more: Any) -> None:
    """All kernels of a call, which is described as in `skipstone.kernels.compile.Variant`."""
    from skipstone.kernels.compile import Variant, usage, variant_launches

    variant = Variant(*options, **more)
    for launch in variant_launches(variant, arch):
        needs = usage(launch, arch)
        assert needs.spilled == 0 and needs.registers <= 255, (launch.kernel, variant, needs)
        assert needs.shared <= SHARED[arch] * 1024, (launch.kernel, variant, needs)


@pytest.mark.parametrize(
    ("arch", "pair", "width", "queries", "options"),
    [
        ("sm_80", ("int8_token", "int8_token"), 128, 1, False),
        ("sm_90", ("int8_token", "int8_token"), 128, 1, False),
        ("sm_90", ("fp8_token", "fp8_token"), 128, 1024, False),
        ("sm_90", ("full", "int8_token"), 64, 1, True),
        ("sm_80", ("nvfp4", "nvfp4"), 128, 1, True),
        ("sm_80", ("int8_token", "int4_group"), 128, 8, True),
        ("sm_90", ("int8_channel", "int8_channel"), 256, 1, True),
    ],
)
def test_registers_and_shared_memory(arch: str, pair: tuple[str, str], width: int, queries: int, options: bool) -> None:
    """Calls that are frequent, and those that take the most."""
    check_that_it_fits(arch, *pair, width, queries=queries, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 192, 256])
def test_registers_and_shared_memory_of_head_sizes(arch: str, pair: tuple[str, str], width: int) -> None:
    if width % 32 and {"int4_group", "mxfp4"} & set(pair):
        pytest.skip("groups of 32 channels")
    for queries, options in itertools.product((1, 8, 1024), (False, True)):
        check_that_it_fits(arch, *pair, width, queries=queries, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float16, 128), (torch.float16, 256), (torch.float32, 128)], ids=str
)
def test_registers_and_shared_memory_of_dtypes(
    arch: str, pair: tuple[str, str], dtype: torch.dtype, width: int
) -> None:
    for queries, options in itertools.product((1, 8, 1024), (False, True)):
        check_that_it_fits(arch, *pair, width, dtype, queries, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("form", ["full", "int8_token", "nvfp4"])
@pytest.mark.parametrize("group", [1, 7, 16])
def test_registers_and_shared_memory_of_groups(arch: str, form: str, group: int) -> None:
    for queries in (1, 8):
        check_that_it_fits(arch, form, form, 128, queries=queries, group=group, options=True)
