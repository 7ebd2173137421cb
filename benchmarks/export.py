"""Exporting to ONNX: what it takes, and how fast the exported directory decodes, against the other ways to do both.

The models are the 110 million parameters of `benchmarks.decode` and the reference model; on CPUs, in float32, batch 1.

Writing, each time in a fresh process: ``export_time_over_torch_*`` is the time of `skipstone.export_onnx` over that of
a bare `torch.onnx.export` of the same model with its cache, both with their files; ``export_peak_over_weights_*`` the
most memory that it takes above the loaded model (of the large model only: of the small one, Python code takes many
times the weights); ``file_over_weights_*`` the size of the model and its external data.

Decoding, medians of turns of systems in processes of their own, with the same number of threads; all must give the same
tokens. ``decode_vs_*`` and ``prefill_vs_*`` (with what is set up for a prompt) compare our runner without torch with

- ``genai``: onnxruntime-genai, on the very directory that our runner runs;
- ``genai_builder``: onnxruntime-genai, on what its own model builder makes of the Hugging Face model;
- ``hf``: that bare export of the Hugging Face model, at our opset, with one operator for an attention and one for a
  norm, on ONNX Runtime with every value bound where it lies.

ONNX Runtime is set up by each system as it does by default. Where onnxruntime-genai is not installed,
``--genai-python`` can name an interpreter that has it; otherwise it is not measured, which is said.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, LlamaForCausalLM

import skipstone
from benchmarks.decode import make_model, peak_memory, weight_bytes
from benchmarks.harness import Row, Samples, Turn, arguments, publish, take_turns, timed
from benchmarks.reference.evaluate import CHECKPOINT
from skipstone.runtime.onnx.files import MODEL_FILE, WEIGHTS_FILE
from skipstone.runtime.onnx.opsets import OPSET

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 32
CONTEXTS = {"110m": (128, 1024), "reference": (128, 384)}  # the reference model has 512 positions
THREADS = {"110m": 2, "reference": 1}  # its steps are too short to share


def main() -> None:
    """Measure, print and write the figures."""
    parser = arguments("export", __doc__ or "")
    parser.add_argument("--genai-python", default=sys.executable, metavar="PATH", help="Python with onnxruntime-genai")
    parser.add_argument("--probe", nargs=3, metavar=("KIND", "MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        print(json.dumps(probe(*options.probe)))
        return
    rows: list[Row] = []
    for name in CONTEXTS:
        with TemporaryDirectory() as folder:
            rows += writing(name, Path(folder), rounds=1 if options.quick else 3)
            rows += decoding(name, Path(folder), options.genai_python, rounds=3 if options.quick else 5)
    publish("export", rows, options.json)


def load(name: str) -> LlamaForCausalLM:
    """One of the models; what ends a sequence is the last token."""
    model = make_model() if name == "110m" else LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    model.config.eos_token_id = model.generation_config.eos_token_id = model.config.vocab_size - 1
    return model


# -------------------------------------------------------------------------------------------------------------- writing


def writing(name: str, folder: Path, rounds: int) -> Iterator[Row]:
    """What an export of a model takes; the directories stay in the folder, by their kind."""
    figures: dict[str, list[dict[str, float]]] = {kind: [] for kind in EXPORTS}
    for number in range(rounds):
        for kind in list(EXPORTS)[:: 1 if number % 2 else -1]:
            shutil.rmtree(folder / kind, ignore_errors=True)
            figures[kind].append(run_probe(kind, name, folder / kind))

    def median(kind: str, figure: str) -> float:
        return statistics.median(each[figure] for each in figures[kind])

    for kind in EXPORTS:
        print(f"{name}, {kind}: {median(kind, 'seconds'):.2f} s, {median(kind, 'peak') / 2**20:.0f} MiB at the peak")
    weights = median("ours", "weights")
    seconds = median("hf", "seconds")
    ratio = median("ours", "seconds") / seconds
    yield Row(f"export_time_over_torch_{name}", ratio, seconds * 1e3, 1.5, rounds, at_most=True)
    if name == "110m":
        peak = median("ours", "peak") / weights
        yield Row(f"export_peak_over_weights_{name}", peak, weights, 1.7, rounds, at_most=True)
        peak = median("hf", "peak") / weights
        yield Row(f"torch_export_peak_over_weights_{name}", peak, weights, None, rounds, at_most=True)
    size = sum((folder / "ours" / file).stat().st_size for file in (MODEL_FILE, WEIGHTS_FILE))
    yield Row(f"file_over_weights_{name}", size / weights, weights, 1.02, 1, at_most=True)


def run_probe(kind: str, name: str, out: Path) -> dict[str, float]:
    """`probe` in a fresh process, whose memory nothing else has touched."""
    command = [sys.executable, "-m", "benchmarks.export", "--probe", kind, name, str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def probe(kind: str, name: str, out: str) -> dict[str, float]:
    """Seconds and extra resident memory of one export, from the loaded model to the files."""
    model = load(name)
    gc.collect()
    peak = peak_memory()
    seconds, _ = timed(lambda: EXPORTS[kind](model, Path(out)))
    return {"seconds": seconds, "peak": peak(), "weights": weight_bytes(model)}


def export_ours(model: LlamaForCausalLM, out: Path) -> None:
    """With skipstone."""
    skipstone.export_onnx(model, out, format="genai", progress=False)


class Cached(nn.Module):
    """A model whose cache is flat inputs and outputs, keys and values of each layer in turn."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        )
        return out.logits, *(each for layer in out.past_key_values.layers for each in (layer.keys, layer.values))


