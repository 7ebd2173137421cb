"""Artifacts: what is saved of an executable, and how its programs and sessions come back."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Draft, Program
from skipstone.ir.quantized import SPARE
from skipstone.ir.verify import verify
from skipstone.runtime.artifact import packages, weights
from skipstone.runtime.artifact.graph import Sizes, program_from_data, program_to_data, sizes_of
from skipstone.runtime.artifact.onnx_model import lowered_model
from skipstone.runtime.artifact.store import Store, new_directory, reading, write_json
from skipstone.runtime.by_prompt import PromptSession
from skipstone.runtime.directory import check_tokenizer
from skipstone.runtime.onnx.lower import LoweredModel
from skipstone.runtime.onnx.session import OnnxSession
from skipstone.runtime.session import ProgramSession, Session
from skipstone.runtime.speculate import SpeculativeSession

if TYPE_CHECKING:
    from skipstone.runtime.executable import Executable

PROGRAM, WEIGHTS = "program.json", "weights.safetensors"
PLAN, REPORT, CONFIG, GENERATION = "plan.json", "report.json", "config.json", "generation_config.json"


def save(
    executable: Executable,
    directory: Path,
    tokenizer: Any = None,
    overwrite: bool = False,
    compiled_for: Sequence[int] = (),
) -> None:
    """Write an executable to a directory; see `Executable.save`."""
    check_tokenizer(tokenizer)
    sessions = parts_of(executable.session)
    if compiled_for:
        packages.check_batches(sessions, compiled_for)
    programs = [session.program for session in sessions]
    data: dict[str, Any] = {
        "target": executable.target,
        "threads": executable.threads,
        "max_length": executable.max_length,
        "cache_refusal": None,
        "model_output": executable.output_adapter is not None,
        "programs": [program_to_data(each) for each in programs],
        "draft": _draft_to_data(programs[0]),
        "sizes": sizes_of(programs),
    }
    if (refusal := executable.cache_refusal) is not None:
        data["cache_refusal"] = {"feature": refusal.feature, "where": refusal.where, "hint": refusal.hint}
    tensors = {label: each for number, program in enumerate(programs) for label, each in _labelled(number, program)}
    models = [session.lowered for session in sessions if isinstance(session, OnnxSession)]
    for number, lowered in enumerate(models):
        tensors |= {_onnx_label(number, name): tensor for name, tensor in lowered.tensors.items()}
    data["written"] = [lowered.written for lowered in models]
    versions = {name: str(sys.modules[name].__version__) for name in ("skipstone", "torch", "onnxruntime")}
    with new_directory(directory, versions, overwrite) as folder:
        data["tensors"] = weights.write(tensors, folder / WEIGHTS)
        data["compiled"] = packages.write(sessions, compiled_for, folder) if compiled_for else None
        write_json(folder / PROGRAM, data)
        for number, lowered in enumerate(models):
            (folder / onnx_file(number)).write_bytes(lowered.proto)
        if executable.plan is not None:
            executable.plan.save(folder / PLAN)
        if executable.report is not None:
            write_json(folder / REPORT, executable.report.to_dict())
        for name, config in ((CONFIG, executable.config), (GENERATION, executable.generation_config)):
            if hasattr(config, "to_json_string"):  # one of transformers
                (folder / name).write_text(config.to_json_string(use_diff=False), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def onnx_file(number: int) -> str:
    """The file of the ONNX model of a program: the executable's own is 0, those that continue it follow."""
    return f"model-{number}.onnx" if number else "model.onnx"


def parts_of(session: Session) -> list[ProgramSession]:
    """The sessions of single programs that a session consists of."""
    parts: list[Session] = [session]
    if isinstance(session, PromptSession):
        parts = [session.prompts, *session.continuations]
    elif isinstance(session, SpeculativeSession):
        parts = [session.model, session.draft]
    for each in parts:
        if not isinstance(each, ProgramSession):
            raise Unsupported(f"saving a {type(each).__name__}")
    return parts  # type: ignore[return-value]


def _draft_to_data(program: Program) -> dict[str, Any] | None:
    """What is to be known of a draft besides its program, which follows the one that it drafts for."""
    if program.draft is None:
        return None
    buffers = {name: list(sources) for name, sources in program.draft.buffers.items()}
    return {"tokens": program.draft.tokens, "lookup": program.draft.lookup, "buffers": buffers}


