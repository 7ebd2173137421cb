"""The files of lowered programs: ONNX models, and one file of weights that they share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from skipstone.ir.errors import ArtifactError

MODEL_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
DECODE_FILE = "decode_{}.onnx"
"""What goes on with prompts that chose so."""

PAGE = 4096
"""Bytes to whose multiples tensors are aligned in the file, so that it can be mapped."""


class Weights:
    """The content of the file of weights, tensor by tensor; what lies in one place in memory does so in the file."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._offsets: dict[tuple[int, int], int] = {}
        self._size = 0

    def place(self, tensor: Tensor) -> int:
        """Where a contiguous tensor begins in the file."""
        key = tensor.data_ptr(), tensor.nbytes
        if key not in self._offsets:
            self._offsets[key] = self._size
            self._tensors.append(tensor)
            self._size += -(-tensor.nbytes // PAGE) * PAGE
        return self._offsets[key]

    def write(self, path: Path) -> None:
        """Write the file."""
        with open(path, "wb") as file:
            for tensor in self._tensors:
                file.write(tensor.numpy().data)
                file.write(bytes(-tensor.nbytes % PAGE))


def save(models: Mapping[str, bytes], weights: Weights, directory: Path) -> None:
    """Write models, by file name, and their weights beside `directory`, and move them there when they are complete.

    Raises:
        ArtifactError: the directory cannot be written, or holds something.
    """
    directory = directory.absolute()
    try:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
            # A directory of its own: the temporary one may be read by nobody else.
            complete = Path(temporary) / directory.name
            complete.mkdir()
            weights.write(complete / WEIGHTS_FILE)
            for name, proto in models.items():
                (complete / name).write_bytes(proto)
            os.replace(complete, directory)
    except OSError as error:
        raise ArtifactError(
            f"Cannot write the model {directory}: {error.strerror or error}.",
            hint="It needs a directory that is empty or does not exist yet.",
        ) from error
