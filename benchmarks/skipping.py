"""What leaving out sublayers costs and saves: our selection against published ones, and the speed of skipping.

Quality, on the reference model and on one of 24 layers. Every method saves at least as much time of a decode step as
one layer in six takes; measured are an attention and an FFN, on executables without several of them. Methods choose on
the training split. On the test split, the relative rise of the negative log-likelihood is measured, with a one-sided
bound at 95%.

A published method counts with the better of its variants on the test split, to its advantage: layers or sublayers, and
in one-shot selection by similarity, neighbours allowed or not. Of random choices, the mean of five counts.

The second part, `benchmarks.skipping_speed`, measures a larger model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.decode import steps
from benchmarks.harness import Row, arguments, publish, take_turns
from benchmarks.reference.evaluate import CHECKPOINT, windows
from benchmarks.skipping_speed import speed
from skipstone.baselines import at_random, contiguous, greedy, one_shot
from skipstone.budget import Comparison, compare
from skipstone.calibrate import Batch
from skipstone.certify import logits
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.stream import note_layers
from skipstone.optimize import optimize
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import TokenModel
from skipstone.search import Selection, search
from skipstone.units import LAYERS, SUBLAYERS, Space, Unit

REFERENCE = {"": CHECKPOINT}
MODELS = REFERENCE | {"deep_": Path(__file__).parent / "reference" / "stdlib-llama-24"}
TRAINING = "python -m benchmarks.reference.train --layers 24 --width 96 --steps 2400"
LENGTH, BATCH, PROMPT = 256, 16, 128
CALIBRATION_WINDOWS, TEST_WINDOWS, QUICK_TEST_WINDOWS = 32, 128, 32
SHARE = 6  # of the layers, one in so many is to be saved
SEEDS = range(5)
APART = Space(kinds=("layer",), minimum_gap=2)


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("skipping", __doc__ or "").parse_args()
    rows: list[Row] = []
    for prefix, checkpoint in (REFERENCE if options.quick else MODELS).items():
        if (checkpoint / "model.safetensors").exists():
            rows += Trial(prefix, checkpoint, options.quick).rows()
        else:
            print(f"{checkpoint.name} is not there, and not measured. Train it with {TRAINING} --out {checkpoint}.")
    publish("skipping", rows + speed(options.quick), options.json)


@dataclass(frozen=True)
class Outcome:
    """What a method chose, how it was found, and what it costs on held-out text."""

    selection: Selection
    entry: SkipSublayers
    seen: Comparison

    @property
    def dnll(self) -> float:
        """The relative rise of the mean negative log-likelihood."""
        return float(self.seen.increase.sum() / self.seen.nll.sum())


class Trial:
    """Methods of selection on one model.

    Args:
        prefix: of the figures' names.
        checkpoint: of the model.
        quick: fewer windows, and no times of whole selections.
    """

    def __init__(self, prefix: str, checkpoint: Path, quick: bool) -> None:
        self.prefix, self.quick = prefix, quick
        self.model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.program = capture_huggingface(self.model)
        note_layers(self.program)
        self.chosen_on = batches("train", CALIBRATION_WINDOWS)
        self.measured_on = batches("test", QUICK_TEST_WINDOWS if quick else TEST_WINDOWS)
        self.full = self.eager(SkipSublayers())
        layers = range(self.model.config.num_hidden_layers)
        times = self.unit_milliseconds()
        self.milliseconds = {Unit(kind, layer): time for kind, time in times.items() for layer in layers}
        self.layers = len(layers) // SHARE
        self.saving = self.layers * times["layer"]

    def rows(self) -> Iterator[Row]:
        """Run every method."""
        found = search(self.program, self.chosen_on, saving=self.saving, milliseconds=self.milliseconds)
        ours = self.judged(found, len(found.steps))
        greedy_by = {"layers": self.first(LAYERS, greedy), "sublayers": self.first(SUBLAYERS, greedy)}
        published = {
            "one_shot": best(self.first(space, one_shot) for space in (LAYERS, APART, SUBLAYERS)),
            "contiguous": self.first(LAYERS, contiguous),
            "greedy_nll": best(greedy_by.values()),
        }
        for name, outcome in {"ours": ours, **published}.items():
            sample = len(outcome.seen.tokens)
            print(f"{self.prefix}{name}: {outcome.entry}")
            yield self.row(f"dnll_{name}", outcome.dnll, sample)
            yield self.row(f"dnll_{name}_bound", bound(outcome.seen), sample)
        random = [self.first(SUBLAYERS, partial(at_random, seed=seed)).dnll for seed in SEEDS]
        yield self.row("dnll_random", fmean(random), len(random))
        strongest = best(published.values())
        behind = replace(ours.seen, increase=ours.seen.increase - strongest.seen.increase)
        least = 2 * float(behind.increase.sum() / behind.nll.sum()) - bound(behind)
        yield self.row("dnll_ours_behind_best_at_least", least, len(behind.tokens), strongest.dnll, goal=0.0)
        most = greedy_by["sublayers"].selection
        yield self.row("passes_ours", found.passes, found.evaluations, most.passes, goal=most.passes / 3)
        yield self.row("passes_greedy_nll", most.passes, most.evaluations)
        fewer = greedy_by["layers"].selection
        yield self.row("passes_greedy_nll_layers", fewer.passes, fewer.evaluations)
        if not self.quick:
            yield from self.time_saved({"ours": ours, **published})

    def row(
        self, metric: str, value: float, samples: int, baseline: float | None = None, goal: float | None = None
    ) -> Row:
        """A figure of this model; goals are upper bounds."""
        what, _, rest = metric.partition("_")
        return Row(f"{what}_{self.prefix}{rest}", value, baseline, goal, samples, at_most=True)

    def first(self, space: Space, method: Callable[..., Selection]) -> Outcome:
        """The first prefix of a published method's choices that saves enough."""
        count = self.layers if space.kinds == LAYERS.kinds else 3 * self.layers
        found = method(self.program, self.chosen_on, count, space=space, milliseconds=self.milliseconds)
        enough = (number for number, step in enumerate(found.steps, 1) if step.milliseconds >= 0.999 * self.saving)
        return self.judged(found, next(enough, len(found.steps)))

    def judged(self, selection: Selection, count: int) -> Outcome:
        """The first units of a selection, on held-out text."""
        entry = selection.entry(count)
        changed = self.eager(entry)
        seen = compare(lambda each: logits(self.full, each), lambda each: logits(changed, each), self.measured_on)
        return Outcome(selection, entry, seen)

    def eager(self, entry: SkipSublayers) -> TokenModel:
        """An executable without a lowering."""
        program, _ = rewrite(self.program, Plan([entry]), target="eager", strict=False)
        return TokenModel(EagerSession(program))

    def unit_milliseconds(self) -> dict[Any, float]:
        """What an attention, an FFN and a layer take of a decode step: the mean over a third of the layers."""
        layers = tuple(range(1, 1 + self.model.config.num_hidden_layers // 3))
        without = self.step_milliseconds(
            {"attention": SkipSublayers(attention=layers), "ffn": SkipSublayers(ffn=layers)}
        )
        times = {kind: (without["full"] - without[kind]) / len(layers) for kind in ("attention", "ffn")}
        print(f"{self.prefix}milliseconds: {times}, of a step of {without['full']:.3f}")
        return times | {"layer": sum(times.values())}

    def time_saved(self, outcomes: Mapping[str, Outcome]) -> Iterator[Row]:
        """The share of a decode step that each choice saves, measured."""
        times = self.step_milliseconds({name: outcome.entry for name, outcome in outcomes.items()})
        for name in outcomes:
            yield self.row(f"saved_{name}", 1 - times[name] / times["full"], self.rounds, times["full"])

    def step_milliseconds(self, entries: Mapping[str, SkipSublayers]) -> dict[str, float]:
        """Measured milliseconds of a decode step, without these sublayers and `full`; one thread, in turns."""
        plans = {"full": Plan([]), **{name: Plan([entry]) for name, entry in entries.items()}}
        ids = windows("train", 2, PROMPT)[:1, :-1]
        turns = {
            (name, 1): steps(name, optimize(self.model, plan, threads=1, progress=False), ids)
            for name, plan in plans.items()
        }
        return {name: each.median * 1e3 for name, each in take_turns(turns, self.rounds).items()}

    @property
    def rounds(self) -> int:
        """Measurements of each time."""
        return 5 if self.quick else 15


def batches(split: Any, count: int) -> list[Batch]:
    """Batches of `count` windows of a split."""
    samples = windows(split, count, LENGTH).split(BATCH)
    return [Batch(each, torch.ones_like(each, dtype=torch.bool)) for each in samples]


def best(outcomes: Any) -> Outcome:
    """The one that costs least."""
    return min(outcomes, key=lambda outcome: outcome.dnll)


def bound(seen: Comparison) -> float:
    """The upper bound of the relative rise of the negative log-likelihood, one-sided, at 95%."""
    return seen.certificate("nll", 0.0, 0.95, "", "eager").bound


if __name__ == "__main__":
    main()
