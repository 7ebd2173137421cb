"""Carrying out a plan: its passes, in their fixed order, on a captured program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from skipstone.calibrate import Batch, estimate_errors, measure
from skipstone.ir.dialect import GATE
from skipstone.ir.errors import InvalidPlan, Unsupported, UserError
from skipstone.ir.printer import readable
from skipstone.ir.program import Draft, Program, Record
from skipstone.ir.stream import note_layers
from skipstone.passes.base import Pass, Pipeline, Remark, Status, run_pass
from skipstone.passes.cast import CastToFloat32
from skipstone.passes.cleanup import Cleanup
from skipstone.passes.compress_kv import CompressKV
from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.passes.condition_kv import ConditionKV, Rewrite
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.passes.layer_parallel import LayerParallel
from skipstone.passes.predicate_ffn import PredicateFFN
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.passes.quantize_weights import QuantizeWeights
from skipstone.passes.self_speculate import SelfSpeculate
from skipstone.passes.skip_by_prompt import SkipByPrompt
from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.plan import Plan

BEHIND_CACHE = (QuantizeWeights, SkipByPrompt, SkipFFNAdaptive, CompressKV, QuantizeKV, CompressPrompt)
"""Entries of a plan that work on programs with a cache; weights are quantized without one, too."""
SIDE_BY_SIDE = (LayerParallel, FuseParallel)
"""Those that make attentions of their own, each of which then gets its slot."""


def rewrite(
    program: Program,
    plan: Plan,
    *,
    target: str,
    cache: bool = True,
    strict: bool = True,
    batches: Sequence[Batch] = (),
    progress: bool = False,
) -> tuple[Program, Unsupported | None]:
    """Run the plan's passes in their fixed order.

    Returns:
        the rewritten program, and the reason why it has no KV cache although one was asked for.
    """
    start = begin(program, target, strict)
    result, refusal = without_draft(
        start, plan, target=target, cache=cache, strict=strict, batches=batches, progress=progress
    )
    for entry in plan:
        if isinstance(entry, SelfSpeculate):
            if not result.slots():
                hint = "Leave it out, or use cache=True."
                raise refusal or Unsupported(f"{entry.name} without a KV cache", hint=hint)
            result = with_draft(result, start, plan, entry, target=target, strict=strict)
    return result, refusal


def begin(program: Program, target: str, strict: bool = True) -> Program:
    """What the passes of any plan begin with, in a dtype that the target computes in."""
    note_layers(program)
    is_half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in program.tensors().values())
    return run_pass(CastToFloat32(), program, strict) if target == "onnxruntime" and is_half else program


def with_draft(
    program: Program, start: Program, plan: Plan, entry: SelfSpeculate, *, target: str, strict: bool = True
) -> Program:
    """A program that the plan was carried out on, with a draft.

    Args:
        program: with a cache.
        start: what the plan began with, see `begin`.
        entry: how the draft is cheaper.
    Raises:
        UserError: the draft does not fit the model.
        Unsupported: it cannot be carried out, or needs keys and values that the program does not keep.
    """
    # What was measured for the model holds for the draft: they share what it quantizes.
    own = Plan.of(entry.entries(plan), tensors=program.calibration)
    draft, _ = without_draft(start, own, target=target, strict=strict)
    program = replace(program, draft=Draft(draft, entry.tokens, {}))
    return run_pass(entry, program, strict)


def without_draft(
    program: Program,
    plan: Plan,
    *,
    target: str,
    cache: bool = True,
    strict: bool = True,
    batches: Sequence[Batch] = (),
    progress: bool = False,
) -> tuple[Program, Unsupported | None]:
    """What `rewrite` makes of the program of `begin`, whether or not the plan asks for a draft."""
    quantize = _quantization(plan)
    first = [entry for entry in plan if not isinstance(entry, (*SIDE_BY_SIDE, *BEHIND_CACHE, SelfSpeculate))]
    program = Pipeline([Cleanup(), *first], strict).run(program)
    program.calibration = dict(plan.tensors)
    if quantize is not None:
        program = prepare_quantization(program, quantize, batches, strict, progress)
    for entry in plan:
        if isinstance(entry, CompressKV) and (split := entry.split(program)):
            program = run_pass(split, program, strict)
    for entry in plan:
        if isinstance(entry, SIDE_BY_SIDE):
            program = run_pass(entry, program, strict)
    if quantize is not None and batches:
        program.calibration |= measure(program, batches, QuantizeKV.name, progress)
        program.calibration |= estimate_errors(program, quantize, batches)
    refusal = None
    if cache:
        try:
            program = run_pass(InsertKVCache(), program, strict)
        except Unsupported as reason:
            refusal = reason
            remark = Remark(InsertKVCache.name, Status.REFUSED, reason.where, str(reason))
            count = sum(1 for _ in program.nodes())
            program.history.append(Record(InsertKVCache.name, (remark,), count, count, 0.0, readable(program)))
    for entry in plan:
        if isinstance(entry, LayerParallel) and entry.kv != "iterate" and not program.slots():
            remark = entry.missed(f"kv={entry.kv!r}", "without a cache, no keys and values stay")
            program.history[-1] = replace(program.history[-1], remarks=(*program.history[-1].remarks, remark))
        if isinstance(entry, BEHIND_CACHE):
            program = run_pass(entry, program, strict)
    if target == "triton" and any(True for _ in program.nodes(GATE)):
        program = run_pass(PredicateFFN(), program, strict)
    return run_pass(Cleanup(), program, strict), refusal


def prepare_quantization(
    program: Program, quantize: QuantizeKV, batches: Sequence[Batch], strict: bool = True, progress: bool = False
) -> Program:
    """Rewrite keys and values so that they quantize better, and split heads that differ in their formats.

    Each weight must stand in one place: layers that run at the same time, several times, come later.

    Args:
        program: without a cache.
        batches: calibration data; without it, the program's own calibration is used where it has one.
    """
    if quantize.condition:
        known = any(name.startswith(f"{ConditionKV.name}/") for name in program.calibration)
        conditioning = quantize.conditioning(calibrated=bool(batches) or known)
        if batches and set(conditioning.rewrites) - {Rewrite.SPLIT_K_BIAS}:
            program.calibration |= measure(program, batches, ConditionKV.name, progress)
        program = run_pass(conditioning, program, strict)
    if split := quantize.split(program):  # behind conditioning: heads that were split apart share their projections
        program = run_pass(split, program, strict)
    return program


def check_plan(plan: Plan, target: str, calibrated: bool) -> None:
    """Refuse a plan that no model fits, or that the target cannot carry out, before any work begins.

    Args:
        calibrated: whether there is calibration data.
    Raises:
        UserError: it is no plan, an entry has impossible settings, or calibration data is missing.
        Unsupported: the target has no such format of keys and values.
    """
    if not isinstance(plan, Plan):
        raise UserError(f"plan is {type(plan).__name__}, expected skipstone.Plan.", hint="Use Plan.load(path).")
    for entry in plan:
        if isinstance(entry, (CompressKV, CompressPrompt, LayerParallel, SkipByPrompt, SkipFFNAdaptive, SelfSpeculate)):
            entry.validate()
        _check_company(entry, plan)
        if isinstance(entry, SelfSpeculate):
            check_plan(Plan.of(entry.entries(plan), tensors=plan.tensors), target, calibrated)
        if isinstance(entry, QuantizeWeights) and target == "triton":
            hint = "Use target='onnxruntime' on the CPU, or skipstone.export_onnx(model, directory, plan)."
            raise Unsupported(f"{entry.name} on the triton target", hint=hint)
    _check_quantization(plan, target, calibrated)


_APART: Mapping[tuple[type[Pass], type[Pass]], str] = {
    (CompressKV, SkipByPrompt): "which reads prompts in one step",
    (CompressKV, CompressPrompt): "which reads prompts in one step",
    (SelfSpeculate, SkipByPrompt): "which goes on by several programs",
    (SelfSpeculate, CompressPrompt): "which goes on by another program",
}
"""Entries that do not go together, and what of the second one the first cannot do with."""


def _check_company(entry: Pass, plan: Plan) -> None:
    """Refuse an entry beside others that it does not go together with."""
    for (one, other), why in _APART.items():
        if isinstance(entry, one) and any(isinstance(each, other) for each in plan):
            raise Unsupported(f"{one.name} together with {other.name}, {why}", hint="Leave one of them out.")


def check_model(plan: Plan, captured: Program) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        InvalidPlan: its fingerprint is another one.
    """
    if plan.model not in (None, captured.source.fingerprint):
        raise InvalidPlan(
            f"the plan was made for another model (fingerprint {plan.model[:12]}..., this one has "
            f"{captured.source.fingerprint[:12]}...).",
            hint="Make a plan for this model, or set its 'model' to null if the layers mean the same.",
        )


def _quantization(plan: Plan) -> QuantizeKV | None:
    return next((entry for entry in plan if isinstance(entry, QuantizeKV)), None)


def _check_quantization(plan: Plan, target: str, calibrated: bool) -> None:
    """Refuse formats that the target does not have, or that lack their calibration, before any work begins."""
    quantize = _quantization(plan)
    if quantize is None:
        return
    formats = quantize.validate()
    if target == "onnxruntime":
        from skipstone.runtime.onnx.quantized import refuse_formats

        refuse_formats(formats, quantize.residual, quantize.sinks)
    static = sorted(form.name for form in formats if form.static == "channel")
    if static and not calibrated and not plan.tensors:
        raise InvalidPlan(
            f"quantize_kv: {static[0]} has scales that are calibrated beforehand, and there is no calibration data.",
            hint="Pass calibration=, a list of token batches, or take granularity='token'.",
        )