@torch.no_grad()
def export_plain(model: LlamaForCausalLM, out: Path) -> None:
    """With torch.onnx alone, under optimum's names."""
    config, (batch, new, past) = model.config, (2, 5, 7)
    caches = [f"{layer}.{which}" for layer in range(config.num_hidden_layers) for which in ("key", "value")]
    width = config.hidden_size // config.num_attention_heads
    cache = [torch.zeros(batch, config.num_key_value_heads, past, width) for _ in caches]
    positions = torch.arange(past, past + new).repeat(batch, 1)
    ids, mask = (torch.ones(batch, size, dtype=torch.int64) for size in (new, past + new))
    dynamic = {0: Dim.AUTO, 1: Dim.AUTO}
    out.mkdir()
    torch.onnx.export(
        Cached(model).eval(),
        (ids, mask, positions, *cache),
        out / MODEL_FILE,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        dynamic_shapes=(dynamic, dynamic, dynamic, tuple({0: Dim.AUTO, 2: Dim.AUTO} for _ in caches)),
        input_names=[
            "input_ids",
            "attention_mask",
            "position_ids",
            *(f"past_key_values.{each}" for each in caches),
        ],
        output_names=["logits", *(f"present.{each}" for each in caches)],
    )


EXPORTS: dict[str, Callable[[LlamaForCausalLM, Path], None]] = {"ours": export_ours, "hf": export_plain}


# ------------------------------------------------------------------------------------------------------------- decoding


def decoding(name: str, folder: Path, genai_python: str, rounds: int) -> Iterator[Row]:
    """How fast a model decodes from the directories in a folder."""
    systems = {kind: (sys.executable, "ours" if kind == "ours" else "growing", folder / kind) for kind in EXPORTS}
    if reason := why_no_genai(genai_python):
        print(f"onnxruntime-genai was not measured: {reason}")
    else:
        build_with_genai(genai_python, load(name), folder / "genai_builder")
        systems["genai"] = genai_python, "genai", folder / "ours"
        systems["genai_builder"] = genai_python, "genai", folder / "genai_builder"
    with ExitStack() as stack:
        running = {
            system: stack.enter_context(Running(python, kind, directory, THREADS[name]))
            for system, (python, kind, directory) in systems.items()
        }
        vocabulary = load(name).config.vocab_size
        for context in CONTEXTS[name]:
            generator = torch.Generator().manual_seed(context)
            prompt = torch.randint(0, vocabulary, (context,), generator=generator).tolist()
            turns = {(system, THREADS[name]): each.turn(system, prompt) for system, each in running.items()}
            samples = take_turns(turns, rounds)
            check_equal({system: each.tokens for system, each in running.items()})
            yield from ratios(samples, f"{name}_{context}", list(systems))


def ratios(samples: Mapping[str, Samples], suffix: str, systems: Sequence[str]) -> Iterator[Row]:
    """The times of the other systems over ours; baselines in milliseconds."""
    for figure, goal in (("decode", 1.0), ("prefill", None)):
        for system in systems:
            theirs = samples[f"{system} {figure}"].median
            print(f"{suffix}, {system} {figure}: {theirs * 1e3:.3f} ms")
            if system != "ours":
                ours = samples[f"ours {figure}"]
                yield Row(f"{figure}_vs_{system}_{suffix}", theirs / ours.median, theirs * 1e3, goal, ours.count)


def check_equal(tokens: Mapping[str, list[int]]) -> None:
    """Refuse to compare systems that compute something else."""
    if different := [system for system, each in tokens.items() if each != tokens["ours"]]:
        raise SystemExit(f"{', '.join(different)}: not the tokens of our runner")


class Running:
    """A system of `benchmarks.export_systems` in a process of its own, which ends with the block.

    Attributes:
        tokens: of its last turn.
    """

    def __init__(self, python: str, system: str, directory: Path, threads: int) -> None:
        command = [python, "-m", "benchmarks.export_systems", system, str(directory), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.tokens: list[int] = []
        self.version: str = self._answer()["onnxruntime"]
        if self.version != onnxruntime.__version__:
            raise SystemExit(f"{python} has ONNX Runtime {self.version}, this Python {onnxruntime.__version__}.")

    def turn(self, name: str, prompt: list[int]) -> Turn:
        """A turn that continues a prompt."""

        def run() -> dict[str, float]:
            assert self._process.stdin is not None
            print(json.dumps({"prompt": prompt, "new": NEW_TOKENS}), file=self._process.stdin, flush=True)
            answer = self._answer()
            self.tokens = answer["tokens"]
            return {f"{name} prefill": answer["prefill"], f"{name} decode": answer["step"]}

        return run

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"{' '.join(map(str, self._process.args))} has ended.")
        return json.loads(line)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, which ends it


def why_no_genai(python: str) -> str:
    """What keeps an interpreter from running onnxruntime-genai; nothing, if it can."""
    try:
        found = subprocess.run([python, "-c", "import onnxruntime_genai"], capture_output=True, text=True)
    except OSError as error:
        return f"{python}: {error.strerror}"
    return found.stderr.strip().splitlines()[-1] if found.returncode else ""


def build_with_genai(python: str, model: LlamaForCausalLM, out: Path) -> None:
    """With the model builder of onnxruntime-genai, which wants a tokenizer beside the model; any will do."""
    saved = out.with_suffix(".hf")
    model.save_pretrained(saved)
    for file in CHECKPOINT.glob("tokenizer*.json"):
        shutil.copy(file, saved)
    options = ["-i", str(saved), "-o", str(out), "-p", "fp32", "-e", "cpu", "-c", str(saved / "cache")]
    subprocess.run([python, "-m", "onnxruntime_genai.models.builder", *options], capture_output=True, check=True)
    shutil.rmtree(saved)


if __name__ == "__main__":
    main()
