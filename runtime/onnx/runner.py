"""Generate from an exported directory with numpy, ONNX Runtime and tokenizers alone; torch is never imported.

``python -m skipstone.runtime.onnx.runner DIRECTORY PROMPT`` continues a text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from skipstone.ir.errors import ArtifactError, InvalidInput

MODEL_FILE = "model.onnx"
_PAST, _PRESENT = "past_key_values.", "present."
_TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}


class Runner:
    """Greedy decoding with a model that `skipstone.export_onnx` wrote.

    Args:
        directory: what it wrote.
        threads: threads that one operator may use, None for one a core.
    Raises:
        ArtifactError: there is no model with a KV cache.
    """

    def __init__(self, directory: str | Path, threads: int | None = None) -> None:
        self.directory = Path(directory)
        model = self.directory / MODEL_FILE
        if not model.is_file():
            raise ArtifactError(f"{self.directory} holds no {MODEL_FILE}.", hint="Write one with `skipstone export`.")
        self.prompts = _Graph(model, threads)
        if not self.prompts.caches:
            raise ArtifactError(f"The model in {self.directory} has no KV cache, so it cannot decode token by token.")
        # What goes on with the sequences of each choice: graphs of their own, or the one that reads prompts.
        own = range(len(list(self.directory.glob("decode_*.onnx"))))
        self.steps = [_Graph(self.directory / f"decode_{number}.onnx", threads) for number in own] or [self.prompts]
        self.ends = self._end_tokens()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue prompts, each until its end token.

        Args:
            prompts: token ids of each sequence; shorter ones are padded on the left.
            max_new_tokens: the most tokens to add to each.
        Returns:
            the new tokens of each sequence, with the end token where it came.
        Raises:
            InvalidInput: there is nothing to continue, or no token to add.
        """
        if max_new_tokens < 1:
            raise InvalidInput(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise InvalidInput("a prompt is empty.", hint="Give at least one token a sequence.")
        width = max(map(len, prompts))
        tokens = np.array([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], np.int64)
        mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)
        results = self.prompts.run(tokens, mask, mask.sum(axis=1), self.prompts.empty_cache(len(prompts)))
        choice = results["choice"].numpy() if "choice" in results else np.zeros(len(prompts), np.int64)
        new: list[list[int]] = [[] for _ in prompts]
        for number in np.unique(choice):
            rows = np.flatnonzero(choice == number)
            parts = results if len(rows) == len(prompts) else _rows(results, rows)
            for row, written in zip(rows, self._go_on(int(number), parts, mask[rows], max_new_tokens), strict=True):
                new[row] = written
        return new

    def _go_on(
        self, choice: int, results: dict[str, OrtValue], mask: np.ndarray, max_new_tokens: int
    ) -> list[list[int]]:
        """The new tokens of sequences that made one choice, behind what reading their prompts gave."""
        lengths, graph = mask.sum(axis=1), self.steps[choice]
        new: list[list[int]] = [[] for _ in mask]
        running = np.ones(len(mask), bool)
        while True:
            chosen = results["logits"].numpy()[:, -1].argmax(axis=-1)
            for row in np.flatnonzero(running):
                new[row].append(int(chosen[row]))
            running &= ~np.isin(chosen, self.ends)
            if not running.any() or max(map(len, new)) == max_new_tokens:
                return new
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            results = graph.run(chosen[:, None], mask, lengths, graph.past(results))

    def continue_text(self, prompt: str, max_new_tokens: int) -> str:
        """The prompt and its continuation, by the tokenizer in the directory.

        Raises:
            ArtifactError: there is no tokenizer.
        """
        from tokenizers import Tokenizer

        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise ArtifactError(f"{self.directory} holds no tokenizer.json.", hint="Export it with a tokenizer.")
        tokenizer = Tokenizer.from_file(str(file))
        tokens = tokenizer.encode(prompt).ids
        text: str = tokenizer.decode([*tokens, *self.generate([tokens], max_new_tokens)[0]])
        return text

    def _end_tokens(self) -> list[int]:
        """The tokens that end a sequence, as the generation config says."""
        file = self.directory / "generation_config.json"
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        end = content.get("eos_token_id")
        return end if isinstance(end, list) else [] if end is None else [end]


class _Graph:
    """One of the models, fed by names."""

    def __init__(self, path: Path, threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.caches = {each.name: each for each in self.session.get_inputs() if each.name.startswith(_PAST)}

    def run(
        self, tokens: np.ndarray, mask: np.ndarray, lengths: np.ndarray, past: dict[str, OrtValue]
    ) -> dict[str, OrtValue]:
        """All outputs for new tokens [B, S], the last columns of a mask [B, past + S].

        Args:
            lengths: int64 [B], tokens of each prompt.
            past: the cache, by the names of the inputs.
        """
        positions = (mask.cumsum(axis=1) - 1).clip(min=0)[:, -tokens.shape[1] :]
        steps = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "decode_start": lengths}
        values = {
            name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
            for name, value in steps.items()
            if name in self.inputs
        }
        return dict(zip(self.outputs, self.session.run_with_ort_values(None, values | past), strict=True))

    def past(self, results: dict[str, OrtValue]) -> dict[str, OrtValue]:
        """What the last step left in the caches that this graph has."""
        return {name: results[name.replace(_PAST, _PRESENT)] for name in self.caches}

    def empty_cache(self, batch: int) -> dict[str, OrtValue]:
        """The cache before the first token."""
        return {
            name: OrtValue.ortvalue_from_numpy(np.zeros((batch, each.shape[1], 0, each.shape[3]), _TYPES[each.type]))
            for name, each in self.caches.items()
        }


def _rows(results: dict[str, OrtValue], rows: np.ndarray) -> dict[str, OrtValue]:
    """The results of some sequences."""
    return {name: OrtValue.ortvalue_from_numpy(value.numpy()[rows]) for name, value in results.items()}


def main() -> None:
    """Continue a text from the command line."""
    parser = argparse.ArgumentParser(description="Continue a text with an exported model.")
    parser.add_argument("directory")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N")
    arguments = parser.parse_args()
    print(Runner(arguments.directory, arguments.threads).continue_text(arguments.prompt, arguments.max_new_tokens))


if __name__ == "__main__":
    main()
