"""Compiled kernels as files, and back where Triton finds them instead of compiling.

Triton keeps what it compiles under a hash of everything that goes into it: the kernel's source and all that this calls,
types, constants, options, the device, Triton itself. So a kernel that is put there is found by exactly the launches
that it was compiled for; all others are compiled as ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.runtime.cache import get_cache_manager

from skipstone.kernels import launch

CODE, ABOUT = ".cubin", ".json"
"""Endings of the two files that a kernel is: its machine code, and what Triton knows about it."""

_HASH, _NAME = re.compile(r"[0-9a-f]{64}"), re.compile(r"[A-Za-z_]\w{0,149}", re.ASCII)


@dataclass(frozen=True)
class Binary:
    """A compiled kernel; a ValueError says that it cannot be one.

    Attributes:
        hash: of everything that it was compiled from, in hexadecimal.
        name: of the kernel.
        code: for one kind of device.
        about: what Triton needs to launch it, as JSON.
    """

    hash: str
    name: str
    code: bytes
    about: bytes

    def __post_init__(self) -> None:
        if not _HASH.fullmatch(self.hash) or not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} with the hash {self.hash!r} is no kernel")


@contextmanager
def recorded() -> Iterator[list[Any]]:
    """The compiled kernels (`triton.compiler.CompiledKernel`) of all launches inside, as often as they are launched."""
    compiled: list[Any] = []
    observe = compiled.append
    launch.observers.append(observe)
    try:
        yield compiled
    finally:
        launch.observers.remove(observe)


def binaries(compiled: Sequence[Any]) -> list[Binary]:
    """The kernels among them, each once."""
    found = {}
    for kernel in compiled:
        files = {Path(name).suffix: Path(path) for name, path in kernel.metadata_group.items()}
        found[kernel.hash] = Binary(kernel.hash, files[ABOUT].stem, files[CODE].read_bytes(), files[ABOUT].read_bytes())
    return list(found.values())


def restore(binary: Binary) -> None:
    """Put a kernel where Triton looks for it, unless one is there."""
    manager, about = get_cache_manager(binary.hash), f"{binary.name}{ABOUT}"
    if about in (manager.get_group(about) or {}):
        return
    files = {f"{binary.name}{CODE}": binary.code, about: binary.about}
    manager.put_group(about, {name: manager.put(content, name) for name, content in files.items()})