def _draft(data: Mapping[str, Any], program: Program) -> Draft:
    """What `_draft_to_data` says of a draft, with its program."""
    buffers = {str(name): tuple(str(each) for each in sources) for name, sources in data["buffers"].items()}
    tokens, lookup = data["tokens"], data["lookup"]
    for count, least in ((tokens, 1), (lookup, 0)):
        if type(count) is not int or not least <= count < SPARE:
            raise ValueError(f"a draft of {count!r} tokens")
    return Draft(program, tokens, buffers, lookup)


def _labelled(number: int, program: Program) -> list[tuple[str, Tensor]]:
    """The tensors of a program by names that no other program has."""
    return [(_label(number, name), tensor) for name, tensor in program.tensors().items()]


def _label(number: int, name: str) -> str:
    return f"{number}/{name}" if number else name


def _onnx_label(number: int, name: str = "") -> str:
    return f"{onnx_file(number)}/{name}"


class Artifact:
    """An artifact on disk, verified.

    Args:
        directory: what `save` wrote.
    Attributes:
        store: its files.
        target: what it was lowered to.
        threads, max_length, cache_refusal, model_output: what the executable was built with; the last says that it
            returns its outputs as Hugging Face models do.
        compiled: its packages of compiled code, see `skipstone.runtime.artifact.packages`, None without any.
        has_models: whether it holds the ONNX models of its programs.
        device: type of the device that it was captured on.
    Raises:
        ArtifactError: see `Store`.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.store = Store(directory)
        with reading(self.store.path(PROGRAM)):
            self._data: Mapping[str, Any] = self.store.json(PROGRAM)
            self.target = str(self._data["target"])
            self.threads, self.max_length = (_count(self._data[name]) for name in ("threads", "max_length"))
            refusal = self._data["cache_refusal"]
            self.cache_refusal = None
            if refusal is not None:
                about = {name: str(refusal[name]) for name in ("where", "hint")}
                self.cache_refusal = Unsupported(str(refusal["feature"]), **about)
            self.model_output = bool(self._data["model_output"])
            self.compiled: Mapping[str, Any] | None = self._data.get("compiled")
            self.has_models = bool(self._data["written"])
            self.device = str(self._data["programs"][0]["source"]["device"])

    def read(self, device: torch.device, models: bool = False) -> tuple[Program, list[LoweredModel]]:
        """The program, with those that continue it, and where wanted their ONNX models over the same memory.

        Args:
            device: where the tensors shall be, and where the program shall compute.
            models: whether ONNX models are wanted, that of the program first.
        Raises:
            ArtifactError: something is damaged, or asks for what an artifact may not have.
        """
        with reading(self.store.path(PROGRAM)):
            data = self._data["programs"]
            labels = [_used(number, each) for number, each in enumerate(data)]
            known: dict[str, Mapping[str, Any]] = self._data["tensors"]
            wanted = [label for each in labels for label in each.values()]
            if models:
                wanted += [label for label in known if label.startswith(tuple(map(_onnx_label, range(len(data)))))]
            places = {label: known[label] for label in wanted}
        with reading(path := self.store.path(WEIGHTS)):
            tensors = weights.read(path, places, device)
        with reading(self.store.path(PROGRAM)):
            sizes = Sizes(self._data["sizes"])
            own = [{name: tensors[label] for name, label in each.items()} for each in labels]
            programs = [program_from_data(*each, sizes, device) for each in zip(data, own, strict=True)]
            draft = self._data.get("draft")  # version 1 has none
            if draft is None:
                programs[0].continuations = tuple(programs[1:])
            else:
                (drafting,) = programs[1:]
                programs[0].draft = _draft(draft, drafting)
            verify(programs[0], after="saving", rules=(9, 10))
        if not models:
            return programs[0], []
        return programs[0], [self._model(number, each, tensors) for number, each in enumerate(programs)]

    def _model(self, number: int, program: Program, tensors: Mapping[str, Tensor]) -> LoweredModel:
        start = _onnx_label(number)
        own = {label.removeprefix(start): each for label, each in tensors.items() if label.startswith(start)}
        with reading(path := self.store.path(onnx_file(number))):
            return lowered_model(path.read_bytes(), own, self._data["written"][number], program)


def _used(number: int, data: Mapping[str, Any]) -> dict[str, str]:
    """The labels of the tensors that a program reads, by its own names."""
    return {each["tensor"]: _label(number, each["tensor"]) for each in data["nodes"] if "tensor" in each}


def _count(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{value!r} is no number of threads or tokens")
    return value
