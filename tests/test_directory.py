"""Directories that come into being whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skipstone.ir.errors import ArtifactError
from skipstone.runtime.directory import new_directory


def content(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("before", [None, {}, {"old": "1"}], ids=["absent", "empty", "full"])
def test_it_is_there_at_the_end_of_the_block(before: dict[str, str] | None, tmp_path: Path) -> None:
    place = tmp_path / "made" / "place"
    if before is not None:
        place.mkdir(parents=True)
        for name, text in before.items():
            (place / name).write_text(text)
    with new_directory(place) as folder:
        (folder / "new").write_text("2")
        assert (content(place) if place.exists() else None) == before
    assert content(tmp_path) == {"made/place/new": "2"}


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, OSError])
def test_what_fails_leaves_what_was_there(kind: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "old").write_text("1")
    with pytest.raises(ArtifactError if kind is OSError else kind), new_directory(tmp_path / "place") as folder:
        (folder / "new").write_text("2")
        raise kind("no more")
    assert content(tmp_path) == {"place/old": "1"}


def test_what_was_there_comes_back_if_the_last_move_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "old").write_text("1")

    def fail(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    with pytest.raises(ArtifactError, match="place: Invalid cross-device link"), new_directory(place) as folder:
        (folder / "new").write_text("2")
        monkeypatch.setattr(os, "replace", fail)
    assert content(tmp_path) == {"place/old": "1"}
