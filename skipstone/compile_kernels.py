"""Compile all Triton kernels for an architecture, on any machine, and see that none of them spills registers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tqdm import tqdm

from skipstone.errors import Unsupported

if TYPE_CHECKING:
    from skipstone.kernels.catalogue import Entry
    from skipstone.kernels.compile import Usage


def compile_kernels(arch: str, progress: bool = True) -> list[tuple[Entry, Usage]]:
    """Compile every entry of `skipstone.kernels.catalogue` for an architecture. No device is needed.

    Args:
        arch: such as "sm_90".
        progress: show a bar.
    Returns:
        the entries, with what their kernels need.
    Raises:
        Unsupported: Triton is not there, or `arch` is not the name of an architecture that it and the kernels support.
    """
    if find_spec("triton") is None:
        raise Unsupported("compiling kernels without triton", hint="Install skipstone[triton].")
    from skipstone.kernels.catalogue import catalogue
    from skipstone.kernels.compile import usage

    entries = list(catalogue(arch))
    bar = tqdm(entries, desc=f"compiling for {arch}", disable=not progress, leave=False)
    return [(entry, usage(entry.launch, arch)) for entry in bar]


def table(compiled: Sequence[tuple[Entry, Usage]]) -> str:
    """What each kernel needs, as a table for people: registers of a thread, and bytes that spill or are shared."""
    from rich.table import Table

    from skipstone.report import render

    found = Table()
    found.add_column("kernel", no_wrap=True)
    found.add_column("for", overflow="fold")
    for heading in ("registers", "spilled", "shared"):
        found.add_column(heading, justify="right", no_wrap=True)
    for entry, needs in compiled:
        numbers = (str(needs.registers), str(needs.spilled), str(needs.shared))
        found.add_row(entry.kernel, entry.use, *numbers)
    return render(found)
