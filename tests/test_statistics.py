"""Statistics of keys and values: of parts and of the whole, and what is refused."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipstone.calibrate import Batch, measure, token_batches, tokenize
from skipstone.ir.errors import InvalidInput
from skipstone.ir.statistics import ChannelStatistics, calibrated, sites
from tests import models


def rows(seed: int, tokens: int = 7, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, tokens, 4, generator=generator) * (1 + seed % 5)


def assert_equal(one: ChannelStatistics, other: ChannelStatistics) -> None:
    assert torch.equal(one.minimum, other.minimum) and torch.equal(one.maximum, other.maximum)
    torch.testing.assert_close(one.total, other.total, rtol=1e-12, atol=1e-12)
    assert one.count == other.count


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.randoms())
def test_parts_merge_to_the_whole_in_any_order_and_grouping(seeds: list[int], random) -> None:
    parts = [rows(seed) for seed in seeds]
    whole = ChannelStatistics.of(torch.cat(parts, dim=2))
    found = [ChannelStatistics.of(part) for part in parts]
    random.shuffle(found)
    assert_equal(reduce(ChannelStatistics.merge, found), whole)
    assert_equal(reduce(lambda right, left: left.merge(right), found), whole)


def test_they_are_the_extremes_and_the_mean_of_each_channel() -> None:
    x = rows(3)
    tensors = ChannelStatistics.of(x).tensors()
    flat = x.transpose(1, 2).reshape(-1, 3, 4)
    assert torch.equal(tensors["minimum"], flat.amin(0)) and torch.equal(tensors["maximum"], flat.amax(0))
    torch.testing.assert_close(tensors["mean"], flat.mean(0))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_padding_does_not_count() -> None:
    x = rows(1)
    valid = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    garbage = x.masked_fill(~valid[:, None, :, None], float("nan"))
    alone = ChannelStatistics.of(x[:1, :, :4]).merge(ChannelStatistics.of(x[1:]))
    assert_equal(ChannelStatistics.of(garbage, valid), alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    x = rows(0)
    x[1, 2, 3, 0] = value
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        ChannelStatistics.of(x)


def test_statistics_of_nothing_or_of_other_shapes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no token"):
        ChannelStatistics.of(rows(0)[:, :, :0])
    with pytest.raises(InvalidInput, match="do not merge"):
        ChannelStatistics.of(rows(0)).merge(ChannelStatistics.of(rows(0)[:, :2]))


def test_measuring_in_batches_is_measuring_at_once() -> None:
    """Ragged batches, split or not, give the same numbers; those of one layer are its own keys and values."""
    program = models.program("llama")
    long, short = models.tokens(2, 11), models.tokens(1, 6, seed=1)
    mask = torch.ones(1, 9)
    mask[0, :3] = 0
    padded = {"input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], dim=1), "attention_mask": mask}
    split = measure(program, token_batches([long[:1], padded, long[1:]], program.source), "quantize_kv")
    joint = measure(program, token_batches([long, short[0]], program.source), "quantize_kv")
    assert split.keys() == joint.keys()
    assert {name.split("/")[1] for name in split} == set(sites(program).values())
    for name, tensor in split.items():
        torch.testing.assert_close(tensor, joint[name], rtol=1e-5, atol=1e-5)
    first, last = (joint[f"quantize_kv/model.layers.{layer}.self_attn/key/mean"] for layer in (0, 2))
    assert not torch.allclose(first, last, atol=1e-2)


def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
    assert not verbose  # texts may be longer than any window
    return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("abc", tokenizer), "expected a list of texts"),
        (([b"abc"], tokenizer), "expected a list of texts"),
        ((["abc"], "gpt2"), "the tokenizer is str. Load it with"),
        ((["abc"], tokenizer, 0), "length is 0"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        tokenize(*arguments)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (7, "calibration data is int. Give a list"),
        ([{"input_ids": torch.ones(1, 2, dtype=torch.int64), "attention_mask": [[1, 1]]}], "attention_mask is list"),
    ],
)
def test_what_is_no_calibration_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        token_batches(data, models.program("llama").source)


def test_texts_become_windows() -> None:
    batches = tokenize(["abcde", "", "fg"], tokenizer, length=3)
    assert [batch.tolist() for batch in batches] == [[[97, 98, 99]], [[100, 101]], [[102, 103]]]
    with pytest.raises(InvalidInput, match="no tokens"):
        tokenize(["", ""], tokenizer)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, "no calibrated mean of the keys at a"),
        (torch.zeros(3, 2), r"shape \[3, 2\], the model needs \[2, 3\]"),
        (torch.full((2, 3), float("nan")), "NaN"),
    ],
)
def test_calibrated_tensors_that_cannot_be_are_refused(tensor: Tensor | None, message: str) -> None:
    program = models.program("llama").copy()
    program.calibration = {} if tensor is None else {"quantize_kv/a/key/mean": tensor}
    with pytest.raises(InvalidInput, match=message):
        calibrated(program, "quantize_kv", "a", "key", "mean", (2, 3))


def test_a_batch_without_a_valid_token_is_refused() -> None:
    program = models.program("llama")
    nothing = Batch(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(InvalidInput, match=r"keys at model\.layers\.0\.self_attn: there is no token"):
        measure(program, [nothing], "quantize_kv")
