"""The files of lowered programs: ONNX models, and one file of weights that they share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from skipstone.ir.errors import ArtifactError
from skipstone.runtime.directory import new_directory

MODEL_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
DECODE_FILE = "decode_{}.onnx"
"""What goes on with prompts that chose so."""

PAGE, LINE = 4096, 64
"""Bytes to whose multiples tensors are aligned in the file: large ones so that they can be mapped, and small ones."""
_LARGE = 64 * PAGE


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
            self._offsets[key] = -(-self._size // _alignment(tensor)) * _alignment(tensor)
            self._tensors.append(tensor)
            self._size = self._offsets[key] + tensor.nbytes
        return self._offsets[key]

    def write(self, path: Path) -> None:
        """Write the file."""
        with open(path, "wb") as file:
            for tensor in self._tensors:
                file.write(bytes(-file.tell() % _alignment(tensor)))
                file.write(tensor.numpy().data)


def _alignment(tensor: Tensor) -> int:
    return PAGE if tensor.nbytes >= _LARGE else LINE


def write(models: Mapping[str, bytes], weights: Weights, folder: Path) -> None:
    """Write models, by file name, and their weights to a folder.

    Raises:
        OSError: the files cannot be written.
    """
    weights.write(folder / WEIGHTS_FILE)
    for name, proto in models.items():
        (folder / name).write_bytes(proto)


def save(models: Mapping[str, bytes], weights: Weights, directory: Path) -> None:
    """Write models, by file name, and their weights to a new directory, which is whole or not there.

    Raises:
        ArtifactError: the directory cannot be written, or holds something.
    """
    directory = directory.absolute()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        hint = "It needs a directory that is empty or does not exist yet."
        raise ArtifactError(f"Cannot write the model {directory}: it is not empty.", hint=hint)
    with new_directory(directory) as folder:
        write(models, weights, folder)
