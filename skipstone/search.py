"""Choosing what to leave out: the similarity of the stream shortlists, measured sets of sublayers decide.

Errors are neither additive nor monotone in the set (EvoPress, arXiv 2410.14649): every objective here is that of the
whole set. Three things keep the number of passes low: only units that turn the stream little are candidates; a queue
of outdated values is brought up to date from the top alone (lazy greedy, Minoux 1978); and a set costs the part of the
model behind its first difference from the chosen one (`skipstone.replay`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from skipstone.calibrate import Batch, program_inputs
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program
from skipstone.ir.similarity import Similarity
from skipstone.ir.stream import find_stream
from skipstone.objective import Choice, check_objective, make_objective
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.replay import Replay
from skipstone.similarity import measure_similarity
from skipstone.units import SUBLAYERS, Kind, Space, Unit, entry_of, unit_milliseconds

SHORTLIST = 4
"""Candidates for each unit that is wanted."""

RESERVE = 4
"""How many candidates that were not chosen may replace each one that was."""


@dataclass(frozen=True)
class Step:
    """One more unit.

    Attributes:
        unit: the unit.
        objective: the measured objective of this and all units before it together.
        milliseconds: what they save together, estimated.
    """

    unit: Unit
    objective: float
    milliseconds: float


@dataclass(frozen=True)
class Selection:
    """What to leave out, one unit after another.

    Attributes:
        steps: every prefix of them is a set whose objective was measured. It need not rise from one to the next.
        evaluations: how many sets were measured to choose.
        passes: the work of choosing, in passes of the whole model over the data: the one that gathers similarity, the
            one of the full model, and of each evaluation the share of the sublayers that it ran.
    """

    steps: tuple[Step, ...]
    evaluations: int
    passes: float

    def entry(self, count: int | None = None) -> SkipSublayers:
        """The plan entry that leaves out the units of the first `count` steps (default: all).

        Raises:
            InvalidInput: there are fewer steps.
        """
        count = len(self.steps) if count is None else count
        if not 0 <= count <= len(self.steps):
            raise InvalidInput(f"count is {count}, the selection has {len(self.steps)} steps.")
        return entry_of(step.unit for step in self.steps[:count])


@dataclass(frozen=True)
class Stop:
    """When a selection is complete: at the first of these that is given.

    Attributes:
        count: number of units.
        limit: the objective that the next unit would exceed.
        saving: milliseconds saved.
    Raises:
        InvalidInput: none is given, or one is out of range.
    """

    count: int | None = None
    limit: float | None = None
    saving: float | None = None

    def __post_init__(self) -> None:
        if self.count is None and self.limit is None and self.saving is None:
            raise InvalidInput("nothing says how much to leave out.", hint="Give count=, limit= or saving=.")
        if self.count is not None and self.count < 1:
            raise InvalidInput(f"count is {self.count}, expected at least 1.")
        if self.limit is not None and not self.limit >= 0:
            raise InvalidInput(f"limit is {self.limit}, expected at least 0.")
        if self.saving is not None and not self.saving > 0:
            raise InvalidInput(f"saving is {self.saving}, expected more than 0 milliseconds.")

    def reached(self, steps: Sequence[Step]) -> bool:
        """Whether these steps are enough."""
        if self.count is not None and len(steps) >= self.count:
            return True
        return self.saving is not None and bool(steps) and steps[-1].milliseconds >= self.saving

    def exceeded(self, objective: float) -> bool:
        """Whether a set with this objective is too much; one that is not finite always is."""
        return not math.isfinite(objective) or (self.limit is not None and objective > self.limit)


class Task(Protocol):
    """What a method of selection sees of the model."""

    milliseconds: Mapping[Unit, float]

    def measure(self, chosen: Collection[Unit]) -> float:
        """The objective without these units."""

    def settle(self, chosen: Collection[Unit]) -> None:
        """These units are chosen; sets near them will be measured."""

    def allows(self, chosen: Collection[Unit], unit: Unit) -> bool:
        """Whether a further unit may go with those chosen."""


def search(
    program: Program,
    batches: Sequence[Batch],
    *,
    space: Space = SUBLAYERS,
    objective: Choice = "kl",
    count: int | None = None,
    limit: float | None = None,
    saving: float | None = None,
    milliseconds: Mapping[Unit, float] | None = None,
    similarity: Similarity | None = None,
    progress: bool = False,
) -> Selection:
    """Choose units that cost little quality for the time they save.

    The unit with the smallest rise of the objective per millisecond goes first, and so on until `count`, `limit` or
    `saving` stops it. One round of repair follows: each chosen unit may be replaced by one of the best that were not
    chosen, where that lowers the objective and saves no less time. The new unit takes the place of the old one, and the
    objectives of the prefixes that changed are measured again.

    Args:
        program: without a cache, with all its layers.
        batches: calibration data.
        space: what may be left out.
        objective: ``"kl"``, ``"nll"`` or a function, see `skipstone.objective.make_objective`.
        count: how many units to leave out; fewer where no more are allowed.
        limit: the largest objective of the set.
        saving: how many milliseconds to save.
        milliseconds: what each unit saves; None estimates it, see `skipstone.units.unit_milliseconds`.
        similarity: of this program, measured before, e.g. on masked positions; None measures it on `batches`.
        progress: show a progress bar.
    Raises:
        InvalidInput: an argument that cannot be, or data that leads to NaN.
        Unsupported: a program that cannot be searched exactly.
    """
    stop = Stop(count, limit, saving)
    task = ModelTask(program, batches, space, objective, milliseconds)
    task.check_count(count)
    similarity = task.measure_similarity(progress) if similarity is None else task.checked(similarity)
    candidates = shortlist(similarity, task.units, len(task.units) if count is None else SHORTLIST * count)
    with tqdm(desc="search", unit=" sets", disable=not progress, leave=False) as bar:
        task.start(bar.update)
        steps, rest = lazy_greedy(candidates, task, stop)
        steps = repair(steps, rest[:RESERVE], task)
    return task.selection(steps)


def shortlist(similarity: Similarity, units: Mapping[Unit, Collection[int]], size: int) -> list[Unit]:
    """The units that turn the stream least, in that order.

    Scores ``1 - mean cos`` are divided by the mean score of their kind: attention and FFN are not comparable.
    """
    scores = {unit: turn(similarity, unit, members) for unit, members in units.items()}
    means: dict[Kind, float] = {}
    for kind in {unit.kind for unit in units}:
        own = [score for unit, score in scores.items() if unit.kind == kind]
        means[kind] = sum(own) / len(own) or 1.0
    return sorted(units, key=lambda unit: (scores[unit] / means[unit.kind], unit))[:size]


def turn(similarity: Similarity, unit: Unit, members: Collection[int]) -> float:
    """``1 - mean cos`` of the stream before and after a unit; the sum over its sublayers, if there are several."""
    if unit.kind == "layer":
        return float(similarity.block_influence[unit.layer])
    return float(similarity.sublayers.mean[list(members)].sum())


def lazy_greedy(candidates: Sequence[Unit], task: Task, stop: Stop) -> tuple[list[Step], list[Unit]]:
    """Choose units one by one, each time the one with the smallest rise of the objective per millisecond.

    A rise that was measured with fewer units chosen stands in the queue as an estimate. Only the unit at the top is
    measured again, and it is chosen if it is still at the top. Where rises only grow as units go (a supermodular
    objective) these are the choices of a greedy search that measures everything.

    Returns:
        the steps, and the candidates that were measured but not chosen, best first.
    """
    steps: list[Step] = []
    chosen: list[Unit] = []
    barred: list[tuple[float, int]] = []
    queue = [(-math.inf, rank, -1, math.nan) for rank in range(len(candidates))]  # rate, rank, measured at, objective
    heapq.heapify(queue)
    while queue and not stop.reached(steps):
        rate, rank, measured_at, objective = heapq.heappop(queue)
        unit = candidates[rank]
        if not task.allows(chosen, unit):
            barred.append((rate, rank))
        elif measured_at < len(steps):
            objective = task.measure([*chosen, unit])
            rise = objective - (steps[-1].objective if steps else 0.0)
            heapq.heappush(queue, (rise / task.milliseconds[unit], rank, len(steps), objective))
        elif stop.exceeded(objective):
            heapq.heappush(queue, (rate, rank, measured_at, objective))
            break
        else:
            chosen.append(unit)
            steps.append(Step(unit, objective, _saved(chosen, task)))
            task.settle(chosen)
    rest = sorted([*barred, *((rate, rank) for rate, rank, *_ in queue)])
    return steps, [candidates[rank] for rate, rank in rest if rate > -math.inf]


def repair(steps: Sequence[Step], reserve: Sequence[Unit], task: Task) -> list[Step]:
    """Replace each chosen unit by one of the reserve where that lowers the objective and saves no less time.

    Args:
        steps: as chosen; the task is settled on them.
        reserve: units that were not chosen; one that is replaced joins it.
    """
    chosen, reserve = [step.unit for step in steps], list(reserve)
    objective = steps[-1].objective if steps else 0.0
    changed = len(steps)
    for place, unit in enumerate(chosen):
        others = [*chosen[:place], *chosen[place + 1 :]]
        trials = {
            other: task.measure([*others, other])
            for other in reserve
            if task.milliseconds[other] >= task.milliseconds[unit] and task.allows(others, other)
        }
        best = min(trials, key=trials.__getitem__, default=unit)
        if best is not unit and trials[best] < objective:
            chosen[place], objective = best, trials[best]
            reserve[reserve.index(best)] = unit
            changed = min(changed, place)
            task.settle(chosen)
    repaired = list(steps[:changed])
    for length in range(changed + 1, len(chosen) + 1):
        prefix = chosen[:length]
        found = objective if length == len(chosen) else task.measure(prefix)
        repaired.append(Step(prefix[-1], found, _saved(prefix, task)))
    return repaired


def _saved(units: Collection[Unit], task: Task) -> float:
    return sum(task.milliseconds[unit] for unit in units)


class ModelTask:
    """A program, the units that may be left out of it, and the work done so far.

    Args:
        See `search`.
    Raises:
        InvalidInput: an argument that cannot be.
        Unsupported: a program that cannot be searched exactly.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Batch],
        space: Space,
        objective: Choice,
        milliseconds: Mapping[Unit, float] | None,
    ) -> None:
        if program.slots():
            raise Unsupported("choosing what to leave out of a program with a KV cache", hint="Search before it.")
        logits = check_objective(objective, program, batches)
        self.stream = find_stream(program)
        self.units = space.units(self.stream)
        optional = {index for members in self.units.values() for index in members}
        inputs = [program_inputs(program, batch) for batch in batches]
        self.replay = Replay(program, self.stream, inputs, optional, logits)
        self.program, self.batches, self.space, self.choice = program, batches, space, objective
        self.milliseconds = unit_milliseconds(program, self.units) if milliseconds is None else milliseconds
        for unit in self.units:
            if not 0 < self.milliseconds.get(unit, math.nan) < math.inf:
                found = self.milliseconds.get(unit)
                raise InvalidInput(f"milliseconds of {unit} is {found}.", hint="Every unit needs a positive number.")
        self.evaluations, self.calibrations = 0, 0

    def check_count(self, count: int | None) -> None:
        """Refuse to leave out more units than there are."""
        if count is not None and count > len(self.units):
            raise InvalidInput(f"count is {count}, but there are {len(self.units)} units to leave out.")

    def checked(self, similarity: Similarity) -> Similarity:
        """Refuse the similarity of another model."""
        measured, own = len(similarity.sublayers.total), len(self.stream.sublayers)
        if measured != own or similarity.tokens == 0:
            problem = f"the similarity is of {similarity.tokens} tokens and {measured} sublayers, the model has {own}."
            raise InvalidInput(problem, hint="Measure it on this model.")
        return similarity

    def measure_similarity(self, progress: bool) -> Similarity:
        """The similarity of the program's sublayers, in one pass that is counted."""
        self.calibrations += 1
        return measure_similarity(self.program, self.batches, progress=progress)

    def start(self, notify: Callable[[], object] = lambda: None) -> None:
        """Run the full program; `notify` is called for every set that is measured from now on."""
        self.replay.rebase(frozenset())
        self.objective = make_objective(self.choice, self.batches, self.replay.results(frozenset()))
        self.notify = notify

    def measure(self, chosen: Collection[Unit]) -> float:
        """See `Task.measure`."""
        self.evaluations += 1
        found = self.objective(self.replay.results(self._skipped(chosen)))
        self.notify()
        return found

    def settle(self, chosen: Collection[Unit]) -> None:
        """See `Task.settle`."""
        self.replay.rebase(self._skipped(chosen))

    def allows(self, chosen: Collection[Unit], unit: Unit) -> bool:
        """See `Task.allows`; something has to be left of the model."""
        left = len(self.stream.sublayers) - len(self._skipped([*chosen, unit]))
        return left > 0 and self.space.allows(chosen, unit)

    def selection(self, steps: Sequence[Step]) -> Selection:
        """The result, with the work done."""
        return Selection(tuple(steps), self.evaluations, self.replay.passes + self.calibrations)

    def _skipped(self, chosen: Collection[Unit]) -> frozenset[int]:
        return frozenset(index for unit in chosen for index in self.units[unit])
