"""Generating with onnxruntime-genai, which is no dependency: tests that use this skip where it is missing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny_models import FIRST_WORD, PAD, VOCABULARY

NEW = 24


def generated(genai: Any, directory: Path, prompts: np.ndarray, new: int = NEW) -> list[list[int]]:
    """The tokens of each sequence behind prompts [B, S].

    All of one length: onnxruntime-genai 0.18 gives the model a mask of ones, whatever pads a prompt.
    """
    model = genai.Model(str(directory))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=prompts.shape[1] + new, batch_size=len(prompts), do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompts.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[prompts.shape[1] :].tolist() for row in range(len(prompts))]


def with_end(model: Any) -> Any:
    """The model with the last word as the token that ends a sequence."""
    model.generation_config.eos_token_id = VOCABULARY - 1
    return model


def assert_same_tokens(genai: Any, model: Any, directory: Path) -> None:
    """Greedy decoding of one prompt and of several, as `model.generate` does it."""
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        prompts = rng.integers(FIRST_WORD, VOCABULARY - 1, (batch, 9))
        ids = torch.tensor(prompts)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
        expected = model.generate(ids, **options)[:, prompts.shape[1] :].tolist()
        assert list(map(words, generated(genai, directory, prompts))) == list(map(words, expected))


def words(tokens: list[int]) -> list[int]:
    """Tokens until the end token, or that of padding, at which onnxruntime-genai may end a sequence, too."""
    return list(itertools.takewhile(lambda token: token not in (PAD, VOCABULARY - 1), tokens))
