"""Plans whose settings follow from data, for a model as a user has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from skipstone.adaptive import calibrate_adaptive_ffn
from skipstone.budget import Budget, hold_out
from skipstone.calibrate import Batch, CalibrationData, joined, token_batches
from skipstone.drafts import choose_draft
from skipstone.ir.capture.exported import refuse_unusable
from skipstone.ir.errors import InvalidPlan, UserError
from skipstone.ir.program import Program
from skipstone.optimize import Target, capture, resolve
from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.layer_parallel import LayerParallel
from skipstone.passes.self_speculate import SelfSpeculate
from skipstone.passes.skip_by_prompt import SkipByPrompt
from skipstone.plan import Plan
from skipstone.prompt_rows import choose_prompt_rows
from skipstone.prompts import skip_by_prompt
from skipstone.rewrite import check_model, check_plan
from skipstone.segments import choose_segment
from skipstone.streaming import choose_streaming_heads


def find_adaptive_ffn(
    model: nn.Module,
    calibration: CalibrationData,
    share: float = 0.25,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Plan:
    """A plan by which each token skips about this share of the FFNs; see `skipstone.adaptive.calibrate_adaptive_ffn`.

    Nothing is said about quality: give the plan to `optimize` together with a budget and the same calibration data. The
    sequences that it holds out for the proof are not looked at.

    Args:
        model, calibration, example_inputs: as of `optimize`.
        share: mean share of all FFNs that a token is to skip.
        settings: further settings of the calibration.
    Raises:
        UserError: the model, the data or a setting cannot be used.
        Unsupported: no such share of the FFNs leaves tokens nearly as they were.
    """
    refuse_unusable(model)
    program = capture(model, example_inputs)
    entry = calibrate_adaptive_ffn(program, _chosen_on(calibration, program), share, **settings)
    return Plan([entry], model=program.source.fingerprint)


def find_skip_by_prompt(
    model: nn.Module,
    calibration: CalibrationData,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Plan:
    """A plan with sublayers to skip for each kind of prompts; see `skipstone.prompts.skip_by_prompt`.

    Give the plan to `optimize` together with a budget, which is then proved for each kind, and the same calibration
    data. The sequences that it holds out for the proof are not looked at.

    Args:
        model, calibration, example_inputs: as of `optimize`.
        settings: how many kinds (``sets``), when to stop (``limit``, ``count`` or ``saving``), and further settings.
    Raises:
        UserError: the model, the data or a setting cannot be used.
        Unsupported: nothing can be left out.
    """
    refuse_unusable(model)
    program = capture(model, example_inputs)
    return skip_by_prompt(program, _chosen_on(calibration, program), **settings)


def find_layer_parallel(
    model: nn.Module,
    calibration: CalibrationData,
    budget: Budget,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Plan:
    """A plan that runs layers in the middle at the same time, as many as save most within a budget.

    The data that `optimize` holds out for the proof is not looked at: give it the plan, and the same calibration data
    and budget.

    Args:
        model, calibration, example_inputs: as of `optimize`.
        budget: with a limit on predictions.
        settings: which segments to try (``segments``), for which device (``profile``), and ``progress``; see
            `skipstone.segments.choose_segment`.
    Raises:
        UserError: the model, the data or a setting cannot be used.
        Unsupported: no segment keeps the budget, or those that do are predicted to save too little.
    """
    refuse_unusable(model)
    _check_budget(budget)
    program = capture(model, example_inputs)
    segment = choose_segment(program, _chosen_on(calibration, program, budget), budget, **settings)
    return Plan([LayerParallel((segment,)), FuseParallel()], model=program.source.fingerprint)


def find_compress_kv(
    model: nn.Module,
    calibration: CalibrationData,
    budget: Budget,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Plan:
    """A plan by which as many heads as can within a budget see the newest tokens and the first ones alone.

    What the others keep grows with the sequence, what these keep does not; see
    `skipstone.streaming.choose_streaming_heads`. The data that `optimize` holds out for the proof is not looked at:
    give it the plan, and the same calibration data and budget.

    Args:
        model, calibration, example_inputs: as of `optimize`; sequences as long as the model will be used with.
        budget: with a limit on predictions.
        settings: how many tokens these heads see (``window``, ``sinks``), and ``progress``.
    Raises:
        UserError: the model, the data or a setting cannot be used.
        Unsupported: no head can see a window within the budget.
    """
    refuse_unusable(model)
    _check_budget(budget)
    program = capture(model, example_inputs)
    found = choose_streaming_heads(program, _chosen_on(calibration, program, budget), budget, **settings)
    return Plan([found.entry], model=program.source.fingerprint)


def find_compress_prompt(
    model: nn.Module,
    calibration: CalibrationData,
    budget: Budget,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Plan:
    """A plan that keeps as few tokens of each prompt as a budget allows; see `skipstone.prompt_rows`.

    The data that `optimize` holds out for the proof is not looked at: give it the plan, and the same calibration data
    and budget.

    Args:
        model, calibration, example_inputs: as of `optimize`; sequences as long as the model will be used with. The
            first half of each is its prompt.
        budget: with a limit on predictions.
        settings: what tokens are kept by (``like``, an entry whose number of rows does not count), and ``progress``.
    Raises:
        UserError: the model, the data or a setting cannot be used.
        Unsupported: the model can have no cache, or all of a prompt is needed to keep the budget.
    """
    refuse_unusable(model)
    _check_budget(budget)
    program = capture(model, example_inputs)
    found = choose_prompt_rows(program, _chosen_on(calibration, program, budget), budget, **settings)
    return Plan([found.entry], model=program.source.fingerprint)


def find_self_speculate(
    model: nn.Module,
    calibration: CalibrationData,
    plan: Plan | None = None,
    *,
    target: Target = "auto",
    example_inputs: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Plan:
    """A plan with the draft that makes `generate` fastest on this machine; what is generated stays the same.

    Drafts with weights of few bits and without some sublayers are lowered and measured behind some of the calibration
    sequences; see `skipstone.drafts.choose_draft`.

    Args:
        model, calibration, target, example_inputs: as of `optimize`.
        plan: what is done to the model besides; None for nothing.
        settings: which drafts to try (``drafts``), with how many ``tokens`` at a time, ``threads``, ``least_gain`` and
            ``progress``.
    Returns:
        the plan, with `SelfSpeculate` behind its entries.
    Raises:
        UserError: the model, the data, the plan or a setting cannot be used.
        Unsupported: no draft gains enough, or the model can have no cache.
    """
    refuse_unusable(model)
    plan = Plan([]) if plan is None else plan
    target = resolve(target, next((p.device.type for p in model.parameters()), "cpu"))
    check_plan(plan, target, calibrated=True)
    if any(isinstance(entry, (CompressPrompt, SelfSpeculate, SkipByPrompt)) for entry in plan):
        raise InvalidPlan("the plan has a draft, or programs of its own to go on with.", hint="Leave that entry out.")
    program = capture(model, example_inputs)
    check_model(plan, program)
    best = choose_draft(program, plan, _chosen_on(calibration, program), target, **settings)
    return replace(plan, entries=(*plan, best.entry), model=program.source.fingerprint)


def _check_budget(budget: Any) -> None:
    if not isinstance(budget, Budget):
        hint = "Write Budget(nll=0.01)."
        raise UserError(f"budget is {type(budget).__name__}, expected skipstone.Budget.", hint=hint)


def _chosen_on(calibration: CalibrationData, program: Program, budget: Budget | None = None) -> list[Batch]:
    """The calibration sequences that `optimize` does not hold out to prove a budget on."""
    batches = token_batches(calibration, program.source)
    if budget is None or budget.validation is None:
        batches, _ = hold_out(batches)
    return joined(batches)
