"""Decoding on a CPU: an optimized model against the ways to run it that it competes with, and against the memory.

The model has the shape of a 110-million-parameter Llama (the input embedding not counted), random weights in float32;
batch 1, a prompt of 128 tokens, 64 new ones. Every system runs with one and with two threads and counts with the better
of the two; the optimized model, in a quick run, with two only. The floor is the time to read what one token needs, the
weights and half-way through the new tokens the keys and values, at the bandwidth measured in the same run.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import StaticCache

from benchmarks.harness import Row, Samples, Turn, arguments, publish, read_floor, take_turns, timed
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.report import HuggingFaceSteps

PROMPT, NEW_TOKENS = 128, 64
THREADS = (1, 2)
QUICK_THREADS = (
    2,
)  # an executable a count takes time to make; the quick run makes do with less, to its own disadvantage
SKIPPED = (3, 6, 9)
FLOOR_BUFFER = 512 * 2**20


def main() -> None:
    """Measure, print and write the figures."""
    parser = arguments("decode", __doc__ or "")
    parser.add_argument("--probe", action="store_true", help="print time and memory of one optimize as JSON, and end")
    options = parser.parse_args()
    if options.probe:
        print(json.dumps(probe()))
        return
    cost = run_probe()
    model = make_model()
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    systems = baselines(model, ids) | ours(model, ids, QUICK_THREADS if options.quick else THREADS)
    samples = take_turns(systems, rounds=3 if options.quick else 9)
    for name, each in sorted(samples.items()):
        print(f"{name:>16}: {each.median * 1e3:8.2f} ms with {each.best_threads} threads, median of {each.count}")
    publish("decode", [*ratios(samples), *costs(cost)], options.json)


def make_model() -> LlamaForCausalLM:
    """The model under test."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # every system decodes all the tokens
    model.generation_config.pad_token_id = 0
    return model


def weight_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of all weights."""
    return sum(each.numel() * each.element_size() for each in model.parameters())


def key_value_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of keys and values that each token adds to the cache."""
    config = model.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * width * model.dtype.itemsize


