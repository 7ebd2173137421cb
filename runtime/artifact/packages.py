"""Compiled code in artifacts: AOTInductor packages and our kernels, with what they were compiled for and with.

Code that was made elsewhere may compute something else or bring the process down, and nothing in it would say so. So
everything that it depends on has to be the same here, except that a processor may have more instructions.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from skipstone.ir.errors import ArtifactError, InvalidInput, Unsupported
from skipstone.ir.program import Role
from skipstone.runtime.artifact import kernels
from skipstone.runtime.artifact.store import Store, reading
from skipstone.runtime.session import ProgramSession
from skipstone.runtime.triton.session import SINGLE, WHOLE, TritonSession

_NAMES = {
    "skipstone": "skipstone",
    "torch": "torch",
    "triton": "Triton",
    "platform": "the platform",
    "processor": "processors of type",
    "device": "the device",
    "capability": "compute capability",
}
"""What must be the same, in words."""

_HINT = "Load it without native_code, which compiles the program here, or save it on this machine."


def check_batches(parts: Sequence[ProgramSession], batches: Sequence[int]) -> None:
    """Refuse what no package can be made for, before anything is written.

    Raises:
        InvalidInput: a batch is no positive number.
        Unsupported: another target than Triton, or a program without a cache.
    """
    if not isinstance(batches, Sequence):
        raise InvalidInput(f"compiled_for is {batches!r}.", hint="Give sizes of batches, such as [1, 8].")
    for batch in batches:
        if type(batch) is not int or batch < 1:
            raise InvalidInput(f"compiled_for has {batch!r}.", hint="Give sizes of batches, such as [1, 8].")
    for session in parts:
        if not isinstance(session, TritonSession):
            raise Unsupported("compiled code of another target", hint="Use target='triton', or leave compiled_for out.")
        if not session.layout or session.program.input(Role.TOKENS) is None:
            hint = "Leave compiled_for out: it is compiled when it first runs."
            raise Unsupported("compiled code of a program without tokens and their cache", hint=hint)


def write(parts: Sequence[ProgramSession], batches: Sequence[int], folder: Path) -> dict[str, Any]:
    """Compile the graphs that read a prompt and that decode, for these batches, into a folder.

    Args:
        parts: after `check_batches`; behind the first, those that go on with what it has read.
    Returns:
        what to save of them, as plain data.
    """
    made: dict[Any, dict[str, Any]] = {}
    for number, session in enumerate(parts):
        assert isinstance(session, TritonSession)
        for name in _graphs(number, len(parts)):
            graph = session.graphs[name]
            for batch in batches:
                inputs = session.example_inputs(name, batch)
                sizes = graph.fixed_sizes(inputs)
                if (number, name, sizes) in made:  # of prompts, several batches have the same code
                    continue
                file = f"code-{len(made)}.pt2"
                graph.write_package(inputs, folder / file)
                made[number, name, sizes] = {
                    "file": file,
                    "program": number,
                    "graph": name,
                    "fixed_sizes": list(sizes),
                    "signature": graph.signature(),
                }
    device = parts[0].program.source.device
    packages = list(made.values())
    found = kernels.launched(lambda: _rehearse(parts, packages, batches, folder), device)
    return {"made_for": machine(device), "packages": packages, "kernels": kernels.write(found, folder)}


def _rehearse(
    parts: Sequence[ProgramSession], packages: Sequence[Mapping[str, Any]], batches: Sequence[int], folder: Path
) -> None:
    """Launch what the packages launch, in sessions of their own: those that are saved stay as they are."""
    for number, session in enumerate(parts):
        rehearsing = TritonSession(session.program)
        own = [each for each in packages if each["program"] == number]
        for each in own:
            rehearsing.open_package(each["graph"], folder / each["file"], tuple(each["fixed_sizes"]))
        for name in _graphs(number, len(parts)):
            for batch in batches:
                rehearsing.rehearse(name, batch)


def _graphs(number: int, parts: int) -> tuple[str, ...]:
    """The graphs of a part that are needed as a rule: programs that go on with others read no prompts."""
    if parts == 1:
        return WHOLE, SINGLE
    return (WHOLE,) if number == 0 else (SINGLE,)


def machine(device: torch.device) -> dict[str, Any]:
    """What code that is compiled here depends on, as plain data."""
    return {
        "skipstone": str(sys.modules["skipstone"].__version__),
        "torch": str(torch.__version__),
        "triton": _triton_version() if device.type == "cuda" else None,
        "platform": sys.platform,
        "processor": platform.machine(),
        "instructions": sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True),
        "device": device.type,
        "capability": list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
    }


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def check_machine(made_for: Mapping[str, Any], device: torch.device) -> None:
    """Refuse code that was made for something else.

    Args:
        made_for: what `machine` said where it was made.
    Raises:
        ArtifactError: with the first thing that differs.
    """
    here = machine(device)
    for key, name in _NAMES.items():
        if made_for[key] != here[key]:
            found, wanted = (_text(each[key]) for each in (made_for, here))
            raise ArtifactError(f"The compiled code is for {name} {found}, here is {wanted}.", hint=_HINT)
    if missing := sorted(set(made_for["instructions"]) - set(here["instructions"])):
        raise ArtifactError(f"The compiled code uses instructions that are not here: {', '.join(missing)}.", hint=_HINT)


def check_packages(listed: Mapping[str, Any] | None, store: Store, target: str, device: torch.device) -> None:
    """Refuse native code that is not there or not for here, before anything of it is opened.

    Args:
        listed: what `write` returned, None without compiled code.
        target, device: what the artifact is loaded for.
    Raises:
        InvalidInput: there is none, or none for the target.
        ArtifactError: it was made for something else.
    """
    if listed is None or target != "triton":
        why = "for target='triton' alone" if listed is not None else "saved with compiled_for alone"
        raise InvalidInput(f"{store.directory} has no native code for {target}: it is {why}.", hint="Load it without.")
    with reading(store.directory):
        check_machine(listed["made_for"], device)


def open_packages(listed: Mapping[str, Any], store: Store, parts: Sequence[ProgramSession]) -> None:
    """Let sessions use packages and kernels, after `check_packages` and with the consent of the user: runs their code.

    Raises:
        ArtifactError: a package is missing, damaged, or not of these programs.
    """
    with reading(store.directory):
        kernels.restore(listed["kernels"], store)
        for each in listed["packages"]:
            with reading(path := store.path(each["file"])):
                session, name = parts[each["program"]], each["graph"]
                assert isinstance(session, TritonSession)
                if each["signature"] != session.graphs[name].signature():
                    raise ArtifactError(f"{path} is compiled code of another program.", hint=_HINT)
                session.open_package(name, path, tuple(each["fixed_sizes"]))


def _text(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, list) else str(value)
