"""Systems behind a long context that decode in turns: what benchmarks of compressed caches have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from benchmarks import kv_end_to_end as end_to_end
from benchmarks.harness import Row, Samples, take_turns
from benchmarks.kv_end_to_end import CONTEXT, Decoding, fill, ours, turn
from skipstone.plan import Plan
from skipstone.report import HuggingFaceSteps

ROUNDING = 1e-4
"""Largest distance of our logits from those of transformers, relative to their norm."""


def executables_of(model: Any, plans: Mapping[str, Plan], quick: bool) -> tuple[dict[str, dict[int, Any]], Tensor]:
    """By name and number of threads, what each plan gives; and the context, int64 [1, CONTEXT]."""
    counts = end_to_end.QUICK_THREADS if quick else end_to_end.THREADS
    ids = torch.randint(0, model.config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    calibration = ids[:, : end_to_end.CALIBRATION]
    return {name: ours(model, plan, calibration, counts) for name, plan in plans.items()}, ids


@torch.no_grad()
def theirs(model: Any, full: Decoding) -> Decoding:
    """The model in transformers, where our executable without a plan is; it must go on as that does."""
    cache = DynamicCache(config=model.config)
    fill(cache, full.cache, model.config.num_hidden_layers)
    return Decoding(dict.fromkeys(full.steps, HuggingFaceSteps(model)), cache, 0.0, full.token)


def decode_times(systems: Mapping[str, Decoding], quick: bool) -> dict[str, Samples]:
    """The seconds of a token of each system, in turns, once it goes on as transformers does where that is there."""
    threads = max(systems["full"].steps)
    logits = {name: system.step(threads) for name, system in systems.items()}
    if "hf" in logits and not float((logits["hf"] - logits["full"]).norm() / logits["hf"].norm()) <= ROUNDING:
        raise SystemExit("the executable differs from transformers")
    turns = {
        (name, count): turn(name, system, count, tokens=4 if quick else 8)
        for name, system in systems.items()
        for count in systems["full"].steps
    }
    found = take_turns(turns, rounds=3 if quick else 9)
    for name, each in found.items():
        print(f"{name:8} {each.median * 1e3:8.2f} ms a token with {each.best_threads} threads, median of {each.count}")
    return found


def ratio(metric: str, baseline: Samples, own: Samples) -> Row:
    """How many times as fast as the baseline, whose milliseconds stand beside it."""
    return Row(metric, baseline.median / own.median, baseline.median * 1e3, None, own.count)


def cache_ratio(metric: str, systems: Mapping[str, Decoding], name: str) -> Row:
    """Bytes of a whole cache over those of one that keeps all rows, both with room for the same tokens."""
    own, full = (systems[each].cache.nbytes for each in (name, "full"))
    return Row(metric, own / full, float(full), None, 1)
