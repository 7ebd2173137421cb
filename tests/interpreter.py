"""Running tests where Triton interprets its kernels, which is chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_interpreted(file: str, chosen: str = "not slow") -> None:
    """Run the tests of a file of this folder in a process of its own; `chosen` is an expression of markers."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-x", "-m", chosen]
    result = subprocess.run(
        [*command, str(HERE / file)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout
