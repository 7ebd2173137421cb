"""How much quality is left without 3 of 16 layers: a diffusion language model against an autoregressive one.

The contrast of Skip to the Good Part (arXiv 2603.07475), whose LLaDA keeps over 90% of its scores without 6 of 32
layers. Both models have the same shape, and saw the same text for as many steps. Layers are chosen on the training
split: by similarity, no two of them neighbours, as in the paper, or by our search; the first and the last stay. On the
test split, `kept_*` is the share of the top-1 accuracy that is left, and `dnll_*` the relative rise of the negative
log-likelihood: of next bytes, or of masked bytes, where it is an upper bound (see `benchmarks.reference.evaluate`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.harness import Row, arguments, publish, take_turns, timed
from benchmarks.reference import tokenizer
from benchmarks.reference.evaluate import evaluate, evaluate_masked, windows
from skipstone.baselines import one_shot
from skipstone.calibrate import Batch, token_batches
from skipstone.certify import logits
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.program import Program
from skipstone.ir.stream import find_stream
from skipstone.masking import mask_tokens
from skipstone.optimize import optimize
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.denoise import MaskedLM
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from skipstone.search import search
from skipstone.units import LAYERS, Space

MODELS = {name: Path(__file__).parent / "reference" / f"stdlib-{name}-16" for name in ("llada", "llama")}
OBJECTIVES = {"llada": "masked", "llama": "next"}
STEPS = 2400  # of the training: 4.9 MB, half of the training text
SHARE = 3 / 16  # of the layers is left out
LENGTH, BATCH = 256, 16
CALIBRATION_WINDOWS, TEST_WINDOWS, QUICK_TEST_WINDOWS = 32, 256, 64
PROMPT, ANSWER, DENOISING_STEPS, BLOCK = 64, 128, 32, 32
APART = Space(kinds=("layer",), minimum_gap=2)


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("diffusion", __doc__ or "").parse_args()
    require(MODELS)
    rows: list[Row] = []
    for name, checkpoint in MODELS.items():
        model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        rows += measure(name, model, options.quick)
    publish("diffusion", rows, options.json)


def require(models: dict[str, Path]) -> None:
    """Stop where a checkpoint is missing, and say how to make it."""
    missing = {name: path for name, path in models.items() if not (path / "model.safetensors").exists()}
    if missing:
        commands = "\n".join(f"    {training(name, path)}" for name, path in missing.items())
        raise SystemExit(f"The models of this benchmark have to be trained first (hours on a CPU):\n{commands}")


def training(name: str, path: Path) -> str:
    """The command that trains a checkpoint, from the repository root."""
    shape = f"--objective {OBJECTIVES[name]} --layers 16 --steps {STEPS}"
    return f"python -m benchmarks.reference.train {shape} --out {os.path.relpath(path)} --work build/{path.name}"


def measure(name: str, model: LlamaForCausalLM, quick: bool) -> Iterator[Row]:
    """The figures of one model."""
    program = capture_huggingface(model)
    samples = windows("test", QUICK_TEST_WINDOWS if quick else TEST_WINDOWS, LENGTH)
    score = evaluate_masked if OBJECTIVES[name] == "masked" else evaluate
    full = score(predictions(program, SkipSublayers()), samples)
    print(f"{name}: {full}")
    yield Row(f"nll_{name}", full.nll, None, None, full.windows, at_most=True)
    yield Row(f"top1_{name}", full.top1, None, None, full.windows)
    entries = choices(name, program)
    for method, entry in entries.items():
        less = score(predictions(program, entry), samples)
        print(f"{name} without layers {entry.layers}, by {method}: {less}")
        goal = 0.9 if name == "llada" else None
        yield Row(f"kept_{name}_{method}", less.top1 / full.top1, full.top1, goal, less.windows)
        yield Row(f"dnll_{name}_{method}", less.nll / full.nll - 1, full.nll, None, less.windows, at_most=True)
    if name == "llada":
        yield denoising(model, entries["search"], rounds=3 if quick else 9)


def choices(name: str, program: Program) -> dict[str, SkipSublayers]:
    """The layers that each method leaves out."""
    text = list(windows("train", CALIBRATION_WINDOWS, LENGTH).split(BATCH))
    masked = OBJECTIVES[name] == "masked"
    data = mask_tokens(text, tokenizer.MASK, keep=(tokenizer.BEGIN,)) if masked else text
    batches = token_batches(data, program.source)
    stream = find_stream(program)
    count = round(SHARE * stream.layers)
    times = dict.fromkeys(LAYERS.units(stream), 1.0)  # all layers are alike
    similar = one_shot(program, batches, count, space=APART, milliseconds=times)
    found = search(program, batches, space=LAYERS, count=count, milliseconds=times)
    return {"similarity": similar.entry(), "search": found.entry()}


def predictions(program: Program, entry: SkipSublayers) -> Callable[[Tensor], Tensor]:
    """Logits from token ids, without these layers."""
    less, _ = rewrite(program, Plan([entry]), target="eager", strict=False)
    model = Executable(EagerSession(less))
    return lambda ids: logits(model, Batch(ids, torch.ones_like(ids, dtype=torch.bool)))


def denoising(model: LlamaForCausalLM, entry: SkipSublayers, rounds: int) -> Row:
    """How much faster an answer is written without these layers, both on ONNX Runtime."""
    prompt = windows("test", 2, PROMPT)[:1]

    def turn(plan: Plan) -> Callable[[], dict[str, float]]:
        opt = optimize(model, plan, threads=1, progress=False)
        assert isinstance(opt, MaskedLM)
        name = "less" if len(plan) else "full"

        def write() -> dict[str, float]:
            answer = {"length": ANSWER, "steps": DENOISING_STEPS, "block_length": BLOCK}
            return {name: timed(lambda: opt.denoise(prompt, **answer))[0]}

        return write

    found = take_turns({("full", 1): turn(Plan([])), ("less", 1): turn(Plan([entry]))}, rounds)
    full, less = found["full"].median, found["less"].median
    return Row("denoise_gain", full / less, full * 1e3, None, rounds)


if __name__ == "__main__":
    main()
