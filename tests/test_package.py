"""The house: what a wheel holds, who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = tuple(re.split(r"[^\w-]", line)[0].replace("-", "_") for line in PROJECT["dependencies"])


@dataclass(frozen=True)
class Room:
    """What the files of one folder may import besides the standard library.

    Attributes:
        ours: modules of skipstone, each with all below it.
        theirs: other packages.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]


ROOMS: Mapping[str, Room] = {
    "ir": Room(ours=("skipstone.ir",), theirs=("torch", "networkx", "sympy")),
    "passes": Room(ours=("skipstone.passes", "skipstone.ir"), theirs=("torch",)),
    "kernels": Room(
        ours=(
            "skipstone.kernels",
            "skipstone.ir.dialect",
            "skipstone.ir.predicated",
            "skipstone.ir.quantized",
            "skipstone.ir.row_linear",
            "skipstone.ir.take_best",
            "skipstone.ir.formats",
            "skipstone.ir.errors",
        ),
        theirs=("torch", "triton"),
    ),
    "runtime": Room(
        ours=("skipstone.runtime", "skipstone.ir", "skipstone.kernels"),
        theirs=("torch", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors", "triton"),
    ),
    "skipstone": Room(ours=("skipstone",), theirs=DEPENDENCIES),
}

EXCEPTIONS: Mapping[str, str] = {
    "ir/capture/huggingface.py": "transformers",
    "passes/quantize_weights.py": "onnxruntime",
    "skipstone/adapters.py": "peft",
    "runtime/generate.py": "transformers",
    "runtime/onnx/runner.py": "tokenizers",
}
"""The one further package that a file may import."""

HEAVY = ("networkx", "numpy", "onnx", "onnxruntime", "sympy", "torch", "transformers")
"""Packages that take long to import; whoever only asks for help on the command line must not wait for them."""


def sources() -> list[str]:
    """The library's Python files, as paths from the root; `rglob` does not follow the links inside skipstone/."""
    return sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def module_of(source: str) -> str:
    """The name under which a source file is imported."""
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.split(".")[0] == "skipstone" else f"skipstone.{name}"


# ------------------------------------------------------------------------------------------------ who imports whom


def imports(code: str) -> Iterator[str]:
    """Every name that the code imports, in full, wherever the statement stands; relative ones begin with a dot."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def violations(source: str, code: str) -> list[str]:
    """The imports that the file's room does not allow."""
    room = ROOMS[source.split("/")[0]]
    allowed = (*room.ours, *room.theirs, *sys.stdlib_module_names, EXCEPTIONS.get(source, "__future__"))
    return [name for name in imports(code) if not any(f"{name}.".startswith(f"{each}.") for each in allowed)]


@pytest.mark.parametrize("source", sources())
def test_rooms_import_only_what_they_may(source: str) -> None:
    assert violations(source, (ROOT / source).read_text()) == []


@pytest.mark.parametrize(
    ("source", "code", "forbidden"),
    [
        ("ir/program.py", "from skipstone.passes.base import Pass", "skipstone.passes.base.Pass"),
        ("ir/program.py", "from skipstone import passes", "skipstone.passes"),
        ("ir/program.py", "from skipstone import optimize", "skipstone.optimize"),
        ("ir/program.py", "from . import errors", "..errors"),
        ("ir/program.py", "import transformers.utils", "transformers.utils"),
        ("ir/program.py", "def late():\n    import onnxruntime", "onnxruntime"),
        ("ir/program.py", "import torchvision", "torchvision"),
        ("passes/cleanup.py", "import skipstone.runtime.eager", "skipstone.runtime.eager"),
        ("kernels/attention.py", "from skipstone.ir import program", "skipstone.ir.program"),
        ("runtime/eager.py", "from skipstone.passes import cleanup", "skipstone.passes.cleanup"),
        ("runtime/eager.py", "import transformers", "transformers"),
        ("skipstone/cli.py", "import requests", "requests"),
    ],
)
def test_a_forbidden_import_is_found(source: str, code: str, forbidden: str) -> None:
    harmless = "import os.path\nimport torch.fx\nfrom skipstone.ir import errors"
    assert violations(source, f"{harmless}\n{code}\n") == [forbidden]


@pytest.mark.parametrize(("source", "package"), EXCEPTIONS.items())
def test_an_exception_is_still_needed(source: str, package: str) -> None:
    assert any(name.split(".")[0] == package for name in imports((ROOT / source).read_text()))


# ------------------------------------------------------------------------------------------------- what imports cost


def python(code: str, *, path: Path = ROOT) -> str:
    """What a fresh interpreter prints that finds skipstone in `path`."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [*(module_of(each) for each in sources() if each.endswith("__init__.py")), "skipstone.cli", "skipstone.errors"],
)
def test_packages_are_light(module: str) -> None:
    assert python(f"import {module}; print({set(HEAVY)} & sys.modules.keys())") == "set()\n"


def test_optimize_is_the_function_whatever_is_imported_first() -> None:
    python(
        """
import importlib

import skipstone
function = skipstone.optimize
assert callable(function) and function is sys.modules["skipstone.optimize"].optimize

del sys.modules["skipstone"], sys.modules["skipstone.optimize"]
module = importlib.import_module("skipstone.optimize")
import skipstone
import skipstone.optimize
from skipstone import optimize
assert skipstone.optimize is optimize is module.optimize
assert optimize is not function, "the package was not imported anew"
"""
    )


def test_every_public_name_exists() -> None:
    import skipstone

    assert skipstone.__version__ == PROJECT["version"]
    for name in skipstone.__all__:
        assert getattr(skipstone, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = skipstone.optimise


def test_errors_are_all_public() -> None:
    from skipstone import errors
    from skipstone.ir import errors as defined

    classes = {name for name, value in vars(defined).items() if isinstance(value, type)}
    assert set(errors.__all__) == classes


# ------------------------------------------------------------------------------------------------ what a wheel holds


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy: a build leaves files in its folder, and packs those that an earlier one left."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.safetensors")
    copy = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_every_room_as_real_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = {entry.filename: entry for entry in archive.infolist() if ".dist-info/" not in entry.filename}
        expected = {module_of(each).replace(".", "/"): each for each in sources()}
        packed = {name.removesuffix(".py").removesuffix("/__init__"): name for name in entries if name.endswith(".py")}
        assert packed.keys() == expected.keys()
        for module, name in packed.items():
            assert archive.read(name) == (ROOT / expected[module]).read_bytes(), name
    assert entries.keys() - set(packed.values()) == {"skipstone/py.typed"}
    assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in entries.values())


def test_a_wheel_carries_its_licence_and_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        (commands,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        points = archive.read(commands).decode()
        assert "skipstone = skipstone.cli:main" in points
        assert "[torch_dynamo_backends]\nskipstone = skipstone.backend:backend" in points


def test_an_unpacked_wheel_runs_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    printed = python("import skipstone.cli, skipstone.runtime as r; print(r.__file__)", path=tmp_path)
    assert Path(printed.strip()) == tmp_path / "skipstone" / "runtime" / "__init__.py"


@pytest.mark.slow
def test_a_wheel_runs_exported_models_where_there_is_no_torch(wheel: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import skipstone

    name, prompt = ROOT / "benchmarks/reference/stdlib-llama", "def read_lines(path):\n"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).float().eval(), AutoTokenizer.from_pretrained(name)
    skipstone.export_onnx(model, tmp_path / "out", tokenizer=tokenizer, progress=False)
    interpreter = bare_environment(tmp_path / "venv", ("numpy", "onnxruntime", "tokenizers"))
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", interpreter, *install], check=True)
    assert subprocess.run([interpreter, "-c", "import torch"], capture_output=True, cwd=tmp_path).returncode == 1
    command = [interpreter, "-m", "skipstone.runtime.onnx.runner", "out", prompt, "--max-new-tokens", "40"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    given = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(**given, max_new_tokens=40, do_sample=False)[0]
    assert said == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def bare_environment(directory: Path, names: tuple[str, ...]) -> str:
    """The interpreter of a new environment that holds these packages of this one, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    interpreter = str(directory / "bin" / "python")
    ask = [interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    for name in names:
        place = Path(str(importlib.util.find_spec(name).origin)).parent  # type: ignore[union-attr]
        for source in (place, place.with_name(f"{name}.libs")):
            if source.exists():
                (packages / source.name).symlink_to(source)
    return interpreter


# ---------------------------------------------------------------------------------------------------- what is pinned


def test_constraints_pin_every_dependency_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "a local version, an address, or no version"
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert {each.lower().replace("_", "-") for each in DEPENDENCIES} <= pinned
