"""Exporting a model to a directory that ONNX Runtime, and loaders built on it, run without skipstone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from skipstone.calibrate import CalibrationData, token_batches
from skipstone.ir.capture.exported import refuse_unusable
from skipstone.ir.errors import ArtifactError, InvalidInput, Unsupported
from skipstone.ir.program import Program, Role
from skipstone.optimize import Stages, cache_line, capture, carried_out, report_of
from skipstone.passes.compress_kv import CompressKV
from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.passes.self_speculate import SelfSpeculate
from skipstone.plan import Plan
from skipstone.report import Report
from skipstone.rewrite import check_model, check_plan, rewrite
from skipstone.runtime.directory import check_tokenizer, new_directory
from skipstone.runtime.onnx.columns import ColumnForms, in_columns
from skipstone.runtime.onnx.files import DECODE_FILE, MODEL_FILE, Weights, write
from skipstone.runtime.onnx.forms import OnnxForms
from skipstone.runtime.onnx.genai import CONFIG_FILE, genai_config, refuse_genai
from skipstone.runtime.onnx.lower import lower
from skipstone.runtime.onnx.opsets import OPSET, check_opset

Format = Literal["onnx", "genai"]

PLAN_FILE, REPORT_FILE = "plan.json", "report.json"
TARGET = "onnxruntime"


def export_onnx(
    model: nn.Module,
    out: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    format: Format = "onnx",
    opset: int = OPSET,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: CalibrationData | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    dynamic_shapes: Mapping[str, Sequence[int]] | None = None,
    cache: bool = True,
    overwrite: bool = False,
    strict: bool = True,
    progress: bool = True,
) -> Report:
    """Carry out a plan and write the model as ONNX, with all that a loader needs beside it.

    The directory holds ``model.onnx`` and its weights ``model.onnx.data``, the configuration and the tokenizer of a
    Hugging Face model, the plan that was carried out and the report. It comes into being whole or not at all.

    A decoder with a KV cache is one graph for prompts and single tokens, with optimum's names: ``input_ids`` [B, S],
    ``attention_mask`` [B, past + S], ``position_ids`` [B, S] and ``past_key_values.N.key`` and ``.value`` [B, KH, past,
    D] give ``logits`` [B, S, V] and ``present.N.key`` and ``.value`` [B, KH, past + S, D]. N counts the caches that are
    left. Padding may stand on either side. Where FFNs are skipped adaptively there is one more input, ``decode_start``
    [B]: how many tokens of each sequence are its prompt. All other models keep the names of their inputs and outputs.

    Where prompts choose what is skipped, ``model.onnx`` reads them, and gives ``choice`` [B] if there are several sets.
    With a sequence that chose set K goes on ``decode_K.onnx``, over those of the caches that it has inputs for. These
    graphs share one file of weights.

    Args:
        model: a Hugging Face model or any `nn.Module`, in evaluation mode; it is left untouched.
        out: the directory to write, which must be empty or not exist yet.
        plan: the rewrites; None changes nothing.
        format: ``"onnx"``, or ``"genai"`` to add what onnxruntime-genai asks for.
        opset: version of the standard operators. From 24 on, ONNX's version converter makes them.
        tokenizer: to be saved beside the model.
        calibration, example_inputs, dynamic_shapes, cache, strict, progress: see `skipstone.optimize`.
        overwrite: replace an exported model in `out`, with all that is beside it.
    Returns:
        what was done to the model.
    Raises:
        ArtifactError: `out` cannot be written, or holds something.
        UserError: the model, the plan or an option cannot be used as they are.
        Unsupported: something that would not be exact, or that the format has no way to express.
    """
    directory = Path(out).absolute()
    if format not in get_args(Format):
        raise InvalidInput(f"unknown format {format!r}.", hint="Formats are 'onnx' and 'genai'.")
    check_opset(opset)
    check_tokenizer(tokenizer)
    _check_directory(directory, overwrite)
    plan = Plan([]) if plan is None else plan
    refuse_unusable(model)
    check_plan(plan, TARGET, calibration is not None)
    for entry in plan:
        if isinstance(entry, CompressKV | CompressPrompt):
            feature = f"{entry.name} in an ONNX model, whose loaders give caches a row for each token"
            raise Unsupported(feature, hint="Leave it out; skipstone.optimize(...).save(...) keeps it.")
    if any(isinstance(entry, SelfSpeculate) for entry in plan):
        hint = "Leave it out; skipstone.optimize(...).save(...) keeps the draft."
        raise Unsupported(f"{SelfSpeculate.name} in an ONNX model, which has no loop over tokens", hint=hint)
    if format == "genai":
        _check_end_token(model)
    with closing(Stages(progress)) as stages:  # a bar that is left would be drawn anew behind the error
        with stages("capture"):
            captured = capture(model, example_inputs, dynamic_shapes)
            check_model(plan, captured)
            batches = [] if calibration is None else token_batches(calibration, captured.source)
        with stages("rewrite"):
            options = {"cache": cache, "strict": strict, "batches": batches, "progress": progress}
            program, refusal = rewrite(captured, plan, target=TARGET, **options)  # type: ignore[arg-type]
            exported, forms = (in_columns(program), ColumnForms) if program.slots() else (program, OnnxForms)
            if format == "genai":
                refuse_genai(exported)
        plan = carried_out(plan, program, bool(batches))
        with new_directory(directory) as folder:
            with stages("lower"):
                _write_models(folder, exported, forms, opset)
            report = report_of(captured, program, TARGET, cache_line(program, refusal, cache), stages)
            plan.save(folder / PLAN_FILE)
            _write_json(folder / REPORT_FILE, report.to_dict())
            _write_configuration(folder, model, exported, format)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    return report


def _check_end_token(model: nn.Module) -> None:
    """Refuse a model for onnxruntime-genai that does not say what ends a sequence: it would end them at token 0."""
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.eos_token_id is None:
        hint = "Set model.generation_config.eos_token_id, which onnxruntime-genai cannot do without."
        raise InvalidInput("the generation config has no eos_token_id.", hint=hint)


def _write_models(folder: Path, program: Program, forms: type[OnnxForms], opset: int) -> None:
    """The models of a program and of those that continue it, over one file of weights."""
    weights = Weights()
    parts = {MODEL_FILE: program} | {DECODE_FILE.format(n): each for n, each in enumerate(program.continuations)}
    lowered = {name: lower(part, forms=forms, opset=opset, weights=weights) for name, part in parts.items()}
    write({name: each.proto for name, each in lowered.items()}, weights, folder)


def _check_directory(directory: Path, overwrite: bool) -> None:
    """Refuse what cannot become the directory, before any work begins."""
    if directory.exists() and not directory.is_dir():
        raise ArtifactError(f"{directory} is a file.", hint="Name a directory that does not exist yet.")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise ArtifactError(f"{directory} is not empty.", hint="Name another directory, or ask to overwrite it.")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MODEL_FILE).is_file():
        raise ArtifactError(f"{directory} holds no exported model to overwrite.", hint="Name another directory.")


def _write_configuration(directory: Path, model: nn.Module, program: Program, format: Format) -> None:
    """The configuration files of a Hugging Face model, and of onnxruntime-genai if it is asked for."""
    if not isinstance(model, PreTrainedModel):
        return
    directory.joinpath("config.json").write_text(model.config.to_json_string(use_diff=False), encoding="utf-8")
    generation: dict[str, Any] = {}
    if model.can_generate() and model.generation_config is not None:
        generation = model.generation_config.to_diff_dict()
        _write_json(directory / "generation_config.json", generation)
    if format == "genai":
        config = model.config.get_text_config()
        logits = program.output(Role.LOGITS)
        content = genai_config(
            program,
            heads=config.num_attention_heads,
            hidden=config.hidden_size,
            vocabulary=int(logits.meta["val"].shape[-1]),  # type: ignore[union-attr]
            generation=generation,
        )
        _write_json(directory / CONFIG_FILE, content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
