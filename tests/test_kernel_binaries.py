"""Compiled kernels as files: Triton finds them again, for the launches that they were compiled for and for no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs the extra `triton`")

import triton

from skipstone.kernels.binaries import Binary, binaries, recorded, restore
from skipstone.kernels.compile import capability, compile_launch
from skipstone.kernels.launch import Launch
from skipstone.kernels.take_best import choice_launches

ARCH = "sm_90"


class Compiled:
    """A kernel that is compiled where it would be launched, which takes no device."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    def __getitem__(self, _grid: Any) -> Callable[..., Any]:
        return lambda **_arguments: compile_launch(self.launch, ARCH)


def launches(vocabulary: int = 5000) -> list[Launch]:
    integers = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    logits = torch.zeros(1, vocabulary, dtype=torch.bfloat16, device="meta")
    return list(choice_launches(logits, integers, integers, integers, [integers], capability(ARCH)))


def record(found: list[Launch]) -> list[Binary]:
    """What is recorded of these launches, each made twice."""
    with recorded() as compiled:
        for launch in (*found, *found):
            replace(launch, kernel=Compiled(launch))()
    assert len(compiled) == 2 * len(found)
    replace(found[0], kernel=Compiled(found[0]))()
    assert len(compiled) == 2 * len(found), "it is recorded inside alone"
    return binaries(compiled)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Moves to a machine, by name, that has its own cache of kernels."""

    def move(name: str) -> Path:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / name))
        return tmp_path / name

    return move


def found_in_cache(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Triton has the kernel of a launch already."""
    hits: list[bool] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **about: hits.append(about["cache_hit"]))
    compile_launch(launch, ARCH)
    (hit,) = hits
    return hit


def test_kernels_are_found_and_no_others(elsewhere: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere("here")
    kernels = record(launches())
    assert [each.name for each in kernels] == ["best_of_part", "take_best"]
    assert all(each.code.startswith(b"\x7fELF") and json.loads(each.about)["hash"] == each.hash for each in kernels)
    wanted = [compile_launch(each, ARCH) for each in launches()]

    elsewhere("there")
    for each in kernels:
        restore(each)
    for launch, other in zip(launches(), wanted, strict=True):
        assert found_in_cache(launch, monkeypatch)
        assert compile_launch(launch, ARCH).asm["cubin"] == other.asm["cubin"]
    another = replace(launches()[0], warps=8)
    assert not found_in_cache(another, monkeypatch)
    assert found_in_cache(another, monkeypatch)


def test_what_triton_has_is_left_alone(elsewhere: Callable[[str], Path]) -> None:
    folder = elsewhere("here")
    (kernel, _) = record(launches())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    restore(replace(kernel, code=b"something else"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change",
    [{"hash": "../" * 20 + "a" * 4}, {"hash": "A" * 64}, {"hash": ""}, {"name": "../x"}, {"name": ""}, {"name": "é"}],
    ids=str,
)
def test_names_that_are_none_are_refused(change: dict[str, str]) -> None:
    given: dict[str, Any] = {"hash": "0" * 64, "name": "multiply", "code": b"", "about": b"{}"}
    Binary(**given)
    with pytest.raises(ValueError, match="is no kernel"):
        Binary(**(given | change))
