"""All four rewrites, each alone and all in one plan: quality, time, and bytes of the KV cache.

Quality, on the reference model: ``{plan}_dnll`` is the relative rise of the negative log-likelihood of the second half
of each window of held-out text, decoded behind the first half; ``{plan}_dnll_bound`` is its one-sided bound at 95%.
Scales of the cache are calibrated on the training split; what is skipped and which layers run at the same time is given
here, not chosen.

Time, ``{plan}_gain``: a decode step of the model without a plan over one with it, on ONNX Runtime, batch 1, behind 128
tokens; with one thread on the reference model, whose steps are short, and as ``{plan}_gain_110m`` with two threads on
the model of `benchmarks.decode` (not with --quick), whose weights are random: there, gates let every token skip three
FFNs.

``{plan}_kv_bytes_over_full`` is what the cache takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.by_prompt import PROMPT, decoding
from benchmarks.decode import make_model
from benchmarks.harness import Row, arguments, publish, take_turns
from benchmarks.reference.evaluate import CHECKPOINT
from benchmarks.skipping import batches, bound
from skipstone.budget import compare
from skipstone.calibrate import Batch
from skipstone.certify import behind_prompts, logits
from skipstone.ir.program import Program
from skipstone.optimize import capture, lower
from skipstone.passes.base import Pass
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.layer_parallel import LayerParallel, Segment
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.executable import TokenModel

ALONE = "skipped", "parallel", "adaptive", "int8_kv"
CALIBRATION_WINDOWS, TEST_WINDOWS, QUICK_TEST_WINDOWS = 32, 128, 32


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("compose", __doc__ or "").parse_args()
    rounds = 3 if options.quick else 9
    program = capture(LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval())
    calibration = batches("train", CALIBRATION_WINDOWS)
    text = [behind_prompts(each) for each in batches("test", QUICK_TEST_WINDOWS if options.quick else TEST_WINDOWS)]
    plans = entries(threshold=0.98)
    rows = [*quality(program, plans, calibration, text)]
    rows += times(program, plans, calibration, text[0].tokens[:1, :PROMPT], threads=1, rounds=rounds)
    if not options.quick:
        large = make_model()
        ids = torch.randint(0, large.config.vocab_size, (8, PROMPT), generator=torch.Generator().manual_seed(1))
        random = [Batch(ids, torch.ones_like(ids, dtype=torch.bool))]
        plans = entries(threshold=-1.0)
        rows += times(capture(large), plans, random, ids[:1], threads=2, rounds=rounds, suffix="_110m")
    publish("compose", rows, options.json)


def entries(threshold: float) -> dict[str, list[Pass]]:
    """Each rewrite of a model of 12 layers, and all of them; gates compare with the threshold."""
    alone: dict[str, list[Pass]] = {
        "skipped": [SkipSublayers(ffn=(1, 2))],
        "parallel": [LayerParallel((Segment(6, 8),)), FuseParallel()],
        "adaptive": [SkipFFNAdaptive(threshold=threshold, cold_start=3, cold_end=6, warmup_tokens=0)],
        "int8_kv": [QuantizeKV(k="int8", v="int8")],
    }
    return {"full": []} | alone | {"all": [entry for name in ALONE for entry in alone[name]]}


def quality(
    program: Program, plans: Mapping[str, Sequence[Pass]], calibration: Sequence[Batch], text: Sequence[Batch]
) -> Iterator[Row]:
    """What each plan costs, on the eager target."""
    built = {name: build(program, plan, calibration, "eager") for name, plan in plans.items()}
    for name in [*ALONE, "all"]:
        seen = compare(partial(logits, built["full"]), partial(logits, built[name]), text, progress=True)
        count = len(seen.tokens)
        yield Row(f"{name}_dnll", float(seen.increase.sum() / seen.nll.sum()), None, None, count, at_most=True)
        yield Row(f"{name}_dnll_bound", bound(seen), None, None, count, at_most=True)


def times(
    program: Program,
    plans: Mapping[str, Sequence[Pass]],
    calibration: Sequence[Batch],
    ids: Tensor,
    *,
    threads: int,
    rounds: int,
    suffix: str = "",
) -> Iterator[Row]:
    """What each plan gains, and the bytes of its cache, on ONNX Runtime."""
    built = {name: build(program, plan, calibration, "onnxruntime", threads) for name, plan in plans.items()}
    turns = {(name, threads): decoding(name, opt, ids) for name, opt in built.items()}
    samples = take_turns(turns, rounds)
    full = samples["full"].median
    whole = built["full"].prefill(ids)[1].nbytes
    for name in [*ALONE, "all"]:
        yield Row(f"{name}_gain{suffix}", full / samples[name].median, full * 1e3, None, rounds)
        share = built[name].prefill(ids)[1].nbytes / whole
        yield Row(f"{name}_kv_bytes_over_full{suffix}", share, whole, None, 1, at_most=True)


def build(
    program: Program,
    plan: Sequence[Pass],
    calibration: Sequence[Batch],
    target: str,
    threads: int | None = None,
) -> TokenModel:
    """An executable of a plan."""
    changed, refusal = rewrite(program, Plan(plan), target=target, batches=calibration, progress=False)
    if refusal is not None:
        raise refusal
    return TokenModel(lower(changed, target, threads))


if __name__ == "__main__":
    main()
