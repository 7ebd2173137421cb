"""Adaptive FFN skipping on data: settings for a model, and how much of it is skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from skipstone.calibrate import Batch, program_inputs
from skipstone.ir.dialect import GATE
from skipstone.ir.errors import InvalidInput, InvalidPlan, Unsupported
from skipstone.ir.gates import cosine
from skipstone.ir.program import Port, Program, Role
from skipstone.ir.stream import SublayerKind, find_stream, original_layers
from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.replay import Evaluator
from skipstone.runtime.cache import KVCache
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import TokenModel
from skipstone.runtime.session import step_inputs
from skipstone.similarity import before_and_after, compared, refuse_stream

CANDIDATES = 200
"""Thresholds that are tried, at equal steps of the distribution of cosines."""


def calibrate_adaptive_ffn(
    program: Program,
    batches: Sequence[Batch],
    share: float = 0.25,
    *,
    saturated: float = 0.95,
    rarely: float = 0.5,
    warmup_tokens: int = 4,
    max_share: float = 0.35,
) -> SkipFFNAdaptive:
    """The settings with the highest threshold at which tokens skip a wanted share of the FFNs.

    The share is what tokens would skip by their cosines in the full model. Nothing is said about quality: prove the
    plan on other data, as it decodes.

    Args:
        program: without a cache.
        batches: at least one.
        share: mean share of all FFNs that a token is to skip behind the warm-up.
        saturated: smallest threshold; an FFN that turns the stream further is never taken for one that does nothing.
        rarely: a layer is cold if its cosine stays below the threshold on more than this share of the tokens. All
            layers before the first one that is not, and behind the last, stay cold.
        warmup_tokens, max_share: as in the result.
    Raises:
        InvalidPlan: a setting of the result would be refused, or the share is not in (0, max_share].
        InvalidInput, Unsupported: as `ffn_cosines`.
        Unsupported: no such threshold reaches the share; the message gives the cosines.
    """
    entry = SkipFFNAdaptive(warmup_tokens=warmup_tokens, max_share=max_share)
    entry.validate()
    if not 0 < share <= max_share:
        raise InvalidPlan(f"share is {share}, expected more than 0 and at most max_share, {max_share}.")
    layers, (numbers, cosines) = find_stream(program).layers, ffn_cosines(program, batches)
    best, highest = 0.0, cosines[cosines >= saturated].double().sort().values
    steps = torch.linspace(1, 0, CANDIDATES, dtype=torch.float64)
    for threshold in highest[(steps * (len(highest) - 1)).long()].unique().flip(0).tolist() if len(highest) else ():
        warm = ((cosines < threshold).double().mean(dim=1) <= rarely).nonzero().flatten().tolist()
        if len(warm) < 2:
            continue
        first, last = warm[0], warm[-1]
        skipped = _skipped(cosines[first : last + 1] >= threshold, entry.limit(layers)) / layers
        best = max(best, skipped)
        if skipped >= share:
            cold_start, cold_end = numbers[first], layers - 1 - numbers[last]
            return replace(entry, threshold=threshold, cold_start=cold_start, cold_end=cold_end)
    means = ", ".join(f"{layer}: {mean:.3f}" for layer, mean in zip(numbers, cosines.mean(dim=1).tolist(), strict=True))
    raise Unsupported(
        f"adaptive FFN skipping of {share:.0%} of the FFNs of {program.source.name}: from a cosine of {saturated} on, "
        f"a token would skip {best:.1%}. Mean cosines by layer: {means}",
        hint="Ask for a smaller share, or leave out whole sublayers with SkipSublayers.",
    )


def ffn_cosines(program: Program, batches: Sequence[Batch]) -> tuple[list[int], Tensor]:
    """How far each FFN turns the stream, token by token.

    Returns:
        the layers that have an FFN, and the cosines of the stream before and after each, [layers, tokens].
    Raises:
        InvalidInput: there is no FFN or no token, or the data leads to NaN or infinity.
        Unsupported: the program has no residual stream [B, S, hidden].
    """
    stream = find_stream(program)
    refuse_stream(program, stream)
    ffns = [each for each in stream.sublayers if each.kind is SublayerKind.FFN]
    if not ffns or not batches:
        raise InvalidInput("there is no FFN, or no token, to take cosines of.")
    evaluator, found = Evaluator(program), []
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for batch in batches:
        known = dict(zip(placeholders, program_inputs(program, batch), strict=True))
        values = evaluator.compute({node for each in ffns for node in compared(each)}, known)
        pairs = (before_and_after(each, values) for each in ffns)
        found.append(torch.stack([cosine(*pair).cpu()[batch.valid] for pair in pairs]))
    cosines = torch.cat(found, dim=1)
    if not bool(torch.isfinite(cosines).all()):
        raise InvalidInput("the calibration data leads to a stream with NaN or infinity.")
    return [each.layer for each in ffns], cosines


def _skipped(met: Tensor, limit: int) -> float:
    """How many FFNs a token skips on average, of warm ones at which it meets the condition or not: bool [W, tokens]."""
    behind = torch.arange(len(met) - 1, -1, -1)
    left = torch.where(met, behind.unsqueeze(1), 0).amax(dim=0)  # behind the first one where it is met
    return float(left.clamp(max=limit).double().mean())


@torch.no_grad()
def skipped_ffns(
    executable: TokenModel, prompt: Tensor, tokens: Tensor, attention_mask: Tensor | None = None
) -> dict[int, Tensor]:
    """Which FFNs are skipped when given tokens are decoded after a prompt, whatever the executable's target.

    Args:
        executable: with adaptive FFN skipping.
        prompt: integers [B, S]; `attention_mask` as in `TokenModel.prefill`.
        tokens: integers [B, T], e.g. what it generated.
    Returns:
        bool [B, T] by layer, for those that may be skipped.
    Raises:
        Unsupported: the plan skips by prompt, too.
    """
    observed = executable.program.copy()
    gates = list(observed.nodes(GATE))
    for gate in gates:
        observed.add_output(Port(f"skipped_{gate.meta['layer']}", Role.TENSOR), gate.args[1])  # type: ignore[arg-type]
    observed.recompile()
    _, cache = executable.prefill(prompt, attention_mask)
    if not isinstance(cache, KVCache):
        raise Unsupported("telling which FFNs are skipped where prompts are continued by different programs")
    tokens, layout = executable.prepare(tokens)
    executable.reserve(cache, int(cache.lengths.max()) + layout.width)
    rows = torch.arange(layout.width, device=tokens.device).expand(tokens.shape)
    positions = cache.lengths.unsqueeze(1) + rows + observed.source.first_position
    values = step_inputs(observed, tokens, positions, layout.counts, layout.rows(1), cache)
    outputs = EagerSession(observed).run(values | cache.buffers)
    return {gate.meta["layer"]: outputs[f"skipped_{gate.meta['layer']}"] for gate in gates}


def skipped_share(
    executable: TokenModel, prompt: Tensor, tokens: Tensor, attention_mask: Tensor | None = None
) -> float:
    """The share of the FFNs, of all layers, that `skipped_ffns` finds to be skipped."""
    skipped = skipped_ffns(executable, prompt, tokens, attention_mask)
    layers = original_layers(executable.program, find_stream(executable.program))
    return sum(float(each.double().mean()) for each in skipped.values()) / layers
