"""Decoding at the end of 8192 tokens of context, end to end: quantized caches, one in float32, and transformers' own.

The model has the shape of a 110-million-parameter Llama (the input embedding not counted) with 12 query heads over 4
heads of keys; batch 1. Its weights are random: good for seconds and bytes, not for quality. Our executables read the
prompt themselves. transformers' caches take the keys and values of the float32 one, through their own `update`. All
then go on greedily, in turns. Second part of `benchmarks.kv_speed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, QuantizedCache

from benchmarks.harness import Row, Samples, Turn, take_turns, timed
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.plan import Plan
from skipstone.report import HuggingFaceSteps
from skipstone.runtime.cache import KVCache

CONTEXT, ROOM, CALIBRATION = 8192, 512, 512  # tokens
THREADS = (1, 2)
QUICK_THREADS = (2,)
PLANS = {"fp32": Plan([]), "int8": Plan([QuantizeKV()]), "int4": Plan([QuantizeKV(k="int4", v="int4")])}
FULL = "hf_dynamic_cache"
THEIRS: dict[str, Callable[[Any], Any]] = {
    FULL: lambda config: DynamicCache(config=config),
    "hf_quantized_cache": lambda config: QuantizedCache("quanto", config),  # 4 bits, groups of 64
    "hf_quantized_cache_fp8": lambda config: QuantizedCache("fp8", config),
}
ROUNDING, QUANTIZATION = 1e-4, 0.5
"""Largest distance of logits from those in float32, relative to their norm: beyond, it is another computation."""


@dataclass
class Decoding:
    """A system in the middle of a sequence.

    Attributes:
        steps: what decodes, by the number of threads that it runs with.
        cache: what all of `steps` go on with.
        cache_bytes: what keys and values of `CONTEXT` tokens take in it.
        token: the next one, [1, 1].
    """

    steps: Mapping[int, Any]
    cache: Any
    cache_bytes: float
    token: Tensor

    @torch.no_grad()
    def step(self, threads: int) -> Tensor:
        """Logits [V] after one token more."""
        logits: Tensor = self.steps[threads].decode(self.token, self.cache).flatten()
        self.token = logits.argmax().reshape(1, 1)
        return logits


def end_to_end(quick: bool) -> list[Row]:
    """Measure. What needs a package that is missing is left out, and said to be."""
    model = make_model()
    counts = QUICK_THREADS if quick else THREADS
    ids = torch.randint(0, model.config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    executables = {name: ours(model, plan, ids[:, :CALIBRATION], counts) for name, plan in PLANS.items()}
    prefill, systems = read(executables, ids, rounds=1 if quick else 3)
    systems |= theirs(model, systems["fp32"], counts)
    check_equal(systems, counts[-1])
    turns = {
        (name, threads): turn(name, system, threads, tokens=4 if quick else 8)
        for name, system in systems.items()
        for threads in counts
    }
    decode = take_turns(turns, rounds=3 if quick else 9)
    report(decode, prefill, systems)
    return ratios(decode, prefill) + sizes(systems)


def make_model() -> LlamaForCausalLM:
    """The model under test."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT + ROOM,
    )
    return LlamaForCausalLM(config).eval()


def ours(model: LlamaForCausalLM, plan: Plan, calibration: Tensor, counts: Sequence[int]) -> dict[int, Any]:
    """An executable for each number of threads."""
    from skipstone.optimize import optimize

    options: dict[str, Any] = {"max_length": CONTEXT + ROOM, "target": "onnxruntime", "progress": False}
    data = [calibration] if len(plan) else None
    return {threads: optimize(model, plan, calibration=data, threads=threads, **options) for threads in counts}


