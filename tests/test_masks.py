"""Mask kinds are read from mask functions by evaluating them, past any window."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils as hf

from skipstone.ir.capture.masks import classify
from skipstone.ir.dialect import Kind, visible

ZERO = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("window", [1, 2, 8, 64])
def test_a_small_window_is_found_without_being_told(window: int) -> None:
    assert classify(hf.sliding_window_causal_mask_function(window), None) == (Kind.SLIDING, window)


@pytest.mark.parametrize("window", [128, 4096])
def test_a_large_window_is_not_taken_for_none(window: int) -> None:
    assert classify(hf.sliding_window_causal_mask_function(window), window) == (Kind.SLIDING, window)


@pytest.mark.parametrize("size", [8, 8192])
def test_chunks(size: int) -> None:
    assert classify(hf.chunked_causal_mask_function(size, ZERO), size) == (Kind.CHUNKED, size)


def test_causal_and_bidirectional() -> None:
    assert classify(hf.causal_mask_function, None) == (Kind.CAUSAL, 0)
    assert classify(hf.bidirectional_mask_function, None) == (Kind.BIDIRECTIONAL, 0)
    assert classify(hf.sliding_window_bidirectional_mask_function(5), 5) == (Kind.BIDIRECTIONAL, 5)


def test_a_mask_that_reads_data_is_explicit() -> None:
    groups = torch.tensor([[0, 0, 1, 1]])
    function = hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(groups))
    assert classify(function, None)[0] is Kind.EXPLICIT


def test_an_unknown_pattern_is_explicit() -> None:
    assert classify(lambda b, h, q, k: (q + k) % 3 == 0, None)[0] is Kind.EXPLICIT


@pytest.mark.parametrize(("kind", "window"), [("causal", 0), ("sliding", 3), ("chunked", 4), ("block_causal", 4)])
def test_patterns_match_their_definition(kind: str, window: int) -> None:
    rule = {
        "causal": lambda i, j: j <= i,
        "sliding": lambda i, j: i - window < j <= i,
        "chunked": lambda i, j: j <= i and i // window == j // window,
        "block_causal": lambda i, j: j // window <= i // window,
    }[kind]
    size = 13
    pattern = visible(kind, window, torch.arange(size)[:, None], torch.arange(size)[None, :])
    assert pattern is not None
    assert pattern.tolist() == [[rule(i, j) for j in range(size)] for i in range(size)]
