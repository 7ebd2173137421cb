"""Decoding on a GPU: an optimized model against the ways to run it that it competes with, and against the memory.

Rows are named by model, batch and context: "0.5b_1_1k" is a model of the shape of Qwen2-0.5B behind 1024 tokens,
"1b_8_8k" eight sequences of one of the shape of Llama-3.2-1B behind 8192 each. Of each, the empty plan is compared with
transformers, as it is and compiled with CUDA graphs over a static cache, and with plans that make it cheaper. "deep" is
a model of 32 narrow layers whose middle ones run in sequence or at the same time; "kernels" (for eight sequences,
"kernels_8") and "tuned" ask what our kernel of linear layers, and what Inductor's tuning of the baseline, are worth.
Weights are random, in bfloat16; decoding is greedy.

A system's time is that of one more token of each sequence in a row of them, with the host's work. Our sessions choose
the tokens by themselves, as in `generate`; "steps" are ours with the logits of each read, and "graph" is the device's
part of such a step alone, one replay of a CUDA graph. The floor is the time to read weights, keys and values once at
the bandwidth of a large copy (bytes read and written) that is measured in the same run.

Wrong results have no speed: logits are first compared with those of the same model in float64, or of the same program
run operator by operator.

Compiling takes minutes, so all systems compile at the same time in processes of their own, and are then measured in
turns. The figures of every stage are written as soon as they are there. A run that was cut off goes on at the next
stage if it is started again, on the same device and with the same code.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_systems import (
    Workload,
    checked,
    copying,
    deep,
    for_few_rows,
    hugging_face,
    llama,
    planned,
    qwen2,
    without_row_linear,
)
from benchmarks.harness import Row, Samples, arguments, device, publish, take_turns, versions
from benchmarks.workers import Build, Crew, Worker
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.layer_parallel import LayerParallel, Segment, Unit
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan

ROOT, ROOMS = Path(__file__).parent.parent, ("ir", "passes", "kernels", "runtime", "skipstone", "benchmarks")

Figures = Callable[[str, str, Mapping[str, Samples], Mapping[str, float]], Iterator[Row]]
"""Of one system: names of the part and of it, measurements by figure, and the bytes that each system reads at least."""


@dataclass(frozen=True)
class Part:
    """A comparison.

    Attributes:
        name: what its figures' names begin with.
        base: what everything is compared with, in every stage.
        stages: other systems, those that are wanted most first.
        figures: what is made of the measurements.
    """

    name: str
    base: dict[str, Build]
    stages: Sequence[dict[str, Build]]
    figures: Figures


def figures(prefix: str, name: str, samples: Mapping[str, Samples], sizes: Mapping[str, float]) -> Iterator[Row]:
    """The empty plan against the floor and transformers, and other plans against the empty one.

    Baselines are the floor, transformers or the empty plan, in milliseconds.
    """
    if name == "copy":
        return
    each, ours = samples[name], samples["ours"]
    yield Row(f"{prefix}_{name}_milliseconds", each.median * 1e3, None, None, each.count)
    if name.startswith("hf"):
        goal = 1.3 if (prefix, name) == ("0.5b_1_1k", "hf_compiled") else None
        yield Row(f"{prefix}_vs_{name}", each.median / ours.median, each.median * 1e3, goal, each.count)
    else:
        yield from against_floor(f"{prefix}_{name}", name, samples, sizes, 0.5 if prefix == "0.5b_1_1k" else None)
    if not name.startswith(("hf", "ours")):
        yield Row(f"{prefix}_{name}_gain", ours.median / each.median, ours.median * 1e3, None, each.count)
    read, prompts = samples.get("ours prefill"), samples.get(f"{name} prefill")
    if read is not None and prompts is not None and name != "ours":
        yield Row(
            f"{prefix}_prefill_vs_{name}", prompts.median / read.median, prompts.median * 1e3, None, prompts.count
        )


def deep_figures(prefix: str, name: str, samples: Mapping[str, Samples], sizes: Mapping[str, float]) -> Iterator[Row]:
    """A plan against the floor, and layers at the same time against the faster of those in sequence."""
    if name == "copy":
        return
    yield from against_floor(f"{prefix}_{name}", name, samples, sizes)
    if name in AT_ONCE:
        for mode in ("", " steps", " graph"):
            base, each = min(samples[other + mode].median for other in SEQUENTIAL), samples[name + mode]
            metric, goal = f"layers_at_once_{name}{mode.replace(' ', '_')}", 2.0 if name.startswith("24") else 1.3
            yield Row(metric, base / each.median, base * 1e3, goal, each.count)


def against_floor(
    metric: str, name: str, samples: Mapping[str, Samples], sizes: Mapping[str, float], goal: float | None = None
) -> Iterator[Row]:
    """Steps a second, and shares of the copy bandwidth; baselines are the floor in milliseconds."""
    floor = sizes[name] * samples["copy"].median
    each, steps, graph = (samples[f"{name}{kind}"] for kind in ("", " steps", " graph"))
    yield Row(f"{metric}_steps_per_second", 1 / each.median, None, None, each.count)
    yield Row(f"{metric}_of_copy_bandwidth", floor / each.median, floor * 1e3, goal, each.count)
    yield Row(f"{metric}_steps_of_copy_bandwidth", floor / steps.median, floor * 1e3, None, steps.count)
    yield Row(f"{metric}_graph_of_copy_bandwidth", floor / graph.median, floor * 1e3, None, graph.count)


WORKLOADS = {
    "0.5b_1_1k": Workload(qwen2, 1, 1024),
    "0.5b_1_32k": Workload(qwen2, 1, 32768),
    "1b_8_8k": Workload(llama, 8, 8192),
}

PLANS = {
    "int8_kv": Plan([QuantizeKV(k="int8", v="int8", granularity="token", condition=False)]),
    "skipped": Plan([SkipSublayers(layers=(4, 8, 12))]),
    "gates": Plan([SkipFFNAdaptive(threshold=1.0, cold_start=0, cold_end=0, warmup_tokens=0, max_share=1.0)]),
}
"""Keys and values in 8 bits, three layers left out, and gates at all FFNs, which next to never skip one."""

SEQUENTIAL = {"sequential": Plan([]), "sequential_fused": Plan([FuseParallel()])}

AT_ONCE: Mapping[str, tuple[range, Unit]] = {
    "24_1_layer": (range(4, 28), "layer"),
    "24_1_two_stage": (range(4, 28), "two_stage"),
    "12_1_layer": (range(10, 22), "layer"),
    "12_1_two_stage": (range(10, 22), "two_stage"),
}
"""Layers that run at the same time, in one iteration, fused: which, and in which unit."""

COPY: dict[str, Build] = {"copy": copying}
FIRST, EIGHT, DEEP = WORKLOADS["0.5b_1_1k"], Workload(qwen2, 8, 1024), Workload(deep, 1, 1024)


def _at_once(name: str) -> Build:
    layers, unit = AT_ONCE[name]
    segment = LayerParallel((Segment(layers.start, layers.stop, unit=unit),))
    return partial(planned, name, Plan([segment, FuseParallel()]), DEEP)


def _decoding(prefix: str, *plans: str) -> Part:
    """The empty plan, transformers, and other plans."""
    workload = WORKLOADS[prefix]
    # Another copy of the model in float64 is for the smallest workload.
    ours = partial(checked, "ours", workload) if prefix == "0.5b_1_1k" else partial(
        planned, "ours", Plan([]), workload, reads_prompts=True
    )  # fmt: skip
    theirs: dict[str, Build] = {name: partial(hugging_face, name, workload) for name in ("hf_compiled", "hf_eager")}
    others = {name: partial(planned, name, PLANS[name], workload) for name in plans}
    return Part(prefix, COPY | {"ours": ours}, (theirs | others,), figures)


_OURS = COPY | {"ours": partial(planned, "ours", Plan([]), FIRST)}

# What Inductor tunes by measuring gets ready by itself.
PARTS = {
    "0.5b_1_1k": _decoding("0.5b_1_1k", "int8_kv", "skipped", "gates"),
    "0.5b_1_32k": _decoding("0.5b_1_32k", "int8_kv"),
    "1b_8_8k": _decoding("1b_8_8k", "int8_kv"),
    "deep": Part(
        "deep",
        COPY | {name: partial(planned, name, plan, DEEP) for name, plan in SEQUENTIAL.items()},
        tuple({name: _at_once(name) for name in AT_ONCE if name.startswith(layers)} for layers in ("24", "12")),
        deep_figures,
    ),
    "kernels": Part(
        "kernels",
        _OURS,
        ({"without_row_linear": partial(without_row_linear, "without_row_linear", FIRST)},),
        figures,
    ),
    "kernels_8": Part(
        "kernels_8",
        COPY | {"ours": partial(planned, "ours", Plan([]), EIGHT)},
        ({"row_linear": partial(for_few_rows, "row_linear", EIGHT)},),
        figures,
    ),
    "tuned": Part(
        "tuned", _OURS, ({"hf_compiled_tuned": partial(hugging_face, "hf_compiled_tuned", FIRST)},), figures
    ),
}  # fmt: skip


def measure(
    part: Part, number: int, ready: Callable[[dict[str, Build]], dict[str, Worker]], rounds: int
) -> Iterator[Row]:
    """The figures of a stage: of the base too in the first one.

    Args:
        number: of the stage.
        ready: see `benchmarks.workers.Crew.ready`.
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
            for fact in found[name].facts:
                yield replace(fact, metric=f"{part.name}_{fact.metric}")
            yield from part.figures(part.name, name, samples, sizes)


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
    parser.add_argument("--rows", nargs="+", choices=PARTS, default=[*WORKLOADS], help="which to measure")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu measures decoding on a CUDA device, and torch finds none here.", file=sys.stderr)
        raise SystemExit(2)
    rounds = 3 if chosen.quick else 9
    progress = Progress(chosen.json, rounds)
    stages = [(name, number) for name in chosen.rows for number in range(len(PARTS[name].stages))]
    left = [(name, number) for name, number in stages if f"{name} {number + 1}" not in progress.stages]
    with ExitStack() as stack:
        crews = {name: stack.enter_context(Crew()) for name in dict.fromkeys(name for name, _ in left)}
        for name, number in left:
            crews[name].begin(PARTS[name].base | PARTS[name].stages[number])
        for name, number in left:
            progress.add(f"{name} {number + 1}", measure(PARTS[name], number, crews[name].ready, rounds))
            publish("gpu", progress.rows(), chosen.json)
    progress.finish()


if __name__ == "__main__":
    main()
