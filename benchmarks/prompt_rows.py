"""Keeping some tokens of each prompt: what it costs in quality, and what it saves in time and memory.

Quality: the reference model of 16 layers, on held-out text of the length that it was trained with (256 bytes), whose
first half is the prompt. Of its 128 tokens, R are kept: those that the last 16 look at most (`CompressPrompt`), as many
by the score of FlowCache, the newest ones and the first 4, or random ones beside those that are always kept (the median
of 3 draws). `dnll` is the loss behind the prompts, relative to the model's own there.

Time and memory: the model of `benchmarks.kv_end_to_end` behind a prompt of 8192 tokens (110 million parameters, random
weights, batch 1), of which 512 or 2048 are kept, against our own executable without a plan, int8, and transformers. All
in turns; prompts are read by our executables alone, which includes the choice of what is kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.harness import Row, arguments, publish
from benchmarks.kv_end_to_end import make_model, read
from benchmarks.long_context import cache_ratio, decode_times, executables_of, ratio, theirs
from benchmarks.reference.evaluate import CHECKPOINT, windows
from skipstone.budget import METRICS
from skipstone.calibrate import Batch, joined, token_batches
from skipstone.optimize import capture
from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.plan import Plan
from skipstone.prompt_rows import compare_behind_prompts, executable_of
from skipstone.runtime.cache import KVCache
from skipstone.runtime.executable import Executable

DEEP = CHECKPOINT.parent / "stdlib-llama-16"
LENGTH, PROVED_ON = 256, 64  # bytes of each text, and how many texts
KEPT, OBSERVED, SINKS = (32, 48, 64, 96), 16, 4  # tokens
REDUNDANCY = 0.93
DRAWS = 3
ROWS = (512, 2048)  # of the long context


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("prompt_rows", __doc__ or "").parse_args()
    publish("prompt_rows", quality(options.quick) + speed(options.quick), options.json)


def quality(quick: bool) -> list[Row]:
    """What keeping so many tokens costs, by what they are chosen by."""
    program = capture(AutoModelForCausalLM.from_pretrained(DEEP, dtype=torch.float32).eval())
    count = 8 if quick else PROVED_ON
    text = windows("test", count, LENGTH)[:, :LENGTH]
    batches = joined(token_batches(list(text.split(8)), program.source))
    full = executable_of(program, Plan([]))
    rows = []
    for kept in KEPT[:1] if quick else KEPT:
        entries = {
            "": CompressPrompt(kept, OBSERVED, SINKS),
            "_redundancy": CompressPrompt(kept, OBSERVED, SINKS, redundancy=REDUNDANCY),
            "_newest": CompressPrompt(kept, kept - SINKS - 1, SINKS),
        }
        executables = {name: executable_of(program, Plan([entry])) for name, entry in entries.items()}
        costs = {name: _dnll(full, each, batches) for name, each in executables.items()}
        drawn = []
        for seed in range(DRAWS):
            with _random_scores(seed):
                drawn.append(_dnll(full, executables[""], batches))
        costs["_random"] = statistics.median(drawn)
        rows += [Row(f"dnll_{kept}{name}", cost, None, None, count) for name, cost in costs.items()]
    return rows


def _dnll(full: Executable, changed: Executable, batches: list[Batch]) -> float:
    return METRICS["nll"](compare_behind_prompts(full, changed, batches)).value


@contextmanager
def _random_scores(seed: int) -> Iterator[None]:
    """Choose at random among the tokens that are not always kept."""
    generator, compress = torch.Generator().manual_seed(seed), KVCache.compress_prompts

    def drawn(cache: KVCache, scores: Mapping[str, Tensor]) -> None:
        own: dict[int, Tensor] = {}  # keys and values have the same scores
        for each in scores.values():
            if id(each) not in own:
                noise = torch.rand(each.shape, generator=generator)
                own[id(each)] = torch.where(each.isfinite(), noise, each)
        compress(cache, {name: own[id(each)] for name, each in scores.items()})

    with patch.object(KVCache, "compress_prompts", drawn):
        yield


def speed(quick: bool) -> list[Row]:
    """Decoding behind a long prompt of which some is kept, and reading it."""
    plans = {"full": Plan([]), "int8": Plan([QuantizeKV()])}
    plans |= {str(rows): Plan([CompressPrompt(rows)]) for rows in ROWS}
    plans["512_int8"] = Plan([QuantizeKV(), CompressPrompt(ROWS[0])])
    model = make_model()
    executables, ids = executables_of(model, plans, quick)
    prefill, systems = read(executables, ids, rounds=1 if quick else 3)
    systems["hf"] = theirs(model, systems["full"])
    decode = decode_times(systems, quick)
    names = [name for name in plans if name not in ("full", "int8")]
    rows = [
        ratio(f"decode_8k_{name}_vs_{other}", decode[other], decode[name])
        for name in names
        for other in ("full", "int8", "hf")
    ]
    rows += [ratio(f"prefill_8k_{name}_vs_full", prefill["full"], prefill[name]) for name in names]
    return rows + [cache_ratio(f"cache_bytes_8k_{name}_over_full", systems, name) for name in ("int8", *names)]


if __name__ == "__main__":
    main()
