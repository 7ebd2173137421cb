"""The text that the reference model is trained on: the source of Python's standard library.

Every machine that runs Python has it. Files are assigned to splits by a hash of their path, so that a file belongs to
the same split everywhere; the text itself differs between Python versions.
"""

from __future__ import annotations

import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "valid", "test"]

SKIPPED = frozenset({"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests"})
"""Folders that are left out: installed packages, and test data that is not source."""


def files(split: Split) -> list[Path]:
    """The library's source files of that split, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED & set(relative.parts) and _split_of(relative) == split:
            found.append(path)
    return found


@lru_cache
def corpus(split: Split) -> bytes:
    """All text of a split: its files one after another, UTF-8, each ended by a zero byte."""
    return b"".join(path.read_bytes() + b"\0" for path in files(split))


def _split_of(relative: Path) -> Split:
    """Five files of a hundred are for validation, five for the held-out test."""
    bucket = int.from_bytes(hashlib.sha256(relative.as_posix().encode()).digest()[:4], "big") % 100
    return "valid" if bucket < 5 else "test" if bucket < 10 else "train"
