"""Weights of 4 and 8 bits in ONNX Runtime: quality, size and time; `_int8` rounds the inputs of layers to 8 bits, too.

Quality, on the reference model: ``{plan}_dnll`` is the relative rise of the negative log-likelihood of held-out text,
computed by the executable itself; ``{plan}_dnll_bound`` is its one-sided bound at 95%. ``{plan}_file_over_full`` is the
size of what `export_onnx` writes for ONNX Runtime, ``model.onnx`` and its weights, over that without a plan.

Time, ``{plan}_gain``: a decode step of the model without a plan over one with it, batch 1, behind 128 tokens, and
``{plan}_prefill_gain``: the same of these 128 tokens. With one thread on the reference model, and as ``_110m`` with two
threads on the model of `benchmarks.decode` (not with --quick).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.by_prompt import PROMPT, decoding
from benchmarks.compose import build
from benchmarks.decode import make_model
from benchmarks.harness import Row, arguments, publish, take_turns
from benchmarks.reference.evaluate import CHECKPOINT
from benchmarks.skipping import batches, bound
from skipstone.budget import compare
from skipstone.certify import logits
from skipstone.export import export_onnx
from skipstone.ir.program import Program
from skipstone.optimize import capture
from skipstone.passes.base import Pass
from skipstone.passes.quantize_weights import QuantizeWeights
from skipstone.plan import Plan
from skipstone.runtime.onnx.files import MODEL_FILE, WEIGHTS_FILE

TEST_WINDOWS, QUICK_TEST_WINDOWS = 128, 32
PLANS: Mapping[str, list[Pass]] = {
    "full": [],
    "bits_4": [QuantizeWeights(bits=4)],
    "bits_4_int8": [QuantizeWeights(bits=4, activations="int8")],
    "bits_8": [QuantizeWeights(bits=8)],
    "bits_8_int8": [QuantizeWeights(bits=8, activations="int8")],
}
CHANGED = [name for name in PLANS if name != "full"]


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("weights", __doc__ or "").parse_args()
    rounds = 3 if options.quick else 9
    model = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    program = capture(model)
    rows = [*quality(program, QUICK_TEST_WINDOWS if options.quick else TEST_WINDOWS), *sizes(model)]
    ids = batches("test", 2)[0].tokens[:1, :PROMPT]
    rows += times(program, ids, threads=1, rounds=rounds)
    if not options.quick:
        large = make_model()
        ids = torch.randint(0, large.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        rows += times(capture(large), ids, threads=2, rounds=rounds, suffix="_110m")
    publish("weights", rows, options.json)


def quality(program: Program, windows: int) -> Iterator[Row]:
    """What each plan costs."""
    text = batches("test", windows)
    full = build(program, PLANS["full"], [], "onnxruntime")
    for name in CHANGED:
        changed = build(program, PLANS[name], [], "onnxruntime")
        seen = compare(partial(logits, full), partial(logits, changed), text, progress=True)
        yield Row(f"{name}_dnll", float(seen.increase.sum() / seen.nll.sum()), None, None, windows, at_most=True)
        yield Row(f"{name}_dnll_bound", bound(seen), None, None, windows, at_most=True)


def sizes(model: LlamaForCausalLM) -> Iterator[Row]:
    """What each plan makes of the files."""
    found = {name: _size(model, PLANS[name]) for name in ("full", "bits_4", "bits_8")}
    for name in ("bits_4", "bits_8"):
        yield Row(f"{name}_file_over_full", found[name] / found["full"], found["full"], None, 1, at_most=True)


def _size(model: LlamaForCausalLM, plan: list[Pass]) -> int:
    with TemporaryDirectory() as directory:
        export_onnx(model, Path(directory) / "out", Plan(plan), progress=False)
        return sum((Path(directory) / "out" / name).stat().st_size for name in (MODEL_FILE, WEIGHTS_FILE))


def times(program: Program, ids: Tensor, *, threads: int, rounds: int, suffix: str = "") -> Iterator[Row]:
    """What each plan gains."""
    built = {name: build(program, plan, [], "onnxruntime", threads) for name, plan in PLANS.items()}
    samples = take_turns({(name, threads): decoding(name, each, ids) for name, each in built.items()}, rounds)
    for what, metric in (("", "gain"), (" prefill", "prefill_gain")):
        full = samples[f"full{what}"].median
        for name in CHANGED:
            yield Row(f"{name}_{metric}{suffix}", full / samples[f"{name}{what}"].median, full * 1e3, None, rounds)


if __name__ == "__main__":
    main()
