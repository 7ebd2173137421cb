"""Kinds of prompts and what each of them can go without: skipping by prompt without training.

How far every sublayer turns a prompt's stream is its profile. Profiles fall into clusters, and for each cluster the
sublayers that its continuations miss least are searched for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from skipstone.calibrate import Batch, program_inputs
from skipstone.certify import prompt_lengths
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program
from skipstone.ir.prompts import prompt_turn
from skipstone.ir.stream import find_stream, note_layers
from skipstone.objective import Choice
from skipstone.passes.skip_by_prompt import CENTROIDS, SkipByPrompt
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.replay import Evaluator
from skipstone.search import search
from skipstone.similarity import before_and_after, compared, refuse_stream
from skipstone.units import SUBLAYERS, Space, Unit, unit_milliseconds

ROUNDS = 100
"""At most so many rounds of k-means; it converges in far fewer."""


@dataclass(frozen=True)
class Clusters:
    """Kinds of prompts.

    Attributes:
        centroids: mean profile of each, float64 [K, sublayers].
        labels: the nearest centroid of each prompt, int64 [N].
    """

    centroids: Tensor
    labels: Tensor


def skip_by_prompt(
    program: Program,
    batches: Sequence[Batch],
    *,
    sets: int = 4,
    space: Space = SUBLAYERS,
    objective: Choice = "kl",
    count: int | None = None,
    limit: float | None = None,
    saving: float | None = None,
    milliseconds: Mapping[Unit, float] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Plan:
    """A plan with a set of sublayers for each kind of prompts.

    The first half of each sequence is its prompt. Kinds for which the search finds the same set are merged. The search
    takes the cost of leaving out sublayers in prompts, too, which decoding does not pay: what a plan costs, and whether
    it keeps a budget, is for `optimize` to prove on other data, as it decodes.

    Args:
        program: as captured.
        batches: calibration data of all kinds of prompts.
        sets: at most so many.
        space, objective, count, limit, saving, milliseconds: of the search for each, see `skipstone.search.search`.
        seed: of the first centroids.
        progress: show progress bars.
    Raises:
        InvalidInput: there are fewer prompts than sets, or an argument that cannot be.
        Unsupported: a program that cannot be searched exactly, or nothing can be left out for any kind of prompts.
    """
    if sets < 1:
        raise InvalidInput(f"sets is {sets}, expected at least 1.")
    note_layers(program)
    profiles = prompt_profiles(program, batches, progress)
    clusters = cluster(profiles, sets, seed)
    if milliseconds is None:
        milliseconds = unit_milliseconds(program, space.units(find_stream(program)))
    options = {"space": space, "objective": objective, "count": count, "limit": limit, "saving": saving}
    found: list[SkipSublayers] = []
    for number in range(len(clusters.centroids)):
        own = _sequences(batches, clusters.labels == number)
        selection = search(program, own, milliseconds=milliseconds, progress=progress, **options)  # type: ignore[arg-type]
        found.append(selection.entry())
    distinct = tuple(dict.fromkeys(found))
    if distinct == (SkipSublayers(),):
        raise Unsupported(
            f"skipping by prompt in {program.source.name}: within the limit, no prompts can go without a sublayer",
            hint="Raise the limit.",
        )
    merged = torch.tensor([distinct.index(each) for each in found])[clusters.labels]
    centroids = torch.stack([profiles[merged == number].mean(0) for number in range(len(distinct))])
    tensors = {CENTROIDS: centroids.float()} if len(distinct) > 1 else {}
    return Plan([SkipByPrompt(distinct)], model=program.source.fingerprint, tensors=tensors)


@torch.no_grad()
def prompt_profiles(program: Program, batches: Sequence[Batch], progress: bool = False) -> Tensor:
    """How far each sublayer turns the stream over the prompt of each sequence: float64 [N, sublayers].

    Args:
        program: without a cache.
        batches: at least one.
    Raises:
        InvalidInput: there is no sequence, or the data leads to NaN or infinity.
        Unsupported: the program has no residual stream [B, S, hidden].
    """
    stream = find_stream(program)
    refuse_stream(program, stream)
    if not batches:
        raise InvalidInput("there is no prompt to look at.")
    evaluator, found = Evaluator(program), []
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    wanted = {node for each in stream.sublayers for node in compared(each)}
    for batch in tqdm(batches, "prompts", disable=not progress, leave=False):
        known = dict(zip(placeholders, program_inputs(program, batch), strict=True))
        values = evaluator.compute(wanted, known)
        lengths = prompt_lengths(batch).to(program.source.device)
        turns = [prompt_turn(*before_and_after(each, values), lengths) for each in stream.sublayers]
        found.append(torch.stack(turns, dim=1).double().cpu())
    profiles = torch.cat(found)
    if not bool(torch.isfinite(profiles).all()):
        raise InvalidInput("the calibration data leads to a stream with NaN or infinity.")
    return profiles


def cluster(profiles: Tensor, count: int, seed: int = 0) -> Clusters:
    """k-means (Lloyd 1982) from spread-out beginnings (k-means++, Arthur and Vassilvitskii 2007).

    Args:
        profiles: float64 [N, features].
        count: at most so many clusters; fewer where profiles coincide.
        seed: of the beginnings.
    Raises:
        InvalidInput: there are fewer profiles than clusters.
    """
    if len(profiles) < count:
        raise InvalidInput(f"{len(profiles)} prompts for {count} sets.", hint="Give more calibration data.")
    generator = torch.Generator().manual_seed(seed)
    centroids = profiles[torch.randint(len(profiles), (1,), generator=generator)]
    while len(centroids) < count:
        squares = torch.cdist(profiles, centroids).amin(dim=1).square()
        if not bool(squares.any()):  # every profile is a centroid by now
            break
        centroids = torch.cat([centroids, profiles[torch.multinomial(squares, 1, generator=generator)]])
    labels = torch.full((len(profiles),), -1)
    for _ in range(ROUNDS):
        nearest = torch.cdist(profiles, centroids).argmin(dim=1)
        if torch.equal(nearest, labels):
            break
        used, labels = nearest.unique(return_inverse=True)
        centroids = torch.stack([profiles[labels == number].mean(0) for number in range(len(used))])
    return Clusters(centroids, labels)


def _sequences(batches: Sequence[Batch], chosen: Tensor) -> list[Batch]:
    """The sequences that are true in bool [N], over all batches; those without any are left out."""
    parts = chosen.split([len(batch.tokens) for batch in batches])
    return [batch.sequences(part) for batch, part in zip(batches, parts, strict=True) if bool(part.any())]