def baselines(model: LlamaForCausalLM, ids: Tensor) -> dict[tuple[str, int], Turn]:
    """What an optimized model competes with."""
    eager = HuggingFaceSteps(model)
    compiled = CompiledSteps(model, ids.shape[1] + NEW_TOKENS)
    table = model.get_input_embeddings().weight
    touched = weight_bytes(model) - table.numel() * table.element_size()  # of the table, one row is read
    touched += (PROMPT + NEW_TOKENS // 2) * key_value_bytes(model)
    buffer = torch.ones(FLOOR_BUFFER // 4)

    def floor() -> dict[str, float]:
        return {"floor": min(read_floor(buffer, touched) for _ in range(5))}

    systems: dict[tuple[str, int], Turn] = {}
    for threads in THREADS:
        systems["hf eager", threads] = steps("hf eager", eager, ids)
        systems["hf generate", threads] = generation("hf generate", model, ids)
        systems["torch.compile", threads] = steps("torch.compile", compiled, ids)
        systems["floor", threads] = floor
    return systems


def ours(model: LlamaForCausalLM, ids: Tensor, counts: Sequence[int]) -> dict[tuple[str, int], Turn]:
    """The optimized model, whole and with layers skipped."""
    from skipstone.optimize import optimize

    skipping = Plan([SkipSublayers(layers=SKIPPED)])
    systems: dict[tuple[str, int], Turn] = {}
    for threads in counts:
        whole = optimize(model, threads=threads, progress=False)
        check_equal(model, whole, ids)
        systems["ours", threads] = steps("ours", whole, ids)
        systems["ours generate", threads] = generation("ours generate", whole, ids)
        systems["ours skipping", threads] = steps(
            "ours skipping", optimize(model, skipping, threads=threads, progress=False), ids
        )
    return systems


class CompiledSteps:
    """The model under `torch.compile` with a static cache; the prompt is read uncompiled, which is not counted.

    Args:
        settings: further ones of `torch.compile`.
    """

    def __init__(self, model: LlamaForCausalLM, length: int, **settings: Any) -> None:
        self.model = model
        self.forward = torch.compile(model, fullgraph=True, dynamic=False, **settings)
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.position = 0

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """Logits of the last position, and the cache."""
        self.cache.reset()
        self.position = input_ids.shape[1]
        out = self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits, self.cache

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """Logits after one more token."""
        positions = torch.tensor([[self.position]])
        self.position += 1
        out = self.forward(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits
        return logits


def steps(name: str, system: Any, ids: Tensor) -> Turn:
    """A turn that reads the prompt, then decodes greedily: seconds of the prefill and of one token."""

    @torch.no_grad()
    def turn() -> dict[str, float]:
        prefill, (logits, cache) = timed(lambda: system.prefill(ids))

        def decode() -> None:
            scores = logits
            for _ in range(NEW_TOKENS):
                scores = system.decode(scores.reshape(1, -1).argmax(dim=-1, keepdim=True), cache)

        seconds, _ = timed(decode)
        return {f"{name} prefill": prefill, name: seconds / NEW_TOKENS}

    return turn


def generation(name: str, system: Any, ids: Tensor) -> Turn:
    """A turn of `generate`: seconds of one token, the prompt's share taken out by a run that makes one token only."""

    @torch.no_grad()
    def turn() -> dict[str, float]:
        one, _ = timed(lambda: system.generate(ids, max_new_tokens=1, do_sample=False))
        all_of_them, _ = timed(lambda: system.generate(ids, max_new_tokens=1 + NEW_TOKENS, do_sample=False))
        return {name: (all_of_them - one) / NEW_TOKENS}

    return turn


@torch.no_grad()
def check_equal(model: LlamaForCausalLM, executable: Any, ids: Tensor) -> None:
    """Refuse to time an executable that computes something else."""
    expected, given = model(input_ids=ids).logits, executable(input_ids=ids).logits
    error = (given - expected).abs().max() / (expected.max() - expected.min())
    if not error <= 1e-4:
        raise SystemExit(f"the optimized model differs from the model by {error:.2e} of the logit range")


def ratios(samples: dict[str, Samples]) -> list[Row]:
    """The figures that compare times; baselines in milliseconds."""

    def row(metric: str, baseline: str, system: str, goal: float) -> Row:
        ours, theirs = samples[system], samples[baseline].median
        return Row(metric, theirs / ours.median, theirs * 1e3, goal, ours.count)

    decode, floor = samples["ours"], samples["floor"].median
    return [
        row("decode_vs_hf_eager", "hf eager", "ours", 2.2),
        row("decode_vs_hf_generate", "hf generate", "ours generate", 1.8),
        row("decode_vs_torch_compile", "torch.compile", "ours", 1.8),
        Row("decode_over_floor", decode.median / floor, floor * 1e3, 1.3, decode.count, at_most=True),
        row("prefill_vs_hf_eager", "hf eager prefill", "ours prefill", 1.0),
        row("three_layers_skipped_gain", "ours", "ours skipping", 1.15),
    ]


def costs(cost: dict[str, float]) -> list[Row]:
    """What `optimize` itself takes; the memory's baseline is the weights in bytes."""
    weights = cost["weights"]
    return [
        Row("optimize_seconds", cost["seconds"], None, 90, 1, at_most=True),
        Row("peak_memory_over_weights", cost["peak"] / weights, weights, 1.7, 1, at_most=True),
    ]


def run_probe() -> dict[str, float]:
    """`probe` in a fresh process, whose memory nothing else has touched."""
    command = [sys.executable, "-m", "benchmarks.decode", "--probe"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def probe() -> dict[str, float]:
    """Seconds and extra resident memory of one `optimize`, from the loaded model to the executable."""
    from skipstone.optimize import optimize

    torch.set_num_threads(max(THREADS))
    model = make_model()
    gc.collect()
    peak = peak_memory()
    seconds, _executable = timed(lambda: optimize(model, progress=False))
    return {"seconds": seconds, "peak": peak(), "weights": weight_bytes(model)}


def peak_memory() -> Callable[[], float]:
    """Begin to watch the resident memory; the result tells by how many bytes it has risen at most since.

    Linux keeps the high-water mark itself. A thread that samples would be starved by calls that hold the interpreter's
    lock, which is when copies are made.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew at the present size
    before = _status("VmRSS")
    return lambda: _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}; the memory probe needs Linux")


if __name__ == "__main__":
    main()
