"""Triton kernels without a GPU: what they compute, in the interpreter, and what they need, compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


PAIRS = [("full", "full"), ("int8_channel", "int8_channel"), ("int8_token", "int8_token"), ("fp8_token", "fp8_token"),
         ("int4_channel", "int4_channel"), ("int4_group", "int4_group"), ("nvfp4", "nvfp4")]  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_decoding_compiles_without_spills(arch: str, pair: tuple[str, str]) -> None:
    """One new token, heads of 128 channels, bfloat16: all registers fit."""
    from skipstone.kernels.compile import usage, variants

    found = [
        (variant, usage(launch, arch))
        for variant, launch in variants(arch, [pair], widths=(128,), dtypes=(torch.bfloat16,))
        if variant.queries == 1 and not variant.options
    ]
    assert {variant.kernel for variant, _ in found} >= {"append_rows", "attend_share"}
    for variant, needs in found:
        assert needs.spilled == 0 and needs.registers <= 255, (variant, needs)
