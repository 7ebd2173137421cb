"""Published ways of choosing what to leave out, to compare `skipstone.search` with.

Each counts its evaluations and passes as published: one-shot methods need the pass that gathers similarity, greedy ones
run the whole model for every candidate in every step. The objectives of the steps are measured for the record and not
counted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from skipstone.calibrate import Batch
from skipstone.ir.errors import InvalidInput
from skipstone.ir.program import Program
from skipstone.objective import Choice
from skipstone.search import ModelTask, Selection, Step, turn
from skipstone.units import LAYERS, SUBLAYERS, Space, Unit


def one_shot(
    program: Program,
    batches: Sequence[Batch],
    count: int,
    *,
    space: Space = LAYERS,
    objective: Choice = "kl",
    milliseconds: Mapping[Unit, float] | None = None,
) -> Selection:
    """The units that turn the stream least, by one look at the cosines.

    Whole layers: ShortGPT (arXiv 2403.03853), and with ``minimum_gap=2`` Skip to the Good Part (arXiv 2603.07475).
    Sublayers, attention and FFN in one ranking: LLM-Drop (arXiv 2406.15786).

    Args:
        See `skipstone.search.search`; count is the number of units, fewer where the gap allows no more.
    """
    task = _task(program, batches, count, space, objective, milliseconds)
    similarity = task.measure_similarity(progress=False)
    order = sorted(task.units, key=lambda unit: (turn(similarity, unit, task.units[unit]), unit))
    return _recorded(task, _allowed(task, order, count), evaluations=0, passes=1)


def contiguous(
    program: Program,
    batches: Sequence[Batch],
    count: int,
    *,
    space: Space = LAYERS,
    objective: Choice = "kl",
    milliseconds: Mapping[Unit, float] | None = None,
) -> Selection:
    """The `count` adjacent layers over which the stream turns by the smallest angle (arXiv 2403.17887), in order.

    Args:
        See `skipstone.search.search`; units are layers.
    Raises:
        InvalidInput: so many adjacent layers are not there, or units are sublayers.
    """
    if space.kinds != ("layer",) or space.minimum_gap > 1:
        raise InvalidInput(f"a span of layers in {space}.", hint="Use kinds=('layer',) and no gap.")
    task = _task(program, batches, count, space, objective, milliseconds)
    spans = [[Unit("layer", start + offset) for offset in range(count)] for start in range(task.stream.layers)]
    spans = [span for span in spans if all(unit in task.units for unit in span)]
    if not spans:
        raise InvalidInput(f"there are no {count} adjacent layers to leave out.", hint="Take fewer.")
    distance = task.measure_similarity(progress=False).angular_distance
    best = min(spans, key=lambda span: float(distance[span[0].layer, span[0].layer + count]))
    return _recorded(task, _allowed(task, best, count), evaluations=0, passes=1)


def greedy(
    program: Program,
    batches: Sequence[Batch],
    count: int,
    *,
    space: Space = SUBLAYERS,
    objective: Choice = "nll",
    milliseconds: Mapping[Unit, float] | None = None,
) -> Selection:
    """In each step the unit whose loss leaves the smallest objective, all that are left being tried.

    Whole layers: SLEB (arXiv 2402.09025). Sublayers: BlockPruner (arXiv 2406.10594).

    Args:
        See `skipstone.search.search`; count is the number of units, fewer where the gap allows no more.
    """
    task = _task(program, batches, count, space, objective, milliseconds)
    task.start()
    chosen: list[Unit] = []
    for _ in range(count):
        alive = [unit for unit in task.units if unit not in chosen and task.allows(chosen, unit)]
        trials = {unit: task.measure([*chosen, unit]) for unit in alive}
        if not trials:
            break
        chosen.append(min(trials, key=trials.__getitem__))
        task.settle(chosen)
    return _recorded(task, chosen, task.evaluations, passes=task.evaluations)


def at_random(
    program: Program,
    batches: Sequence[Batch],
    count: int,
    *,
    seed: int,
    space: Space = SUBLAYERS,
    objective: Choice = "kl",
    milliseconds: Mapping[Unit, float] | None = None,
) -> Selection:
    """Units in a random order that depends on the seed alone.

    Args:
        See `skipstone.search.search`; count is the number of units, fewer where the gap allows no more.
    """
    task = _task(program, batches, count, space, objective, milliseconds)
    order = sorted(task.units)
    random.Random(seed).shuffle(order)
    return _recorded(task, _allowed(task, order, count), evaluations=0, passes=0)


def _task(
    program: Program,
    batches: Sequence[Batch],
    count: int,
    space: Space,
    objective: Choice,
    milliseconds: Mapping[Unit, float] | None,
) -> ModelTask:
    if count < 1:
        raise InvalidInput(f"count is {count}, expected at least 1.")
    task = ModelTask(program, batches, space, objective, milliseconds)
    task.check_count(count)
    return task


def _allowed(task: ModelTask, order: Sequence[Unit], count: int) -> list[Unit]:
    """The first `count` units of an order that may go together."""
    chosen: list[Unit] = []
    for unit in order:
        if len(chosen) < count and task.allows(chosen, unit):
            chosen.append(unit)
    return chosen


def _recorded(task: ModelTask, chosen: Sequence[Unit], evaluations: int, passes: float) -> Selection:
    """A selection with the objective of each prefix."""
    if task.replay.base is None:
        task.start()
    steps = []
    for length in range(1, len(chosen) + 1):
        prefix = chosen[:length]
        saved = sum(task.milliseconds[unit] for unit in prefix)
        steps.append(Step(prefix[-1], task.measure(prefix), saved))
    return Selection(tuple(steps), evaluations, passes)
