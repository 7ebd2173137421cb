"""Systems that generate from an exported directory, each in a process of its own and without torch.

``python -m benchmarks.export_systems SYSTEM DIRECTORY --threads N`` says which ONNX Runtime it has, then reads turns as
lines of JSON, ``{"prompt": [tokens], "new": N}``. It answers each with ``{"prefill": seconds, "step": seconds,
"tokens": [tokens]}``: the time from the prompt to its first new token, the mean time of one of the N after it, and all
of them. No token ends a sequence.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from skipstone.runtime.onnx.runner import Runner

Generate = Callable[[list[int], int], Iterator[int]]
"""From a prompt, and how many tokens are to follow, to these tokens, greedily chosen."""


def ours(directory: Path, threads: int) -> Generate:
    """Our runner."""
    runner = Runner(directory, threads)
    runner.ends = []
    return runner.stream


def genai(directory: Path, threads: int) -> Generate:
    """onnxruntime-genai, as it sets itself up."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(directory))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)

    def generate(prompt: list[int], count: int) -> Iterator[int]:
        params = onnxruntime_genai.GeneratorParams(model)
        length = len(prompt) + count
        params.set_search_options(max_length=length, min_length=length, batch_size=1, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompt, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return generate


def growing(directory: Path, threads: int) -> Generate:
    """A model whose caches grow, on ONNX Runtime as it sets itself up: what a step returns, the next one gets."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    caches = {each.name: each.shape for each in session.get_inputs() if each.name.startswith("past_key_values")}
    presents = [each.name for each in session.get_outputs()[1:]]

    def generate(prompt: list[int], count: int) -> Iterator[int]:
        binding = session.io_binding()
        length, tokens = len(prompt), np.array([prompt], np.int64)
        mask, positions = np.ones((1, length + count), np.int64), np.arange(length + count)[None]
        empty = (np.zeros((1, shape[1], 0, shape[3]), np.float32) for shape in caches.values())
        past = [OrtValue.ortvalue_from_numpy(each) for each in empty]
        for end in range(length, length + count):
            start = end - tokens.shape[1]
            binding.bind_cpu_input("input_ids", tokens)
            binding.bind_cpu_input("attention_mask", mask[:, :end])
            binding.bind_cpu_input("position_ids", positions[:, start:end])
            for name, value in zip(caches, past, strict=True):
                binding.bind_ortvalue_input(name, value)
            for name in ("logits", *presents):
                binding.bind_output(name)
            session.run_with_iobinding(binding)
            logits, *past = binding.get_outputs()
            tokens = np.from_dlpack(logits)[:, -1].argmax(axis=-1)[None]
            yield int(tokens[0, 0])

    return generate


SYSTEMS: dict[str, Callable[[Path, int], Generate]] = {"ours": ours, "genai": genai, "growing": growing}


def turn(generate: Generate, prompt: list[int], new: int) -> dict[str, Any]:
    """Time one generation."""
    started = time.perf_counter()
    tokens = generate(prompt, 1 + new)
    first = next(tokens)
    read = time.perf_counter()
    others = list(itertools.islice(tokens, new))
    return {"prefill": read - started, "step": (time.perf_counter() - read) / new, "tokens": [first, *others]}


def main() -> None:
    """Serve turns until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    generate = SYSTEMS[arguments.system](arguments.directory, arguments.threads)
    print(json.dumps({"onnxruntime": onnxruntime.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(generate, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
