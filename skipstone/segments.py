"""Which layers may run at the same time: what segments cost in quality and what they save, measured on data.

A segment's states are compared with those of the layers one after another, and its predictions with the model's: both
in one pass over the data, for all segments together. What it saves is predicted by the cost model, of the program in
which everything that runs at the same time is fused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from skipstone.budget import METRICS, Budget, Comparison
from skipstone.calibrate import Batch, CalibrationData, joined, program_inputs, token_batches
from skipstone.certify import refuse_model
from skipstone.ir.capture.exported import refuse_unusable
from skipstone.ir.cost import cost, evaluate, roofline_seconds
from skipstone.ir.device import DeviceProfile
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Port, Program, Role
from skipstone.ir.regions import behind
from skipstone.ir.stream import find_stream, note_layers
from skipstone.optimize import capture
from skipstone.passes.base import run_pass
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.layer_parallel import LayerParallel, Segment, Unit
from skipstone.plan import Plan
from skipstone.report import count, render
from skipstone.rewrite import rewrite
from skipstone.units import profile_of

SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
"""Of the layers, what segments in the middle are tried with."""

KINDS: tuple[tuple[Unit, int], ...] = (("layer", 1), ("layer", 2), ("layer", 4), ("sublayer", 1), ("two_stage", 1))
"""Units and iterations that are tried."""

WORTHWHILE = 1.1
"""Predicted speed-up below which a segment is not worth its loss."""


@dataclass(frozen=True)
class StepCost:
    """What the cost model says of a decode step of one sequence; without a cache, of reading the whole sequence.

    Attributes:
        evaluations: of units in the segment.
        critical_path: matrix products and attentions that wait for each other.
        launches: operators that are not views, everything that runs at the same time being fused.
        milliseconds: the roofline of that program, `skipstone.ir.cost.roofline_seconds`: a gap for each launch, and the
            time to move its bytes, weights once for every iteration.
    """

    evaluations: int
    critical_path: int
    launches: int
    milliseconds: float


@dataclass(frozen=True)
class SegmentFigures:
    """One segment, against the model as it is.

    Attributes:
        segment: which.
        errors: by layer, the relative error of the state behind it: the mean over tokens of ``|h' - h| / |h|``. In two
            stages there is no state but that behind the last layer.
        seen: its predictions and the model's.
        step: the cost of a step.
        gain: the predicted time of the model's step, fused likewise, over that of this one.
    """

    segment: Segment
    errors: Mapping[int, float]
    seen: Comparison
    step: StepCost
    gain: float

    @property
    def nll(self) -> float:
        """The relative increase of the mean negative log-likelihood."""
        return METRICS["nll"](self.seen).value

    @property
    def kl(self) -> float:
        """The mean divergence from the model's predictions, nats a token."""
        return METRICS["kl"](self.seen).value

    @property
    def top1(self) -> float:
        """The share of predictions whose most likely token is the same."""
        return METRICS["top1"](self.seen).value


@dataclass(frozen=True)
class SegmentReport:
    """What segments cost and save; `str()` gives a table.

    Attributes:
        figures: of each segment, in the order in which they were given.
        refused: segments that cannot run in parallel exactly as asked, and why.
        sequential: the cost of the model's own step.
        context: tokens in the cache at the step whose cost is predicted: the longest sequence of the data.
    """

    figures: tuple[SegmentFigures, ...]
    refused: Mapping[Segment, str]
    sequential: StepCost
    context: int

    def __str__(self) -> str:
        seen = self.figures[0].seen
        sample = f"{count(len(seen.tokens), 'sequence')}, {int(seen.tokens.sum()):,} predictions"
        title = f"Layers in parallel ({sample}; steps behind {self.context} tokens)"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        table.add_column("layers", no_wrap=True)
        table.add_column("unit", no_wrap=True)
        for heading in ("K", "dNLL", "KL", "top-1", "error", "evals", "path", "launches", "ms", "gain"):
            table.add_column(heading, justify="right", no_wrap=True)
        own = self.sequential
        table.add_row("none", *[""] * 7, str(own.critical_path), str(own.launches), f"{own.milliseconds:.3g}", "1.00")
        for each in self.figures:
            segment, step = each.segment, each.step
            quality = (f"{each.nll:+.2%}", f"{each.kl:.3g}", f"{each.top1:.1%}", f"{each.errors[segment.stop - 1]:.3g}")
            price = (str(step.evaluations), str(step.critical_path), str(step.launches), f"{step.milliseconds:.3g}")
            layers = f"{segment.start}-{segment.stop - 1}"
            table.add_row(layers, segment.unit, str(segment.iterations), *quality, *price, f"{each.gain:.2f}")
        refused = [f"refused: {segment}, {segment.unit}: {why}" for segment, why in self.refused.items()]
        return render(table, *refused)


