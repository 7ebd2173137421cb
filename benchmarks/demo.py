"""A tour on a small trained model: look at it, leave out what matters least, and see what that costs and buys.

The model writes Python, byte by byte (`benchmarks/reference`). Each sublayer's importance is the loss that leaving it
out adds on the validation split; the losses shown at the end are on the test split, which no choice was made on.

    python -m benchmarks.demo [--skip N] [--threads N]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.reference import tokenizer as reference
from benchmarks.reference.corpus import Split, corpus
from skipstone.cli import describe
from skipstone.optimize import optimize
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.report import HuggingFaceSteps, measure

CHECKPOINT = Path(__file__).parent / "reference" / "stdlib-llama"
WINDOW = 256  # bytes
PROMPT = '''def read_lines(path):
    """Return the lines of a file without their line ends."""
'''


def main() -> None:
    """Run the tour."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--skip", type=int, default=4, metavar="N", help="how many sublayers to leave out")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), metavar="N")
    options = parser.parse_args()
    if not (CHECKPOINT / "config.json").exists():
        sys.exit(f"There is no checkpoint in {CHECKPOINT}. Train one: python -m benchmarks.reference.train")
    torch.set_num_threads(options.threads)
    model = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

    heading("The model")
    print(describe(model))

    heading("What each sublayer is worth")
    worth = importance(model, windows("valid", 8))
    show_importance(model, worth)
    chosen = sorted(worth, key=worth.__getitem__)[: options.skip]
    plan = Plan([plan_entry(chosen)])
    print(f"plan: {plan.entries[0]}")

    whole = optimize(model, threads=options.threads)
    skipping = optimize(model, plan, threads=options.threads)
    prompt = torch.cat((torch.tensor([reference.BEGIN]), reference.encode(PROMPT.encode())))[None]
    systems: dict[str, Any] = {"Hugging Face": HuggingFaceSteps(model), "empty plan": whole, "skipping": skipping}
    times = measure(systems, prompt, new_tokens=64, samples=5)
    for name, executable in (("empty plan", whole), ("skipping", skipping)):
        executable.report.timing_before, executable.report.timing_after = times["Hugging Face"], times[name]
        heading(f"Optimized: {name}")
        print(executable.report)

    runnable = {"Hugging Face": model, "empty plan": whole, "skipping": skipping}
    for name, system in runnable.items():
        heading(f"What it writes: {name}")
        print(tokenizer.decode(generate(system, prompt), skip_special_tokens=True))

    heading("What it costs and buys")
    held_out = windows("test", 32)
    table = Table("", "loss (nats a byte)", "prefill", "decode, a token", "prefill gain", "decode gain")
    base = times["Hugging Face"]
    for name, system in runnable.items():
        time = times[name]
        decode, first = time.decode_ms or 0.0, base.decode_ms or 0.0
        gain = f"{base.prefill_ms / time.prefill_ms:.2f}", f"{first / decode:.2f}" if decode else "no cache"
        table.add_row(name, f"{loss(system, held_out):.4f}", f"{time.prefill_ms:.2f} ms", f"{decode:.2f} ms", *gain)
    Console(width=100).print(table)
    print(f"loss on {held_out[:, 1:].numel()} held-out bytes; times are medians of {base.samples} interleaved runs of")
    print(f"{base.prompt} + {base.new_tokens} tokens with {options.threads} threads; gains are against Hugging Face.")


def heading(text: str) -> None:
    """Print a title."""
    print(f"\n== {text} ==\n")


def windows(split: Split, count: int) -> Tensor:
    """Windows of a split, evenly spread, each after the begin token: [count, WINDOW + 1]."""
    text = reference.encode(corpus(split))
    starts = torch.linspace(0, len(text) - WINDOW, count).long()
    return F.pad(text[starts[:, None] + torch.arange(WINDOW)], (1, 0), value=reference.BEGIN)


@torch.no_grad()
def loss(system: Callable[..., Any], samples: Tensor) -> float:
    """Mean next-byte loss in nats."""
    logits = system(input_ids=samples[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()


def generate(system: Any, prompt: Tensor) -> Tensor:
    """The prompt with its greedy continuation."""
    with torch.no_grad():
        return system.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=160, do_sample=False)[0]


def importance(model: LlamaForCausalLM, samples: Tensor) -> dict[tuple[str, int], float]:
    """The loss that leaving out each sublayer adds, by kind and layer."""
    base = loss(model, samples)
    worth = {}
    for kind in ("attention", "ffn"):
        for layer in range(model.config.num_hidden_layers):
            with silenced(module_of(model, kind, layer)):
                worth[kind, layer] = loss(model, samples) - base
    return worth


def module_of(model: LlamaForCausalLM, kind: str, layer: int) -> nn.Module:
    """The module behind a sublayer."""
    block = model.model.layers[layer]
    return block.self_attn if kind == "attention" else block.mlp


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """The module adds nothing to the residual stream inside this block."""

    def silence(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handle = module.register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def show_importance(model: LlamaForCausalLM, worth: dict[tuple[str, int], float]) -> None:
    """Print the importances, a layer a line."""
    print("loss that leaving it out adds, in nats a byte:")
    table = Table("layer", "attention", "ffn")
    for layer in range(model.config.num_hidden_layers):
        table.add_row(str(layer), *(f"{worth[kind, layer]:+.4f}" for kind in ("attention", "ffn")))
    Console(width=100).print(table)


def plan_entry(chosen: list[tuple[str, int]]) -> SkipSublayers:
    """The plan's entry for sublayers given by kind and layer."""
    attention = tuple(sorted(layer for kind, layer in chosen if kind == "attention"))
    ffn = tuple(sorted(layer for kind, layer in chosen if kind == "ffn"))
    return SkipSublayers(attention=attention, ffn=ffn)


if __name__ == "__main__":
    main()
