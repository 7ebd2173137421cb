"""Directories that come into being whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipstone.ir.errors import ArtifactError


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A folder to write files into, which becomes `directory` at the end of the block; if anything fails, nothing does.

    What `directory` held goes when the new one is in its place, and comes back if that fails.

    Raises:
        ArtifactError: the files or the directory cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
            # A folder of its own: the temporary one may be read by nobody else.
            complete, old = Path(temporary) / "new", Path(temporary) / "old"
            complete.mkdir()
            yield complete
            if not (directory.is_dir() and any(directory.iterdir())):
                os.replace(complete, directory)
                return
            os.rename(directory, old)
            try:
                os.replace(complete, directory)
            except BaseException:
                os.rename(old, directory)
                raise
    except OSError as error:
        raise ArtifactError(f"Cannot write {directory}: {error.strerror or error}.") from error
