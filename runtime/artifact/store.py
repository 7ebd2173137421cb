"""A directory of files that is complete or absent, and whose files are read as they were written or not at all.

``skipstone.json`` lists the files with their sizes and checksums. Nothing is read through a link or from outside the
directory. Checksums tell damage, not malice: what files say is checked as well by whoever reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from skipstone.ir.errors import ArtifactError, Malformed, SkipstoneError
from skipstone.runtime import directory as directories

MANIFEST = "skipstone.json"
FORMAT, VERSION = "skipstone.artifact", 2
JSON_BYTES, JSON_DEPTH = 64 * 2**20, 64
"""JSON files are not larger and not deeper."""

_HINT = "Is it damaged, or made for other versions of PyTorch, transformers or ONNX Runtime?"
_NAME = re.compile(r"(?!\.)[\w.+-]+(/(?!\.)[\w.+-]+)*", re.ASCII)


@contextmanager
def new_directory(directory: Path, written_by: Mapping[str, str], overwrite: bool = False) -> Iterator[Path]:
    """A folder to write files into. When all are there they become `directory`; if anything fails, nothing does.

    Args:
        directory: empty, or not there yet.
        written_by: versions of packages, for people.
        overwrite: whether an artifact that is there is replaced.
    Raises:
        ArtifactError: the directory holds something, or cannot be written.
    """
    directory = directory.absolute()
    check_free(directory, overwrite)
    with directories.new_directory(directory) as folder:
        try:
            yield folder
        except SafetensorError as error:
            raise ArtifactError(f"Cannot write {directory}: {error}.") from error
        _write_manifest(folder, written_by)


def check_free(directory: Path, overwrite: bool = False) -> None:
    """Refuse a place where no artifact can be written.

    Raises:
        ArtifactError: it is a file, or a directory that holds something else than an artifact to overwrite.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ArtifactError(f"{directory} is no directory.", hint="Name a directory that does not exist yet.")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / MANIFEST).is_file():
        raise ArtifactError(f"{directory} holds something else.", hint="Name a directory that does not exist yet.")
    if not overwrite:
        raise ArtifactError(f"{directory} holds an artifact.", hint="Name another directory, or ask to overwrite it.")


def _write_manifest(folder: Path, written_by: Mapping[str, str]) -> None:
    files = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    write_json(
        folder / MANIFEST, {"format": FORMAT, "version": VERSION, "written_by": dict(written_by), "files": files}
    )


def write_json(path: Path, content: Any) -> None:
    """Write plain data as JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Store:
    """The files of an artifact, opened and verified.

    Args:
        directory: what `new_directory` made.
    Attributes:
        written_by: versions of the packages that wrote it.
    Raises:
        ArtifactError: it is no artifact, is of a newer version, or a file is missing, damaged, or no plain file in it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ArtifactError(f"There is no directory {self.directory}.")
        if not (self.directory / MANIFEST).exists():
            raise ArtifactError(f"{self.directory} is no artifact: it has no {MANIFEST}.")
        with reading(self.directory / MANIFEST):
            data = self._json(MANIFEST)
            if data["format"] != FORMAT:
                raise ArtifactError(f"{self.directory} is no artifact: its format is {data['format']!r}.")
            _check_version(data["version"], self.directory, data["written_by"])
            self.written_by: dict[str, str] = {str(name): str(each) for name, each in data["written_by"].items()}
            self._files = dict(data["files"])
            for name, entry in self._files.items():
                self._verify(name, entry["bytes"], entry["sha256"])

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def path(self, name: str) -> Path:
        """The path of a verified file.

        Raises:
            ArtifactError: the artifact has no such file.
        """
        if name not in self._files:
            raise ArtifactError(f"{self.directory} has no {name}.", hint="Is the artifact complete?")
        return self.directory / name

    def json(self, name: str) -> Any:
        """What a JSON file holds.

        Raises:
            ArtifactError: there is no such file, or it is not JSON, too large or too deep.
        """
        with reading(self.path(name)):
            return self._json(name)

    def _json(self, name: str) -> Any:
        path = self._plain(name)
        if path.stat().st_size > JSON_BYTES:
            raise ArtifactError(f"{path} is larger than {JSON_BYTES} bytes.")
        data = json.loads(path.read_bytes())
        _check_depth(data, path)
        return data

    def _verify(self, name: str, size: int, digest: str) -> None:
        path = self._plain(name)
        if (found := path.stat().st_size) != size:
            raise ArtifactError(f"{path} has {found} bytes instead of {size}.", hint="Was it copied completely?")
        if _digest(path) != digest:
            raise ArtifactError(f"{path} is not the file that was saved: its checksum differs.")

    def _plain(self, name: str) -> Path:
        """The path of a plain file of that name inside the directory, behind no link."""
        if not _NAME.fullmatch(name):
            raise ArtifactError(f"{self.directory} lists {name!r}, which is no name of a file inside it.")
        path = self.directory / name
        if not os.path.lexists(path):
            raise ArtifactError(f"{path} is missing.", hint="Was the directory copied completely?")
        if path.resolve() != self.directory.resolve() / name:
            raise ArtifactError(f"{path} is a link.", hint="Artifacts hold plain files only.")
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtifactError(f"{path} is no plain file.")
        return path


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever goes wrong with the content of a file into an ArtifactError that names it.

    Content that is damaged may fail anywhere: in JSON, in an operator that is given the wrong shapes, in ONNX Runtime.
    None of them promises what it raises, and versions other than those at saving may fail there as well.
    """
    try:
        yield
    except Malformed as error:
        raise ArtifactError(f"Cannot read {what}: {error}", hint=_HINT) from error
    except SkipstoneError:
        raise
    except OSError as error:
        raise ArtifactError(f"Cannot read {what}: {error.strerror or error}.") from error
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        raise ArtifactError(f"Cannot read {what}: {type(error).__name__}: {reason}.", hint=_HINT) from error


def _check_version(version: Any, directory: Path, written_by: Mapping[str, Any]) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{directory}: the version must be a positive integer, not {version!r}.")
    if version > VERSION:
        writer = f"skipstone {written_by.get('skipstone')}"
        raise ArtifactError(f"{directory} is of version {version}, newer than {VERSION}.", hint=f"Update to {writer}.")


def _check_depth(data: Any, path: Path) -> None:
    layer, depth = [data], 0
    while layer:
        depth += 1
        if depth > JSON_DEPTH:
            raise ArtifactError(f"{path} is nested deeper than {JSON_DEPTH} levels.")
        nested = (each.values() if isinstance(each, dict) else each for each in layer if isinstance(each, dict | list))
        layer = [item for each in nested for item in each]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
