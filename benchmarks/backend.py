"""What plans save through `torch.compile(model, backend="skipstone")` on a CPU, against `torch.compile` itself.

The model is that of `benchmarks.decode`, with random weights in float32, and a static cache of Hugging Face; batch 1, a
prompt of 128 tokens, 64 new ones. Plans leave three layers out, or put gates behind FFNs that never fire or let every
token skip half of them. Every system counts with the better of one and two threads.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.decode import NEW_TOKENS, PROMPT, SKIPPED, THREADS, CompiledSteps, make_model, steps
from benchmarks.harness import Row, arguments, publish, take_turns
from benchmarks.skipping_speed import PLANS
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan

SYSTEMS: dict[str, Plan] = {
    "empty": Plan([]),
    "three layers left out": Plan([SkipSublayers(layers=SKIPPED)]),
    "gates that never fire": PLANS["never"],
    "half of the FFNs skipped": PLANS["half"],
}


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("backend", __doc__ or "").parse_args()
    torch._dynamo.config.recompile_limit = 64  # Dynamo counts all systems at all thread counts as one function
    model = make_model()
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    length = PROMPT + NEW_TOKENS
    systems = {"torch.compile": CompiledSteps(model, length)}
    for name, plan in SYSTEMS.items():
        settings: dict[str, Any] = {"plan": plan}
        if plan in (PLANS["never"], PLANS["half"]):
            settings["decode_start"] = torch.tensor([PROMPT])
        systems[name] = CompiledSteps(model, length, backend="skipstone", options=settings)
    turns = {(name, count): steps(name, system, ids) for name, system in systems.items() for count in THREADS}
    samples = take_turns(turns, rounds=3 if options.quick else 9)
    for name in systems:
        each = samples[name]
        print(f"{name:>24}: {each.median * 1e3:8.2f} ms with {each.best_threads} threads, median of {each.count}")

    def gain(metric: str, name: str, goal: float | None) -> Row:
        theirs, ours = samples["torch.compile"].median, samples[name]
        return Row(metric, theirs / ours.median, theirs * 1e3, goal, ours.count)

    gated, empty = samples["gates that never fire"], samples["empty"].median
    publish(
        "backend",
        [
            gain("empty_plan_vs_torch_compile", "empty", None),
            gain("three_layers_skipped_gain", "three layers left out", 1.15),
            gain("half_ffn_skipped_gain", "half of the FFNs skipped", 1.2),
            Row("gate_overhead", gated.median / empty, empty * 1e3, 1.05, gated.count, at_most=True),
        ],
        options.json,
    )


if __name__ == "__main__":
    main()
