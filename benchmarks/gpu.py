"""Decoding on a GPU: an optimized model against the ways to run it that it competes with, and against the memory.

`decode` is a model of the shape of Qwen2-0.5B, `deep` one of 32 narrow layers whose middle ones run in sequence or at
the same time, `options` the first one compiled in other ways; random weights in bfloat16, batch 1, 1024 tokens in the
cache, greedy. A system's time is that of one more token in a row of them, with the host's work. "graph" is the device's
part of it alone, one replay of a CUDA graph. The floor is the time to read weights, keys and values once at the
bandwidth of a large copy (bytes read and written) that is measured in the same run.

Wrong results have no speed: logits are first compared with those of the same model in float64, or of the same program
run operator by operator.

Compiling takes minutes, so the systems of a stage compile at the same time in processes of their own, and are then
measured in turns. The figures of every stage are written as soon as they are there. A run that was cut off goes on at
the next stage if it is started again, on the same device and with the same code.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_systems import TUNED, checked, copying, deep, hugging_face, planned, qwen2
from benchmarks.harness import Row, Samples, arguments, device, publish, take_turns, versions
from benchmarks.workers import Build, Worker, workers
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.layer_parallel import LayerParallel, Segment, Unit
from skipstone.plan import Plan

ROOT, ROOMS = Path(__file__).parent.parent, ("ir", "passes", "kernels", "runtime", "skipstone", "benchmarks")

Figures = Callable[[str, Mapping[str, Samples], Mapping[str, float]], Iterator[Row]]
"""Of one system: its name, the measurements of all by figure, and the bytes that each system reads at least."""


@dataclass(frozen=True)
class Part:
    """A comparison.

    Attributes:
        base: what everything is compared with, in every stage.
        stages: other systems, those that are wanted most first.
        figures: what is made of the measurements.
    """

    base: Mapping[str, Build]
    stages: Sequence[Mapping[str, Build]]
    figures: Figures


def decode_figures(name: str, samples: Mapping[str, Samples], sizes: Mapping[str, float]) -> Iterator[Row]:
    """The optimized model against the floor, or a baseline over it; baselines in milliseconds."""
    if name == "ours":
        yield from against_floor("decode", name, samples, sizes)
    elif name != "copy":
        ours, theirs = samples["ours"], samples[name].median
        goal = 1.0 if name == "hf compiled" else None
        yield Row(f"decode_vs_{name.replace(' ', '_')}", theirs / ours.median, theirs * 1e3, goal, ours.count)


def deep_figures(name: str, samples: Mapping[str, Samples], sizes: Mapping[str, float]) -> Iterator[Row]:
    """A plan against the floor, and layers at the same time against the faster of those in sequence."""
    if name == "copy":
        return
    yield from against_floor(f"deep_{name}", name, samples, sizes)
    if name in AT_ONCE:
        for mode in ("", " graph"):
            base, each = min(samples[other + mode].median for other in SEQUENTIAL), samples[name + mode]
            metric, goal = f"layers_at_once_{name}{mode.replace(' ', '_')}", 2.0 if name.startswith("24") else 1.3
            yield Row(metric, base / each.median, base * 1e3, goal, each.count)


def options_figures(name: str, samples: Mapping[str, Samples], sizes: Mapping[str, float]) -> Iterator[Row]:
    """A way of compiling against the floor."""
    if name != "copy":
        yield from against_floor(f"options_{name}", name, samples, sizes)


def against_floor(metric: str, name: str, samples: Mapping[str, Samples], sizes: Mapping[str, float]) -> Iterator[Row]:
    """Tokens a second, and shares of the copy bandwidth; baselines are the floor in milliseconds."""
    floor = sizes[name] * samples["copy"].median
    each, graph = samples[name], samples[f"{name} graph"]
    yield Row(f"{metric}_tokens_per_second", 1 / each.median, None, None, each.count)
    yield Row(f"{metric}_of_copy_bandwidth", floor / each.median, floor * 1e3, None, each.count)
    yield Row(f"{metric}_graph_of_copy_bandwidth", floor / graph.median, floor * 1e3, None, graph.count)


SEQUENTIAL = {"sequential": Plan([]), "sequential_fused": Plan([FuseParallel()])}

AT_ONCE: Mapping[str, tuple[range, Unit, bool]] = {
    "24_1_layer": (range(4, 28), "layer", True),
    "24_1_two_stage": (range(4, 28), "two_stage", True),
    "12_1_layer": (range(10, 22), "layer", True),
    "12_1_two_stage": (range(10, 22), "two_stage", True),
    "24_1_two_stage_unfused": (range(4, 28), "two_stage", False),
}
"""Layers that run at the same time, in one iteration: which, in which unit, and whether they become one."""

COPY = {"copy": copying}


def _sequential(name: str) -> Build:
    return partial(planned, name, SEQUENTIAL[name], deep, None)


def _at_once(name: str) -> Build:
    layers, unit, is_fused = AT_ONCE[name]
    segment = LayerParallel((Segment(layers.start, layers.stop, unit=unit),))
    return partial(planned, name, Plan([segment, *([FuseParallel()] if is_fused else [])]), deep, None)


def _hugging_face(*names: str) -> dict[str, Build]:
    return {name: partial(hugging_face, name) for name in names}


def _options(**options: Mapping[str, bool]) -> dict[str, Build]:
    return {name: partial(planned, name, Plan([]), qwen2, chosen) for name, chosen in options.items()}


# What Inductor tunes by measuring gets ready in a stage of its own, where nothing else compiles.
PARTS = {
    "decode": Part(
        COPY | {"ours": partial(checked, "ours")},
        (_hugging_face("hf eager", "hf compiled"), _hugging_face("hf compiled tuned")),
        decode_figures,
    ),
    "deep": Part(
        COPY | {name: _sequential(name) for name in SEQUENTIAL},
        tuple({name: _at_once(name) for name in AT_ONCE if name.startswith(layers)} for layers in ("24", "12")),
        deep_figures,
    ),
    "options": Part(
        COPY, (_options(none={}, combo={"combo_kernels": True}), _options(tuned=TUNED)), options_figures
    ),
}  # fmt: skip


def measure(
    part: Part, number: int, ready: Callable[[Mapping[str, Build]], dict[str, Worker]], rounds: int
) -> Iterator[Row]:
    """The figures of a stage: of the base too in the first one.

    Args:
        number: of the stage.
        ready: see `benchmarks.workers.workers`.
    Raises:
        SystemExit: there is nothing to compare with.
    """
    found = ready(part.base | part.stages[number])
    if missing := part.base.keys() - found:
        raise SystemExit(f"{', '.join(sorted(missing))} did not get ready: there is nothing to compare with.")
    for name in part.stages[number].keys() - found:
        print(f"{name} is left out: its process has ended", flush=True)
    samples = take_turns({key: turn for each in found.values() for key, turn in each.turns().items()}, rounds)
    for name, each in samples.items():
        fastest = min(each.by_threads[1])
        print(f"{name}: median {each.median * 1e3:.4g} ms, at least {fastest * 1e3:.4g}", flush=True)
    sizes = {name: worker.size for name, worker in found.items()}
    for name in found:
        if number == 0 or name not in part.base:
            yield from found[name].facts
            yield from part.figures(name, samples, sizes)


class Progress:
    """What a run that was cut off has measured: a file beside the figures, a line for each stage."""

    def __init__(self, path: Path, rounds: int) -> None:
        self._path = path.with_name(f"{path.name}.stages")
        self._run = {"device": device(), "versions": versions(), "code": _code(), "rounds": rounds}
        self.stages: dict[str, list[Row]] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # the run ended while it was written
                continue
            if entry["run"] == self._run:
                self.stages[entry["stage"]] = [Row(**row) for row in entry["rows"]]

    def add(self, stage: str, rows: Iterable[Row]) -> None:
        """Keep the figures of a stage."""
        self.stages[stage] = list(rows)
        entry = {"run": self._run, "stage": stage, "rows": [asdict(row) for row in self.stages[stage]]}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(f"\n{json.dumps(entry)}\n")

    def rows(self) -> list[Row]:
        """All figures."""
        return [row for rows in self.stages.values() for row in rows]

    def finish(self) -> None:
        """The next run begins from the start."""
        self._path.unlink(missing_ok=True)


def _code() -> str:
    """A hash of what is measured."""
    files = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def main() -> None:
    """Measure, and print and write the figures of every stage as soon as they are there."""
    parser = arguments("gpu", __doc__ or "")
    parser.add_argument("--rows", nargs="+", choices=PARTS, default=["decode", "deep"], help="which parts to measure")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu measures decoding on a CUDA device, and torch finds none here.", file=sys.stderr)
        raise SystemExit(2)
    rounds = 5 if chosen.quick else 15
    progress = Progress(chosen.json, rounds)
    for name in chosen.rows:
        part = PARTS[name]
        with workers() as ready:
            for number in range(len(part.stages)):
                stage = f"{name} {number + 1}"
                if stage in progress.stages:
                    print(f"{stage} was measured before the run was cut off", flush=True)
                    continue
                progress.add(stage, measure(part, number, ready, rounds))
                publish("gpu", progress.rows(), chosen.json)
    progress.finish()


if __name__ == "__main__":
    main()