def read(
    executables: Mapping[str, Mapping[int, Any]], ids: Tensor, rounds: int
) -> tuple[dict[str, Samples], dict[str, Decoding]]:
    """Read the prompt with each system in every round, with the most threads.

    Returns:
        the seconds, and where the systems are after the last round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in executables}
    systems: dict[str, Decoding] = {}
    for _ in range(rounds):
        for name, by_threads in executables.items():
            taken, (logits, cache) = timed(partial(by_threads[max(by_threads)].prefill, ids))
            seconds[name].append(taken)
            systems[name] = Decoding(
                by_threads, cache, cache.nbytes * CONTEXT / cache.capacity, logits.argmax().reshape(1, 1)
            )
    return {name: Samples({max(executables[name]): each}) for name, each in seconds.items()}, systems


@torch.no_grad()
def theirs(model: LlamaForCausalLM, ours: Decoding, counts: Sequence[int]) -> dict[str, Decoding]:
    """The model in transformers with each of its caches, where our float32 executable is."""
    systems = {}
    for name, make in THEIRS.items():
        try:
            cache = make(model.config)
            fill(cache, ours.cache, model.config.num_hidden_layers)
        except (ImportError, ValueError) as error:
            print(f"{name} not measured: {error}")
            continue
        size = sum(stored_bytes(each) for layer in cache.layers for each in vars(layer).values())
        systems[name] = Decoding(dict.fromkeys(counts, HuggingFaceSteps(model)), cache, size, ours.token)
    return systems


def fill(cache: Any, ours: KVCache, layers: int) -> None:
    """Let a cache of transformers take the keys and values of `CONTEXT` tokens."""
    for layer in range(layers):
        keys, values = (ours.buffers[f"{which}_{layer}"][:, :, :CONTEXT].clone() for which in ("key", "value"))
        cache.update(keys, values, layer)


def stored_bytes(value: Any) -> float:
    """Bytes of a tensor with all that it is made of, or of a tuple of tensors; 0 for anything else."""
    if isinstance(value, tuple):
        return sum(stored_bytes(each) for each in value)
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes


def check_equal(systems: Mapping[str, Decoding], threads: int) -> None:
    """Refuse to time systems that compute something else. This first step is also where quanto compiles its kernels."""
    logits = {name: system.step(threads) for name, system in systems.items()}
    for name, each in logits.items():
        error = float((each - logits[FULL]).norm() / logits[FULL].norm())
        if not error <= (ROUNDING if name == "fp32" else QUANTIZATION):
            raise SystemExit(f"{name} differs from transformers by {error:.1e} of the logits")


def turn(name: str, system: Decoding, threads: int, tokens: int) -> Turn:
    """A turn that decodes some tokens: seconds of one."""

    def run() -> dict[str, float]:
        seconds, _ = timed(lambda: [system.step(threads) for _ in range(tokens)])
        return {name: seconds / tokens}

    return run


def report(decode: Mapping[str, Samples], prefill: Mapping[str, Samples], systems: Mapping[str, Decoding]) -> None:
    """Print every figure."""
    for name, each in decode.items():
        figures = f"{each.median * 1e3:8.2f} ms a token with {each.best_threads} threads, median of {each.count}"
        size = f"cache of {systems[name].cache_bytes / 2**20:.0f} MiB"
        reading = f", prompt read in {prefill[name].median:.1f} s" if name in prefill else ""
        print(f"end to end, 8k {name:24} {figures}; {size}{reading}")


def ratios(decode: Mapping[str, Samples], prefill: Mapping[str, Samples]) -> list[Row]:
    """The figures that compare times; baselines in milliseconds."""
    rows = []
    for name, prefix in (("int8", "end_to_end_8k"), ("int4", "end_to_end_8k_int4")):
        for other in ("fp32", *THEIRS):
            if other in decode:
                goal = 3.0 if (name, other) == ("int8", "hf_quantized_cache") else None
                rows.append(_ratio(f"{prefix}_vs_{other}", decode[other], decode[name], goal))
        rows.append(_ratio(f"prefill_8k_{name}_vs_fp32", prefill["fp32"], prefill[name], None))
    return rows


def _ratio(metric: str, baseline: Samples, ours: Samples, goal: float | None) -> Row:
    return Row(metric, baseline.median / ours.median, baseline.median * 1e3, goal, ours.count)


def sizes(systems: Mapping[str, Decoding]) -> list[Row]:
    """What keys and values of the whole context take; baselines in bytes."""
    full = systems["fp32"].cache_bytes
    quantized = {name: each for name, each in systems.items() if name not in ("fp32", FULL)}
    return [
        Row(f"cache_bytes_{name}_over_fp32", each.cache_bytes / full, full, None, 1) for name, each in quantized.items()
    ]
