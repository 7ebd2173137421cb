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
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]
        if not any(name.startswith(_PAST) for name in self.inputs):
            raise ArtifactError(f"The model in {self.directory} has no KV cache, so it cannot decode token by token.")
        self.ends = self._end_tokens()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue prompts, each until its end token.

        Args:
            prompts: token ids of each sequence; shorter ones are padded on the left.
            max_new_tokens: the most tokens to add to each.
        Returns:
            the new tokens of each sequence, with the end token where it came.
        Raises:
            InvalidInput: there is nothing to continue.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise InvalidInput("a prompt is empty.", hint="Give at least one token a sequence.")
        width = max(map(len, prompts))
        tokens = np.array([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], np.int64)
        mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)
        lengths = mask.sum(axis=1)
        past = self._empty_cache(len(prompts))
        new: list[list[int]] = [[] for _ in prompts]
        running = np.ones(len(prompts), bool)
        for _ in range(max_new_tokens):
            logits, past = self._step(tokens, mask, lengths, past)
            chosen = logits[:, -1].argmax(axis=-1)
            for row in np.flatnonzero(running):
                new[row].append(int(chosen[row]))
            running &= ~np.isin(chosen, self.ends)
            if not running.any():
                break
            tokens, mask = chosen[:, None], np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        return new

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

    def _step(
        self, tokens: np.ndarray, mask: np.ndarray, lengths: np.ndarray, past: dict[str, OrtValue]
    ) -> tuple[np.ndarray, dict[str, OrtValue]]:
        """Logits [B, S, V] of new tokens [B, S], the last columns of a mask [B, past + S], and the cache behind them.

        Args:
            lengths: int64 [B], tokens of each prompt.
            past: by the names of the model's inputs.
        """
        positions = (mask.cumsum(axis=1) - 1).clip(min=0)[:, -tokens.shape[1] :]
        steps = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "decode_start": lengths}
        values = {
            name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
            for name, value in steps.items()
            if name in self.inputs
        }
        results = dict(zip(self.outputs, self.session.run_with_ort_values(None, values | past), strict=True))
        logits: np.ndarray = results.pop("logits").numpy()
        return logits, {name.replace(_PRESENT, _PAST): value for name, value in results.items()}

    def _empty_cache(self, batch: int) -> dict[str, OrtValue]:
        return {
            name: OrtValue.ortvalue_from_numpy(np.zeros((batch, each.shape[1], 0, each.shape[3]), _TYPES[each.type]))
            for name, each in self.inputs.items()
            if name.startswith(_PAST)
        }

    def _end_tokens(self) -> list[int]:
        """The tokens that end a sequence, as the generation config says, or else the model's own."""
        for name in ("generation_config.json", "config.json"):
            file = self.directory / name
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if (end := content.get("eos_token_id")) is not None:
                return end if isinstance(end, list) else [end]
        return []


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
