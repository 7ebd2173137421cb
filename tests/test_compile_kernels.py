"""Compiling all kernels on a machine without a GPU, from the command line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from skipstone.cli import main

pytest.importorskip("triton", reason="needs the extra `triton`")

from skipstone.kernels import catalogue, compile
from skipstone.kernels.compile import Usage

EVERY = {
    "append_rows", "attend_share", "combine_shares", "attend_block", "multiply_rows", "multiply_few_rows",
    "best_of_part", "take_best",
}  # fmt: skip


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two entries and the last one stand for all."""
    every = catalogue.catalogue

    def some(arch: str) -> Iterator[Any]:
        entries = list(every(arch))
        yield from itertools.chain(entries[:2], entries[-1:])

    monkeypatch.setattr(catalogue, "catalogue", some)


def test_the_catalogue_has_every_kernel_and_names_each_use_once() -> None:
    entries = list(catalogue.catalogue("sm_90"))
    assert {entry.kernel for entry in entries} == EVERY
    assert len({(entry.kernel, entry.use) for entry in entries}) == len(entries) > 60


@pytest.mark.usefixtures("few")
def test_what_kernels_need_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "compile", "--arch", "sm_90"]) == 0
    printed = capsys.readouterr().out
    assert "attend_share" in printed and "attention, full, 64 channels, a token" in printed
    assert printed.endswith("3 kernels compiled for sm_90; none spills registers.\n")


@pytest.mark.usefixtures("few")
def test_kernels_that_spill_are_a_defect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needs = iter([Usage(100, 0, 0), Usage(255, 16, 0), Usage(100, 0, 0)])
    monkeypatch.setattr(compile, "usage", lambda launch, arch: next(needs))
    assert main(["kernels", "compile", "--arch", "sm_80"]) == 1
    assert "1 of 3 kernels spill registers on sm_80" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arch", "message"), [("sm_75", "They need sm_80 or later"), ("hopper", 'Name one such as "sm_80" or "sm_90"')]
)
def test_other_architectures_are_refused(arch: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "compile", "--arch", arch]) == 3
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_kernel_spills(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "compile", "--arch", arch]) == 0
