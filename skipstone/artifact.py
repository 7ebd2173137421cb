"""Loading what `Executable.save` wrote."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from skipstone.ir.dialect import GATE
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program
from skipstone.optimize import DEVICES, lower, model_output, resolve
from skipstone.passes.base import run_pass
from skipstone.passes.predicate_ffn import PredicateFFN
from skipstone.plan import Plan
from skipstone.report import Report
from skipstone.runtime.artifact.artifact import CONFIG, GENERATION, PLAN, REPORT, Artifact, parts_of
from skipstone.runtime.artifact.packages import check_packages, open_packages
from skipstone.runtime.artifact.store import Store, reading
from skipstone.runtime.by_prompt import PromptSession
from skipstone.runtime.executable import Executable
from skipstone.runtime.onnx.lower import LoweredModel
from skipstone.runtime.onnx.session import OnnxSession
from skipstone.runtime.session import Session
from skipstone.runtime.speculate import SpeculativeSession


def load(
    directory: str | os.PathLike[str],
    target: str | None = None,
    *,
    device: str | torch.device | None = None,
    threads: int | None = None,
    native_code: bool = False,
) -> Executable:
    """Read an executable that `Executable.save` wrote; it computes what the saved one does.

    The model's source code is not needed, and without `native_code` nothing in the directory is run as code. Only files
    whose checksums are right are read. On ``"onnxruntime"`` the saved ONNX model is opened, on ``"triton"`` the program
    is compiled anew.

    Args:
        target: by default that which it was saved for. For another one, the program is lowered anew.
        device: by default the one of the target; of ``"eager"``, the one that the model was on, or the CPU where there
            is no such device.
        threads: by default as many as it was saved with.
        native_code: use the compiled code of an artifact that was saved with `compiled_for`. It does whatever it wants
            with the rights of this process: consent only where you trust whoever made it. Batches of other sizes are
            compiled when they are first met, as all are without it.
    Raises:
        ArtifactError: it is no artifact, not complete, damaged, of a newer version, or asks for what is not allowed, or
            its compiled code is for another machine, device or version.
        InvalidInput: it has no compiled code for the target.
        Unsupported: the target is not for the device, the device is not there, or the target has no exact form for the
            program.
    """
    artifact = Artifact(directory)
    target = artifact.target if target is None else target
    place = _device(target, artifact.device, device)
    target = resolve(target, place.type)
    threads = artifact.threads if threads is None else threads
    if native_code:
        check_packages(artifact.compiled, artifact.store, target, place)
    program, models = artifact.read(place, models=target == "onnxruntime" and artifact.has_models)
    if target == "triton":
        program = _predicated(program)
    session = _opened(program, models, threads) if models else lower(program, target, threads)
    if native_code and artifact.compiled is not None:
        open_packages(artifact.compiled, artifact.store, parts_of(session))
    return Executable(
        session,
        config=_config(artifact.store),
        generation_config=_generation_config(artifact.store),
        report=_report(artifact.store, target, threads),
        plan=Plan.load(artifact.store.path(PLAN)) if PLAN in artifact.store else None,
        target=target,
        threads=threads,
        max_length=artifact.max_length,
        cache_refusal=artifact.cache_refusal,
        output_adapter=model_output if artifact.model_output else None,
    )


def _predicated(program: Program) -> Program:
    """A program, and its draft, with FFNs that tokens skip in the form of the triton target."""
    if any(True for _ in program.nodes(GATE)):
        program = run_pass(PredicateFFN(), program)
    if program.draft is not None:
        program.draft = replace(program.draft, program=_predicated(program.draft.program))
    return program


def _device(target: str, saved: str, asked: str | torch.device | None) -> torch.device:
    """Where to load for a target what was saved from a device.

    Raises:
        InvalidInput: what is asked for is no device.
        Unsupported: it is not there.
    """
    try:
        place = torch.device(asked or DEVICES.get(target, saved))
    except RuntimeError as error:
        raise InvalidInput(f"{asked!r} is no device.", hint="Devices are 'cpu' and 'cuda'.") from error
    if place.type != "cuda":
        return place
    if torch.cuda.is_available():
        return place if place.index is not None else torch.device("cuda", torch.cuda.current_device())
    if asked is None and target not in DEVICES:
        return torch.device("cpu")
    hint = "Load it for the CPU: target='onnxruntime' or target='eager'."
    raise Unsupported(f"the {target} target without a CUDA device", hint=hint)


def _opened(program: Program, models: list[LoweredModel], threads: int | None) -> Session:
    """The session of ONNX models that were saved."""
    with reading("the ONNX model"):
        programs = (program, *program.continuations, *([program.draft.program] if program.draft is not None else []))
        first, *rest = (OnnxSession(each, threads, model) for each, model in zip(programs, models, strict=True))
    if program.draft is not None:
        return SpeculativeSession(first, rest[0], program.draft)
    return PromptSession(first, rest) if rest else first


def _config(store: Store) -> Any:
    """The configuration of a Hugging Face model; of the plain class where transformers does not know its type."""
    if CONFIG not in store:
        return None
    with reading(store.path(CONFIG)):
        data = store.json(CONFIG)
        kind = data.get("model_type")
        # The mapping loads its classes when they are asked for, of which `get` knows nothing.
        known = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PreTrainedConfig  # noqa: SIM401
        return known.from_dict(data)


def _generation_config(store: Store) -> Any:
    if GENERATION not in store:
        return None
    with reading(store.path(GENERATION)):
        return GenerationConfig.from_dict(store.json(GENERATION))


def _report(store: Store, target: str, threads: int | None) -> Report | None:
    if REPORT not in store:
        return None
    with reading(store.path(REPORT)):
        return replace(Report.from_dict(store.json(REPORT)), target=target, threads=threads)
