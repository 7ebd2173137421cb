"""Directories that come into being whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skipstone.ir.errors import ArtifactError, InvalidInput


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


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what cannot be saved into a directory as a tokenizer, before any work begins.

    Raises:
        InvalidInput: it is no tokenizer of transformers.
    """
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        hint = "Load it with AutoTokenizer.from_pretrained(name)."
        raise InvalidInput(f"the tokenizer is {type(tokenizer).__name__}.", hint=hint)
