"""Running exported directories as loaders do that know nothing of skipstone: by the names of inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import PreTrainedModel

from tests.tiny_models import FIRST_WORD, VOCABULARY

TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
PADDINGS = {
    "alone": [0],
    "none": [0, 0, 0],
    "left": [0, 4, 2],
    "right": [0, -4, -2],
}
"""Columns of padding in prompts of `PROMPT` tokens, to the left, or to the right where negative."""

PROMPT, STEPS, CHUNK = 9, 4, 3


class Loader:
    """Feeds a decoder as optimum does: growing caches, a mask of all columns, positions that count real tokens."""

    def __init__(self, directory: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(directory / "model.onnx"), options)
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]

    def step(self, tokens: np.ndarray, mask: np.ndarray, past: dict, **others: np.ndarray) -> tuple[np.ndarray, dict]:
        positions = (mask.cumsum(1) - 1).clip(0)[:, -tokens.shape[1] :]
        values = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **past, **others}
        results = dict(
            zip(self.outputs, self.session.run(None, {name: values[name] for name in self.inputs}), strict=True)
        )
        logits = results.pop("logits")
        return logits, {name.replace("present.", "past_key_values."): each for name, each in results.items()}

    def empty(self, batch: int, capacity: int = 0) -> dict[str, np.ndarray]:
        return {
            name: np.zeros((batch, each.shape[1], capacity, each.shape[3]), TYPES[each.type])
            for name, each in self.inputs.items()
            if name.startswith("past")
        }

    def stepwise(self, tokens: np.ndarray, mask: np.ndarray, **others: np.ndarray) -> np.ndarray:
        """Logits [B, T, V]: the prompt at once, then token by token, then several at once."""
        widths = [PROMPT, *[1] * STEPS, CHUNK]
        past, parts, stop = self.empty(len(tokens)), [], 0
        for width in widths:
            start, stop = stop, stop + width
            logits, past = self.step(tokens[:, start:stop], mask[:, :stop], past, **others)
            parts.append(logits)
        return np.concatenate(parts, axis=1)


def batch(padding: list[int], vocabulary: int = VOCABULARY) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] and their mask; what is hidden is a token like any other."""
    rng = np.random.default_rng(len(padding))
    tokens = rng.integers(FIRST_WORD, vocabulary, (len(padding), PROMPT + STEPS + CHUNK))
    mask = np.ones_like(tokens)
    for row, columns in enumerate(padding):
        mask[row, slice(columns) if columns >= 0 else slice(PROMPT + columns, PROMPT)] = 0
    return tokens, mask


def original_logits(model: PreTrainedModel, ids: np.ndarray, mask: np.ndarray, first: int = 0) -> np.ndarray:
    """Logits of all columns at once, by Hugging Face's own code, which calls the first position `first`."""
    with torch.no_grad():
        positions = torch.tensor((mask.cumsum(1) - 1).clip(0)) + first
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions).logits.numpy()


def assert_close(got: np.ndarray, expected: np.ndarray, mask: np.ndarray, tolerance: float = 1e-4) -> None:
    """Equal where the mask says so, within a share of the range; and finite everywhere."""
    assert np.isfinite(got).all()
    real = mask != 0
    assert np.abs(got - expected)[real].max() <= tolerance * np.ptp(expected[real])


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the branches in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)
