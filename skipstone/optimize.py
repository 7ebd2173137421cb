"""The driver: from a model to an executable, in one call."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from skipstone.budget import Budget, check_data, hold_out
from skipstone.calibrate import Batch, CalibrationData, joined, token_batches
from skipstone.certify import candidates, refuse_model, within
from skipstone.ir.capture.exported import refuse_unusable
from skipstone.ir.capture.module import capture_module
from skipstone.ir.cost import cost, evaluate, example_sizes, kv_bytes_fixed, kv_bytes_of_prompt, kv_bytes_per_token
from skipstone.ir.errors import InvalidInput, InvalidPlan, Unsupported, UserError
from skipstone.ir.program import Program
from skipstone.ir.stream import PARALLEL, SublayerKind, find_stream
from skipstone.passes.layer_parallel import LayerParallel
from skipstone.passes.self_speculate import SelfSpeculate
from skipstone.plan import Plan
from skipstone.report import Conversion, Footprint, Report, Stage
from skipstone.reuse import move_parameters
from skipstone.rewrite import check_model, check_plan, rewrite
from skipstone.runtime.executable import Executable
from skipstone.runtime.session import ProgramSession, Session, check_threads

DEVICES = {"onnxruntime": "cpu", "triton": "cuda"}
"""The device that each target is for; the first of a device is what ``"auto"`` takes there."""

Target = Literal["auto", "eager", "onnxruntime", "triton"]
Mode = Literal["default", "max-autotune"]


def optimize(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    target: Target = "auto",
    calibration: CalibrationData | None = None,
    budget: Budget | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    dynamic_shapes: Mapping[str, Sequence[int]] | None = None,
    max_length: int | None = None,
    threads: int | None = None,
    mode: Mode = "default",
    cache: bool = True,
    reuse_model: bool = False,
    strict: bool = True,
    progress: bool = True,
) -> Executable:
    """Capture `model`, rewrite it as `plan` says, and lower it to an executable.

    Args:
        model: a Hugging Face model or any `nn.Module`, in evaluation mode. It is left untouched, but for `reuse_model`.
        plan: the rewrites; None or an empty plan changes nothing but the way it runs.
        calibration: token batches that static scales and the conditioning of keys and values are measured on: integer
            tensors [B, S], or mappings with `input_ids` and `attention_mask`. A plan that was calibrated before brings
            its own numbers. Texts become token batches with `skipstone.tokenize`, and those of a model that fills in
            masks get some with `skipstone.mask_tokens`.
        budget: what the plan may cost, proved on data that it was not chosen on. Without a plan, the sublayers to skip
            are searched for. Where nothing is proved to keep it, or nothing gets faster, the model is unchanged.
        target: ``"onnxruntime"`` (what ``"auto"`` takes on a CPU), ``"triton"`` (on a CUDA device) or ``"eager"``, the
            reference interpreter.
        example_inputs: named example tensors; needed unless the model is a Hugging Face model over tokens.
        dynamic_shapes: for plain modules, the dynamic axes of each input (default: the first two).
        max_length: longest sequence to make room for.
        threads: threads to compute with (default: the runtime's own choice).
        mode: ``"max-autotune"`` lets the triton target choose among kernels by their times, which takes minutes once:
            Inductor keeps what it found on disk, and so does Triton with what it compiled.
        cache: whether to decode through a KV cache. Where a cache would not be exact the executable comes without one,
            and `Executable.cache_refusal` says why.
        reuse_model: whether parameters that the plan stacks (`FuseParallel`) become views of the stacks, so that they
            are in memory once. The model goes on to work as before. Weights that took over gains are copies still.
        strict: verify the program after every pass, and refuse a plan entry that applies nowhere.
        progress: show a progress bar.
    Returns:
        the executable; `report` says what was done to the model.
    Raises:
        UserError: the model, plan or example cannot be used as they are.
        Unsupported: something that would not be exact.
    """
    plan = Plan([]) if plan is None else plan
    refuse_unusable(model)
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise InvalidInput(f"max_length is {max_length!r}, expected a number of tokens, at least 1.")
    check_threads(threads)
    target = resolve(target, next((p.device.type for p in model.parameters()), "cpu"))
    check_mode(mode, target)
    check_plan(plan, target, calibration is not None)
    _check_budget(budget, plan, calibration, cache)
    stages = Stages(progress)
    with stages("capture"):
        captured = capture(model, example_inputs, dynamic_shapes)
        check_model(plan, captured)
        batches = [] if calibration is None else token_batches(calibration, captured.source)

    def build(plan: Plan, batches: Sequence[Batch] = batches) -> Executable:
        with stages("rewrite"):
            options = {"target": target, "cache": cache, "strict": strict, "batches": batches, "progress": progress}
            program, refusal = rewrite(captured, plan, **options)  # type: ignore[arg-type]
        with stages("lower"):
            session = lower(program, target, threads, mode)
        report = report_of(captured, program, target, cache_line(program, refusal, cache), stages, threads)
        return Executable(
            session,
            config=getattr(model, "config", None),
            generation_config=getattr(model, "generation_config", None),
            report=report,
            plan=carried_out(plan, program, bool(batches)),
            target=target,
            threads=threads,
            max_length=max_length,
            cache_refusal=refusal,
            output_adapter=model_output if isinstance(model, PreTrainedModel) else None,
        )

    executable = build(plan) if budget is None else _build_within(budget, build, captured, plan, batches, stages)
    stages.close()
    if reuse_model:  # last: the model stays as it is where anything fails
        move_parameters(model, captured, executable.session.program)
    return executable


def _build_within(
    budget: Budget,
    build: Callable[[Plan, Sequence[Batch]], Executable],
    captured: Program,
    plan: Plan,
    batches: Sequence[Batch],
    stages: Stages,
) -> Executable:
    """The executable of the plan, or without one of what a search finds, if it is proved to keep the budget."""
    chosen_on, proved_on = hold_out(batches)
    if budget.validation is not None:
        chosen_on, proved_on = list(batches), token_batches(budget.validation, captured.source)
    refuse_model(captured, [*chosen_on, *proved_on])
    check_data(chosen_on, proved_on)
    chosen_on, proved_on = joined(chosen_on), joined(proved_on)
    if len(plan):
        plans = [plan]
    else:
        with stages("search"):
            plans = candidates(captured, budget, chosen_on, stages.progress)
    return within(lambda each: build(each, chosen_on), plans, budget, proved_on, stages.progress)


def report_of(
    captured: Program, program: Program, target: str, cache: str, stages: Stages, threads: int | None = None
) -> Report:
    """What was done from a captured program to a rewritten one; `cache` says whether that has a cache, in one line."""
    return Report(
        model=captured.source.name,
        target=target,
        threads=threads,
        remarks=tuple(remark for record in program.history for remark in record.remarks),
        before=footprint(captured),
        after=footprint(program),
        stages=tuple(stages.done),
        conversions=conversions(captured, program),
        cache=cache,
    )


def carried_out(plan: Plan, program: Program, calibrated: bool) -> Plan:
    """The plan for this model, with what was calibrated for it; scales measured anew are not those that were proved."""
    proved = () if calibrated else plan.certificates
    return replace(plan, model=program.source.fingerprint, tensors=program.calibration, certificates=proved)


def model_output(outputs: dict[str, Tensor]) -> ModelOutput:
    """Outputs by name, as Hugging Face models return them."""
    return ModelOutput(outputs)


def _check_budget(budget: Budget | None, plan: Plan, calibration: CalibrationData | None, cache: bool) -> None:
    """Refuse a budget that cannot be proved, or not without more data, before any work begins."""
    if budget is None:
        return
    if not isinstance(budget, Budget):
        raise UserError(
            f"budget is {type(budget).__name__}, expected skipstone.Budget.", hint="Write Budget(nll=0.01)."
        )
    if len(plan) and all(isinstance(entry, SelfSpeculate) for entry in plan):
        hint = "Leave the budget out: what is generated is what the model generates."
        raise InvalidPlan("self_speculate changes no results, so there is nothing to prove.", hint=hint)
    if cache and any(isinstance(entry, LayerParallel) and entry.kv != "iterate" for entry in plan):
        feature = "a budget for layer_parallel with one slot a layer: sequences are proved as they are read at once"
        raise Unsupported(feature, hint="Take kv='iterate', which decodes token by token what it reads at once.")
    hint = "Pass calibration=, a list of token batches: the last of them are held out for the proof."
    if calibration is None and not len(plan):
        raise InvalidInput("there is no data to choose sublayers on.", hint=hint)
    if calibration is None and budget.validation is None:
        raise InvalidInput("there is no data to prove the budget on.", hint=hint)


def footprint(program: Program) -> Footprint:
    """Sublayers, FLOPs and bytes of a program, for one token."""
    try:
        kinds = Counter(str(sublayer.kind) for sublayer in find_stream(program).sublayers)
    except Unsupported:
        kinds = Counter()
    for node in program.nodes():
        kinds.update(node.meta.get(PARALLEL, ()))
    try:
        flops = evaluate(cost(program), batch=1, sequence=1, others=example_sizes(program))["flops"]
    except UserError:  # sizes inside the graph follow from the data
        flops = None
    return Footprint(
        sublayers=kinds.total(),
        attention=kinds[SublayerKind.ATTENTION],
        ffn=kinds[SublayerKind.FFN],
        flops=flops,
        weight_bytes=program.weight_bytes(),
        kv_bytes_per_token=kv_bytes_per_token(program),
        nodes=sum(1 for _ in program.nodes()),
        kv_bytes_fixed=kv_bytes_fixed(program),
        kv_bytes_of_prompt=kv_bytes_of_prompt(program),
    )


def conversions(before: Program, after: Program) -> tuple[Conversion, ...]:
    """The weights that a rewritten program holds in another dtype than the captured one, by dtype."""
    own = before.tensors()
    pairs: dict[tuple[str, str], list[int]] = {}
    for name, tensor in after.tensors().items():
        if name in own and own[name].dtype != tensor.dtype:
            dtypes = tuple(str(each.dtype).removeprefix("torch.") for each in (own[name], tensor))
            sizes = pairs.setdefault(dtypes, [0, 0, 0])  # type: ignore[arg-type]
            for place, amount in enumerate((1, own[name].nbytes, tensor.nbytes)):
                sizes[place] += amount
    return tuple(Conversion(*dtypes, *sizes) for dtypes, sizes in pairs.items())


def resolve(target: str, device: str) -> Any:
    """The target that is meant for a model on a device.

    Args:
        target: its name, or ``"auto"``.
        device: type of the device, e.g. ``"cpu"``.
    Raises:
        UserError: there is no such target.
        Unsupported: it is for another device.
    """
    if target not in ("auto", *DEVICES, "eager"):
        known = ", ".join(repr(each) for each in DEVICES)
        raise UserError(f"unknown target {target!r}.", hint=f"Targets are 'auto', {known} and 'eager'.")
    if target == "auto":
        for name, own in DEVICES.items():
            if device == own:
                return name
        raise Unsupported(f"a target for {device}", hint="Move the model to the CPU, or use target='eager'.")
    if device != DEVICES.get(target, device):
        raise Unsupported(f"the {target} target for a model on {device}", hint=f"Move it to {DEVICES[target]} first.")
    return target


def capture(
    model: nn.Module,
    example: Mapping[str, Tensor] | None = None,
    dynamic: Mapping[str, Sequence[int]] | None = None,
) -> Program:
    """The program of a model; the arguments are those of `optimize`.

    Raises:
        UserError: the inputs of a plain module are not known.
        Unsupported: it cannot be captured exactly.
    """
    if isinstance(model, PreTrainedModel):
        from skipstone.ir.capture.huggingface import capture_huggingface

        return capture_huggingface(model, example)
    if example is None:
        raise UserError(
            f"{type(model).__name__} is not a Hugging Face model, so its inputs are not known.",
            hint="Pass example_inputs={name: tensor} with batch and sequence sizes of at least two.",
        )
    return capture_module(model, example, dynamic)


def check_mode(mode: str, target: str) -> None:
    """Refuse a mode that a target does not have.

    Raises:
        UserError: it is no mode, or one of another target.
    """
    if mode not in get_args(Mode):
        raise UserError(f"mode is {mode!r}, expected {' or '.join(map(repr, get_args(Mode)))}.")
    if mode != "default" and target != "triton":
        raise UserError(f"mode={mode!r} for the target {target!r}, which has nothing to tune.", hint="Leave it out.")


def lower(program: Program, target: str, threads: int | None = None, mode: Mode = "default") -> Session:
    """The session of a rewritten program, of what continues it, and of what drafts for it.

    Raises:
        Unsupported: the target has no exact form for an operator or dtype.
    """
    session = _session(program, target, threads, mode)
    if program.draft is not None:
        from skipstone.runtime.speculate import SpeculativeSession

        return SpeculativeSession(session, _session(program.draft.program, target, threads, mode), program.draft)
    if not program.continuations:
        return session
    from skipstone.runtime.by_prompt import PromptSession

    return PromptSession(session, [_session(part, target, threads, mode) for part in program.continuations])


def _session(program: Program, target: str, threads: int | None, mode: Mode) -> ProgramSession:
    if target == "eager":
        from skipstone.runtime.eager import EagerSession

        return EagerSession(program)
    if target == "triton":
        from skipstone.runtime.triton.session import TritonSession

        return TritonSession(program, is_tuned=mode == "max-autotune")
    from skipstone.runtime.onnx.session import OnnxSession

    return OnnxSession(program, threads)


def cache_line(program: Program, refusal: Unsupported | None, asked: bool) -> str:
    """What a report says of the KV cache: its slots, or why there is none."""
    if program.slots():
        return f"{len(program.slots())} slots"
    return f"refused: {refusal}" if refusal is not None else ("none" if asked else "not asked for")


class Stages:
    """Times the stages of one call, and shows them as a progress bar."""

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.done: list[Stage] = []
        self.bar = tqdm(disable=not progress, bar_format="skipstone {desc:<10}{n} done, {elapsed}")

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.bar.set_description_str(name)
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            self.bar.close()
            raise
        self.done.append(Stage(name, time.perf_counter() - started))
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
