"""Keeping a window of keys and values: what it costs in quality, and what it saves in time and memory.

Quality: the reference model of 16 layers with 2 heads of keys each, on held-out text of the length that it was trained
with (256 bytes). As many heads as a share says see the newest W tokens and the first 4: those that change their
attention's output least on other text (`skipstone.streaming.head_errors`), the same number of random ones (the median
of 3 draws), or, for as many bytes in the cache behind the last token, all heads with a wider window. `dnll` is relative
to the model's own loss. Rows of a step that a cache has room for do not count as bytes here: they are the same
whatever the length.

Time and memory: the model of `benchmarks.kv_end_to_end` behind 8192 tokens (110 million parameters, random weights,
batch 1), with all heads or half of them seeing 256 tokens, against our own executable without a plan, int8, and
transformers. The same shape with a window of its own in every layer (a Mistral, 1024 tokens), against our executable
that keeps all rows, and transformers' sliding cache. All in turns; prompts are read by our executables alone.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from benchmarks.harness import Row, arguments, publish
from benchmarks.kv_end_to_end import CONTEXT, make_model, read
from benchmarks.long_context import cache_ratio, decode_times, executables_of, ratio, theirs
from benchmarks.reference.evaluate import CHECKPOINT, windows
from skipstone.budget import METRICS
from skipstone.calibrate import Batch, joined, token_batches
from skipstone.ir.program import Program
from skipstone.ir.stream import note_layers
from skipstone.optimize import capture
from skipstone.passes.compress_kv import CompressKV, StreamingHeads
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.plan import Plan
from skipstone.streaming import Head, compare_streaming, head_errors

DEEP = CHECKPOINT.parent / "stdlib-llama-16"
LENGTH, SINKS = 256, 4  # of text
KEPT, SHARES = (16, 64), (0.5, 0.75, 1.0)
DRAWS = 3
CHOSEN_ON, PROVED_ON = 32, 64  # windows of text
WINDOW, OWN_WINDOW, SHORT = 256, 1024, 512  # tokens of contexts


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("kv_window", __doc__ or "").parse_args()
    rows = quality(options.quick) + streaming(options.quick) + own_windows(options.quick)
    publish("kv_window", rows, options.json)


# Quality


def quality(quick: bool) -> list[Row]:
    """What seeing a window costs, by window and by share of the heads."""
    model = AutoModelForCausalLM.from_pretrained(DEEP, dtype=torch.float32).eval()
    program = capture(model)
    note_layers(program)
    count = 8 if quick else PROVED_ON
    text = _batches(program, "test", count, LENGTH)
    rows = []
    for window in KEPT[:1] if quick else KEPT:
        chosen_on = _batches(program, "train", CHOSEN_ON // (4 if quick else 1), LENGTH)
        errors = head_errors(program, chosen_on, window, SINKS)
        order = sorted(errors, key=lambda head: (errors[head], head))
        for share in SHARES:
            chosen = round(share * len(order))
            name = f"{window}_{share:.0%}".replace("%", "")
            rows.append(Row(f"dnll_{name}", _dnll(program, text, order[:chosen], window), None, None, count))
            if chosen == len(order):
                continue
            drawn = [random.Random(seed).sample(order, chosen) for seed in range(DRAWS)]
            costs = [_dnll(program, text, each, window) for each in drawn]
            rows.append(Row(f"dnll_{name}_random", statistics.median(costs), None, None, count))
            kept = (chosen * (window + SINKS) + (len(order) - chosen) * LENGTH) // len(order)
            rows.append(Row(f"dnll_{name}_uniform", _dnll(program, text, order, kept - SINKS), None, None, count))
    if not quick:  # with the heads of the last window
        beyond = _batches(program, "test", count, 2 * LENGTH)
        costs = {share: _dnll(program, beyond, order[: round(share * len(order))], window) for share in SHARES}
        rows += [Row(f"dnll_512_{window}_{100 * share:.0f}", cost, None, None, count) for share, cost in costs.items()]
    return rows


def _batches(program: Program, split: Any, count: int, length: int) -> list[Batch]:
    return joined(token_batches(list(windows(split, count, length)[:, :length].split(8)), program.source))


def _dnll(program: Program, text: Sequence[Batch], heads: Sequence[Head], window: int) -> float:
    return METRICS["nll"](compare_streaming(program, text, heads, window, SINKS)).value


# Time and memory


def streaming(quick: bool) -> list[Row]:
    """Streaming heads at the end of a long context, and of a short one."""
    model = make_model()
    heads = tuple(range(model.config.num_key_value_heads // 2))
    half = tuple(StreamingHeads(layer, heads) for layer in range(model.config.num_hidden_layers))
    plans = {
        "full": Plan([]),
        "int8": Plan([QuantizeKV()]),
        "half": Plan([CompressKV(WINDOW, SINKS, half)]),
        "all": Plan([CompressKV(WINDOW, SINKS)]),
    }
    rows = []
    executables, ids = executables_of(model, plans, quick)
    for length, suffix in ((CONTEXT, "8k"), (SHORT, "512")):
        prefill, systems = read(executables, ids[:, :length], rounds=1 if quick else 3)
        if length == CONTEXT:
            systems["hf"] = theirs(model, systems["full"])
        decode = decode_times(systems, quick)
        others = ("full", "int8", *(["hf"] if length == CONTEXT else []))
        rows += [ratio(f"decode_{suffix}_{name}_vs_{other}", decode[other], decode[name])
                 for name in ("half", "all") for other in others]  # fmt: skip
        rows += [ratio(f"prefill_{suffix}_{name}_vs_full", prefill["full"], prefill[name]) for name in ("half", "all")]
        if length == CONTEXT:
            rows += [cache_ratio(f"cache_bytes_8k_{name}_over_full", systems, name) for name in ("int8", "half", "all")]
    return rows


def own_windows(quick: bool) -> list[Row]:
    """A model whose every layer sees a window, with a cache for all tokens and one for those that are seen again."""
    config = make_model().config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings")  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(**{name: config[name] for name in names}, sliding_window=OWN_WINDOW)
    ).eval()
    executables, ids = executables_of(model, {"full": Plan([]), "window": Plan([CompressKV()])}, quick)
    prefill, systems = read(executables, ids, rounds=1 if quick else 3)
    systems["hf"] = theirs(model, systems["full"])
    decode = decode_times(systems, quick)
    rows = [ratio(f"own_window_decode_8k_vs_{other}", decode[other], decode["window"]) for other in ("full", "hf")]
    rows.append(ratio("own_window_prefill_8k_vs_full", prefill["full"], prefill["window"]))
    return [*rows, cache_ratio("own_window_cache_bytes_8k_over_full", systems, "window")]


if __name__ == "__main__":
    main()
