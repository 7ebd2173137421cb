"""Decode attention over a long key/value cache on a CPU: forms of it in ONNX Runtime against each other and the memory.

One step at the end of a context of 8192 or 32768 tokens, batch 1, 32 query heads over 8 heads of keys, 128 channels,
with the cache in float32, int8 or int4 and written in place. Every form runs with one and with two threads, from
caches that no turn before has left in the processor, and counts with the better of the two. The floor of a form is the
time to read its keys and values once, at the bandwidth measured in the same run.

The second part, `benchmarks.kv_end_to_end`, decodes with a whole model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks import kv_forms
from benchmarks.harness import Row, Samples, Turn, arguments, publish, read_floor, take_turns, timed
from benchmarks.kv_end_to_end import end_to_end

CONTEXTS = {"8k": 8192, "32k": 32768}
THREADS = (1, 2)
FLOOR_BUFFER = 512 * 2**20
EVICTION_BUFFER = 128 * 2**20
PLAIN = "GroupQueryAttention"
NEUTRAL = "GroupQueryAttention, neutral sinks"
FORMS: dict[int, dict[str, str]] = {
    32: {
        PLAIN: kv_forms.group_query_attention(32),
        NEUTRAL: kv_forms.group_query_attention(32, neutral_sinks=True),
        "GroupQueryAttention, packed": kv_forms.packed_group_query_attention(32),
        "Attention, packed": kv_forms.packed_attention(),
        "MatMul, packed": kv_forms.packed_matmul(32),
    },
    8: {
        PLAIN: kv_forms.group_query_attention(8),
        NEUTRAL: kv_forms.group_query_attention(8, neutral_sinks=True),
        "GroupQueryAttention, packed": kv_forms.packed_group_query_attention(8),
        "MatMul, packed": kv_forms.packed_matmul(8),
    },
    4: {
        PLAIN: kv_forms.group_query_attention(4),
        NEUTRAL: kv_forms.group_query_attention(4, neutral_sinks=True),
    },
}
CHOSEN = {8: NEUTRAL, 4: NEUTRAL}  # what a cache of so many bits is lowered to
IN_TORCH = "torch, packed"  # no form to lower to: what the same machine does elsewhere


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("kv_speed", __doc__ or "").parse_args()
    rows = kernels(rounds=9 if options.quick else 41) + end_to_end(options.quick)
    publish("kv_speed", rows, options.json)


def kernels(rounds: int) -> list[Row]:
    """Decode attention alone."""
    rows: list[Row] = []
    for label, context in CONTEXTS.items():
        samples = take_turns(systems(context), rounds)
        report(label, samples)
        rows += ratios(label, samples)
    return rows


def systems(context: int) -> dict[tuple[str, int], Turn]:
    """All forms at one length of context, and the floors."""
    eviction = torch.ones(EVICTION_BUFFER // 4)
    floor = torch.ones(FLOOR_BUFFER // 4)
    turns: dict[tuple[str, int], Turn] = {}
    sizes = {}
    for bits, forms in FORMS.items():
        for name, body in forms.items():
            step = kv_forms.Step(bits, context)
            sizes[bits] = step.bytes
            for threads in THREADS:
                turns[title(bits, name), threads] = turn(
                    title(bits, name), step, kv_forms.onnx_form(step, body, threads), eviction
                )
    step = kv_forms.Step(32, context)
    for threads in THREADS:
        turns[title(32, IN_TORCH), threads] = turn(title(32, IN_TORCH), step, kv_forms.torch_form(step), eviction)
        turns["floors", threads] = floors(floor, sizes)
    return turns


def title(bits: int, name: str) -> str:
    """What a form is called among the figures."""
    return f"{bits} bits: {name}"


def turn(name: str, step: kv_forms.Step, form: Callable[[], Tensor], eviction: Tensor) -> Turn:
    """A turn of one form, which must compute what the step says."""
    error = float((form() - step.expected).abs().max())
    if not error <= 1e-5:
        raise SystemExit(f"{name} differs by {error:.1e}")

    def run() -> Mapping[str, float]:
        eviction.sum()
        return {name: timed(form)[0]}

    return run


def floors(buffer: Tensor, sizes: Mapping[int, int]) -> Turn:
    """A turn that measures the bandwidth: seconds to read the bytes of a cache of each number of bits."""

    def run() -> Mapping[str, float]:
        seconds = min(read_floor(buffer, 1) for _ in range(3))
        return {title(bits, "floor"): seconds * size for bits, size in sizes.items()}

    return run


def report(label: str, samples: Mapping[str, Samples]) -> None:
    """Print every figure: the median and the minimum with each number of threads."""
    for name in sorted(samples):
        each = samples[name]
        figures = "; ".join(
            f"{threads} threads {statistics.median(seconds) * 1e3:6.2f} (at least {min(seconds) * 1e3:6.2f})"
            for threads, seconds in each.by_threads.items()
        )
        print(f"{label} {name:44} ms with {figures}, of {each.count}")


def ratios(label: str, samples: Mapping[str, Samples]) -> list[Row]:
    """The figures at one length of context; baselines in milliseconds."""
    best = min((samples[title(32, name)] for name in FORMS[32]), key=lambda each: each.median)
    goals = {"int8_vs_fp32_8k": 1.2, "int8_vs_fp32_32k": 1.6, "int4_vs_fp32_8k": 0.9}
    rows = []
    for bits in (8, 4):
        ours = samples[title(bits, CHOSEN[bits])]
        for against, baseline in (("fp32", samples[title(32, PLAIN)]), ("best_fp32", best)):
            metric = f"int{bits}_vs_{against}_{label}"
            rows.append(
                Row(metric, baseline.median / ours.median, baseline.median * 1e3, goals.get(metric), ours.count)
            )
        rows.append(_over_floor(f"int{bits}_over_floor_{label}", ours, samples[title(bits, "floor")], None))
    goal = 4.0 if label == "8k" else None
    rows.append(_over_floor(f"fp32_best_over_floor_{label}", best, samples[title(32, "floor")], goal))
    return rows


def _over_floor(metric: str, ours: Samples, floor: Samples, goal: float | None) -> Row:
    return Row(metric, ours.median / floor.median, floor.median * 1e3, goal, ours.count, at_most=True)


if __name__ == "__main__":
    main()