def compare_segments(
    model: nn.Module,
    calibration: CalibrationData,
    segments: Sequence[Segment] | None = None,
    *,
    profile: DeviceProfile | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> SegmentReport:
    """Compare segments of layers that run at the same time, on data of the length that the model will be used with.

    Args:
        model, calibration, example_inputs, progress: as of `optimize`.
        segments: what to compare, each alone; None for some of all sizes in the middle, see `middle_segments`.
        profile: the device whose step is predicted; None measures this machine's CPU.
    Raises:
        UserError: the model, the data or a segment cannot be used.
        Unsupported: nothing of the model can run in parallel, or it runs on another device and no profile is given.
    """
    refuse_unusable(model)
    program = capture(model, example_inputs)
    batches = joined(token_batches(calibration, program.source))
    return compare_on(program, batches, segments, profile, progress)


def middle_segments(layers: int, counts: Iterable[int] | None = None) -> list[Segment]:
    """Segments in the middle of a model, small ones first: the first and the last layers bear it worst (2407.09298).

    Args:
        layers: of the model.
        counts: how many layers a segment may have; None for some shares of them, `SHARES`.
    """
    counts = sorted({round(share * layers) for share in SHARES}) if counts is None else counts
    return [
        Segment((layers - size) // 2, (layers + size) // 2, iterations, unit)
        for size in counts
        for unit, iterations in KINDS
        if iterations < size
    ]


def compare_on(
    program: Program,
    batches: Sequence[Batch],
    segments: Sequence[Segment] | None = None,
    profile: DeviceProfile | None = None,
    progress: bool = False,
) -> SegmentReport:
    """`compare_segments` of a captured program."""
    refuse_model(program, batches)
    sequential, steps, refused = step_costs(program, batches, segments, profile, progress)
    found = measure_segments(program, batches, list(steps), progress)
    figures = [
        SegmentFigures(segment, *found[segment], step, sequential.milliseconds / step.milliseconds)
        for segment, step in steps.items()
    ]
    return SegmentReport(tuple(figures), refused, sequential, _context(batches))


def choose_segment(
    program: Program,
    batches: Sequence[Batch],
    budget: Budget,
    segments: Sequence[Segment] | None = None,
    profile: DeviceProfile | None = None,
    progress: bool = False,
) -> Segment:
    """The segment that saves most of those that keep a budget on the data, with a bound at its confidence.

    Args:
        program, batches, segments, profile, progress: as of `compare_on`.
        budget: with a limit on predictions.
    Raises:
        InvalidInput: the budget has no such limit.
        Unsupported: no segment keeps it, or those that do are predicted to save too little.
    """
    refuse_model(program, batches)
    if not budget.limits:
        raise InvalidInput("a budget without a limit on predictions.", hint="Give nll, kl or top1.")
    sequential, steps, _ = step_costs(program, batches, segments, profile, progress)
    gains = {segment: sequential.milliseconds / step.milliseconds for segment, step in steps.items()}
    worthwhile = [each for each in sorted(gains, key=gains.__getitem__, reverse=True) if gains[each] >= WORTHWHILE]
    for segment in worthwhile:
        _, seen = measure_segments(program, batches, [segment], progress)[segment]
        if seen.keeps(budget):
            return segment
    raise Unsupported(
        f"layers of {program.source.name} in parallel within the budget: of {count(len(gains), 'segment')}, "
        f"{len(worthwhile)} are predicted to be {WORTHWHILE} times as fast as the model or more, "
        f"the fastest {max(gains.values()):.2f} times, and none of those keeps it",
        hint="See compare_segments, train the model with skipstone.training.LayerParallelLoss, or allow more.",
    )


# What a segment saves


def step_costs(
    program: Program,
    batches: Sequence[Batch],
    segments: Sequence[Segment] | None,
    profile: DeviceProfile | None,
    progress: bool,
) -> tuple[StepCost, dict[Segment, StepCost], dict[Segment, str]]:
    """The cost of the model's step, that of the step with each segment, and the segments that are refused, and why.

    Raises:
        InvalidPlan: a segment that the model does not have.
        Unsupported: every segment is refused.
    """
    if program.slots():
        raise Unsupported("comparing segments of a program with a KV cache", hint="Compare them before it.")
    note_layers(program)
    segments = middle_segments(find_stream(program).layers) if segments is None else segments
    if not segments:
        raise InvalidInput("there is no segment to compare.", hint="A model of two layers has none: give segments=.")
    profile, context = profile_of(program) if profile is None else profile, _context(batches)
    sequential = _step_cost(program, Plan([FuseParallel()]), profile, context)
    found: dict[Segment, StepCost] = {}
    refused: dict[Segment, Unsupported] = {}
    for segment in tqdm(segments, "predict steps", disable=not progress, leave=False):
        try:
            found[segment] = _step_cost(program, Plan([LayerParallel((segment,)), FuseParallel()]), profile, context)
        except Unsupported as reason:
            refused[segment] = reason
    if not found:
        raise next(iter(refused.values()))
    return sequential, found, {segment: str(reason) for segment, reason in refused.items()}


def _step_cost(program: Program, plan: Plan, profile: DeviceProfile, context: int) -> StepCost:
    rewritten, refusal = rewrite(program, plan, target="eager", strict=False)
    batch, sequence, past = (1, 1, context) if refusal is None else (1, context, 0)
    whole = cost(rewritten)
    numbers = evaluate(whole, batch, sequence, past)
    remarks = [remark for record in rewritten.history for remark in record.remarks]
    evaluations = sum(int(each.numbers["evaluations"]) for each in remarks if each.pass_name == LayerParallel.name)
    milliseconds = 1e3 * roofline_seconds(whole, profile, batch, sequence, past)
    return StepCost(evaluations, int(numbers["critical_path"]), int(numbers["launches"]), milliseconds)


def _context(batches: Sequence[Batch]) -> int:
    return max(batch.tokens.shape[1] for batch in batches)


# What it costs


@torch.no_grad()
def measure_segments(
    program: Program, batches: Sequence[Batch], segments: Sequence[Segment], progress: bool = False
) -> dict[Segment, tuple[dict[int, float], Comparison]]:
    """By segment, the errors of its states and its predictions against the model's; see `SegmentFigures`.

    Of the states, those of one batch are held at a time: ``layers * tokens * hidden`` numbers of the model and as many
    of one segment.

    Args:
        program: without a cache; every segment is one that it has.
    """
    layers = {segment: _layers(segment) for segment in segments}
    full = _tapped(program, sorted(set().union(*layers.values())))
    changed = {
        segment: run_pass(LayerParallel((segment,)), _tapped(program, layers[segment]), strict=False)
        for segment in segments
    }
    errors = {segment: torch.zeros(len(own), dtype=torch.float64) for segment, own in layers.items()}
    seen: dict[Segment, list[Comparison]] = {segment: [] for segment in segments}
    with tqdm(total=len(batches) * len(segments), desc="compare segments", disable=not progress, leave=False) as bar:
        for batch in batches:
            logits, states = _run(full, batch)
            for segment, own in layers.items():
                new_logits, new_states = _run(changed[segment], batch)
                errors[segment] += torch.stack([_error(states[each], new_states[each], batch) for each in own])
                seen[segment].append(Comparison.of(logits, new_logits, batch))
                bar.update()
    tokens = sum(int(batch.counted.sum()) for batch in batches)
    means = {segment: (errors[segment] / tokens).tolist() for segment in segments}
    return {
        segment: (dict(zip(own, means[segment], strict=True)), Comparison.concatenate(seen[segment]))
        for segment, own in layers.items()
    }


def _layers(segment: Segment) -> range:
    """The layers of a segment that have a state behind them."""
    return range(segment.stop - 1 if segment.unit == "two_stage" else segment.start, segment.stop)


def _tapped(program: Program, layers: Iterable[int]) -> Program:
    """A copy of a program that returns the states behind layers too."""
    result = program.copy()
    stream = find_stream(result)
    for layer in layers:
        state = behind(stream.layer(layer)[-1].add, stream.entry)
        result.add_output(Port(f"state_{layer}", Role.TENSOR), state)
    result.recompile()
    return result


def _run(program: Program, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
    """The logits and the states, by layer, on the CPU."""
    results = [each.cpu() for each in program.module(*program_inputs(program, batch))]
    named = dict(zip((port.name for port in program.outputs), results, strict=True))
    logits = next(port.name for port in program.outputs if port.role is Role.LOGITS)
    states = {int(name.removeprefix("state_")): value for name, value in named.items() if name.startswith("state_")}
    return named[logits], states


def _error(exact: Tensor, changed: Tensor, batch: Batch) -> Tensor:
    """The sum over counted tokens of ``|h' - h| / |h|``, float64."""
    one, other = (each.reshape(*batch.tokens.shape, -1)[batch.counted].double() for each in (exact, changed))
    sizes = torch.linalg.vector_norm(one, dim=-1).clamp(min=torch.finfo(one.dtype).tiny)
    return (torch.linalg.vector_norm(other - one, dim=-1) / sizes).sum()
