"""Generate from an exported directory with numpy, ONNX Runtime and tokenizers alone; torch is never imported.

``python -m skipstone.runtime.onnx.runner DIRECTORY PROMPT`` continues a text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from skipstone.ir.errors import ArtifactError, InvalidInput, SkipstoneError

MODEL_FILE = "model.onnx"
_PAST, _PRESENT = "past_key_values.", "present."
_CACHE_LINE = 64  # bytes
_TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}

Step = list[tuple[int, int]]
"""The sequences that go on, by their place in the batch, and the next token of each."""


class Runner:
    """Greedy decoding with a model that `skipstone.export_onnx` wrote.

    Args:
        directory: what it wrote.
        threads: threads that one operator may use, None for one a core.
    Raises:
        ArtifactError: there is no model with a KV cache, or a file is damaged.
        InvalidInput: there cannot be so many threads.
    """

    def __init__(self, directory: str | Path, threads: int | None = None) -> None:
        if threads is not None and not _is_positive(threads):
            raise InvalidInput(f"threads is {threads!r}, expected at least 1, or None.")
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
        self.limit = self._limit()

    @cached_property
    def in_place(self) -> bool:
        """Whether caches are buffers with room for all tokens, rather than made anew in every step."""
        return all(graph.writes_in_place() for graph in {self.prompts, *self.steps})

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue prompts, each until its end token.

        Args:
            prompts: token ids of each sequence, integers; shorter ones are padded on the left.
            max_new_tokens: the most tokens to add to each.
        Returns:
            the new tokens of each sequence, with the end token where it came.
        Raises:
            InvalidInput: there is nothing to continue, no token to add, or no place for all of them; or something is no
                token of the model.
        """
        new: list[list[int]] = [[] for _ in prompts]
        for step in self._steps(prompts, max_new_tokens):
            for row, token in step:
                new[row].append(token)
        return new

    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """The tokens with which `generate` continues one prompt, each as soon as it is known."""
        for ((_, token),) in self._steps([prompt], max_new_tokens):
            yield token

    def _steps(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Step]:
        """The steps of all sequences; those of one choice go on together."""
        if not _is_positive(max_new_tokens):
            raise InvalidInput(f"max_new_tokens is {max_new_tokens!r}, expected at least 1.")
        arrays = _checked(prompts)
        width = max(map(len, arrays))
        if self.limit is not None and (longest := width + max_new_tokens) > self.limit:
            raise InvalidInput(
                f"a sequence of {longest} tokens is longer than {self.limit} (the model's positions).",
                hint="Shorten the prompt or ask for fewer new tokens.",
            )
        columns = width + max_new_tokens - 1  # the last token is never read
        tokens, mask = np.zeros((len(arrays), width), np.int64), np.zeros((len(arrays), columns), np.int64)
        for row, prompt in enumerate(arrays):
            tokens[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        cache = self.prompts.empty_cache(len(prompts), columns if self.in_place else 0)
        reading = _Binding(self.prompts, cache, self.in_place)
        reading.bind_prompts(tokens, mask[:, :width])
        try:
            results = reading.run()
        except RuntimeError as error:  # ONNX Runtime's: it alone knows how many tokens have an embedding
            if (largest := int(tokens.max())) < self.prompts.vocabulary:
                raise
            raise InvalidInput(f"{largest} is no token of the model.", hint="Use its tokenizer.") from error
        first = np.from_dlpack(results["logits"])[:, -1].argmax(axis=-1)
        choice = results["choice"].numpy() if "choice" in results else np.zeros(len(prompts), np.int64)
        for number in np.unique(choice):
            rows = np.flatnonzero(choice == number).tolist()
            cache = reading.cache if len(rows) == len(prompts) else _rows(reading.cache, rows)
            for step in self._go_on(self.steps[number], cache, mask[rows], width, first[rows]):
                yield [(rows[place], token) for place, token in step]

    def _go_on(
        self, graph: _Graph, cache: Mapping[str, OrtValue], mask: np.ndarray, width: int, first: np.ndarray
    ) -> Iterator[Step]:
        """The steps of sequences that one graph continues.

        Args:
            cache: theirs, behind their prompts.
            mask: int64 [B, T], of the prompts, in `width` columns, and of all tokens that may be read behind them.
            first: int64 [B], their first tokens.
        """
        logits = np.empty((len(first), 1, graph.vocabulary), np.float32)
        tokens, lengths = first[:, None], mask[:, :width].sum(axis=1)
        positions = lengths[:, None].copy()
        reading = _Binding(graph, {name: cache[name] for name in graph.caches}, self.in_place, logits=logits)
        reading.bind(input_ids=tokens, position_ids=positions, decode_start=lengths)
        running: Sequence[int] = range(len(first))
        for end in range(width + 1, mask.shape[1] + 2):
            new = tokens[:, 0].tolist()
            yield [(row, new[row]) for row in running]
            running = [row for row in running if new[row] not in self.ends]
            if end > mask.shape[1] or not running:
                return
            reading.bind(attention_mask=mask[:, :end])
            reading.run()
            logits[:, 0].argmax(axis=-1, out=tokens[:, 0])
            positions += 1

    def continue_text(self, prompt: str, max_new_tokens: int) -> str:
        """The prompt and its continuation, by the tokenizer in the directory.

        Raises:
            ArtifactError: there is no tokenizer, or it is damaged.
            InvalidInput: as of `generate`.
        """
        from tokenizers import Tokenizer

        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise ArtifactError(f"{self.directory} holds no tokenizer.json.", hint="Export it with a tokenizer.")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # it raises nothing more special
            raise ArtifactError(f"Cannot read {file}: {error}.") from error
        tokens = tokenizer.encode(prompt).ids
        text: str = tokenizer.decode([*tokens, *self.generate([tokens], max_new_tokens)[0]])
        return text

    def _end_tokens(self) -> list[int]:
        """The tokens that end a sequence, as the generation config says."""
        end = self._json("generation_config.json").get("eos_token_id")
        return end if isinstance(end, list) else [] if end is None else [end]

    def _limit(self) -> int | None:
        """The longest sequence that the model has positions for, as its configuration says."""
        config = self._json("config.json")
        config = config.get("text_config") or config
        limit: int | None = config.get("max_position_embeddings") or config.get("n_positions")
        return limit

    def _json(self, name: str) -> dict[str, Any]:
        """What a JSON file holds; nothing where there is none."""
        file = self.directory / name
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ArtifactError(f"Cannot read {file}: {error}.") from error
        return content


class _Graph:
    """One of the models."""

    def __init__(self, path: Path, threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's have no other base
            reason = str(error).splitlines()[0].rstrip(".")
            raise ArtifactError(f"Cannot open {path}: {reason}.", hint="Was it copied completely?") from error
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.caches = {each.name: each for each in self.session.get_inputs() if each.name.startswith(_PAST)}
        self.vocabulary: int = self.session.get_outputs()[self.outputs.index("logits")].shape[-1]

    def empty_cache(self, batch: int, columns: int) -> dict[str, OrtValue]:
        """A cache with room for so many columns."""
        return {
            name: OrtValue.ortvalue_from_numpy(
                _zeros((batch, each.shape[1], columns, each.shape[3]), _TYPES[each.type])
            )
            for name, each in self.caches.items()
        }

    def writes_in_place(self) -> bool:
        """Whether a cache with room comes back as large as it was, its first columns being those of the mask.

        GroupQueryAttention writes so; what puts new columns behind all that are there makes more of them, or fails.
        """
        binding = _Binding(self, self.empty_cache(1, columns=2), in_place=False)
        binding.bind_prompts(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64))
        quiet = onnxruntime.RunOptions()
        quiet.log_severity_level = 4
        try:
            binding.run(quiet)
        except RuntimeError:  # ONNX Runtime's, that sizes do not fit
            return False
        return all(value.shape()[2] == 2 for value in binding.cache.values())


class _Binding:
    """A graph, bound to the cache that it goes on writing.

    Args:
        cache: by the names of the inputs.
        in_place: whether the graph writes to the buffers of the cache; otherwise, every run makes new ones.
        outputs: memory for other outputs; the rest is new memory in every run.
    Attributes:
        cache: as the last run left it.
    """

    def __init__(self, graph: _Graph, cache: dict[str, OrtValue], in_place: bool, **outputs: np.ndarray) -> None:
        self.graph, self.in_place = graph, in_place
        self.binding = graph.session.io_binding()
        self._read(cache)
        memory = {name: OrtValue.ortvalue_from_numpy(array) for name, array in outputs.items()}
        if in_place:
            memory |= {_present(name): value for name, value in cache.items()}
        self.memory = memory  # ONNX Runtime writes there for as long as it is bound
        self.new = [name for name in graph.outputs if name not in memory]
        for name in graph.outputs:  # which is the order of the results
            if name in memory:
                self.binding.bind_ortvalue_output(name, memory[name])
            else:
                self.binding.bind_output(name)

    def _read(self, cache: dict[str, OrtValue]) -> None:
        self.cache = cache
        for name, value in cache.items():
            self.binding.bind_ortvalue_input(name, value)

    def bind(self, **inputs: np.ndarray) -> None:
        """Bind those of these inputs that the graph has; contiguous arrays are read where they are."""
        for name, array in inputs.items():
            if name in self.graph.inputs:
                self.binding.bind_cpu_input(name, np.ascontiguousarray(array))

    def bind_prompts(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        """Bind prompts [B, S] and their mask."""
        positions = (mask.cumsum(axis=1) - 1).clip(min=0)
        self.bind(input_ids=tokens, attention_mask=mask, position_ids=positions, decode_start=mask.sum(axis=1))

    def run(self, options: onnxruntime.RunOptions | None = None) -> dict[str, OrtValue]:
        """The outputs that are new memory."""
        for name in self.new:  # anew each time: earlier ones stay what they were
            self.binding.bind_output(name)
        self.graph.session.run_with_iobinding(self.binding, options)
        if not self.new:
            return {}
        results = dict(zip(self.graph.outputs, self.binding.get_outputs(), strict=True))
        if not self.in_place:
            self._read({name: results[_present(name)] for name in self.cache})
        return {name: results[name] for name in self.new}


def _is_positive(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _checked(prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Prompts as arrays, none of them empty."""
    hint = "Give a list of prompts, each a list of token ids."
    if isinstance(prompts, str):
        raise InvalidInput("prompts are a text.", hint=hint)
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows or not all(row.size for row in rows):
        raise InvalidInput("a prompt is empty.", hint="Give at least one token a sequence.")
    for row in rows:
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise InvalidInput("a prompt is no list of integers.", hint=hint)
        if row.min() < 0:
            raise InvalidInput(f"{row.min()} is no token of the model.", hint="Use its tokenizer.")
    return rows


def _zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that begin where a cache line does, as numpy's do not; attention reads them faster."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def _present(past: str) -> str:
    """The output that replaces an input of the cache."""
    return past.replace(_PAST, _PRESENT)


def _rows(cache: Mapping[str, OrtValue], rows: list[int]) -> dict[str, OrtValue]:
    """The cache of some sequences."""
    return {name: OrtValue.ortvalue_from_numpy(value.numpy()[rows]) for name, value in cache.items()}


def main() -> int:
    """Continue a text from the command line; the exit code is 2 for what cannot be continued."""
    parser = argparse.ArgumentParser(description="Continue a text with an exported model.")
    parser.add_argument("directory")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N")
    arguments = parser.parse_args()
    try:
        print(Runner(arguments.directory, arguments.threads).continue_text(arguments.prompt, arguments.max_new_tokens))
    except SkipstoneError as error:
        print(f"skipstone: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
