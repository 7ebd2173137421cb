"""The dialect operator `quantized_cached_attention`, against attention written out over the rows one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone.ir.dialect import attend, key_bias_products, visible
from skipstone.ir.formats import parse
from skipstone.ir.quantized import (
    TILE,
    cache_format,
    quantized_cached_attention,
    quantized_cached_attention_,
)

FORMATS = (
    "full",
    "int8_channel",
    "int4_channel",
    "int8_token",
    "fp8_token",
    "int4_group:16",
    "kivi4:8",
    "nvfp4",
    "mxfp4",
)
GROUPS = (1, 2, 4, 6, 7, 8, 16)
WIDTHS = (64, 80, 96, 128, 192, 256)


def static_of(name: str, x: Tensor) -> Tensor | None:
    rows = x.transpose(1, 2).flatten(0, 1)
    return parse(name).static_from(rows.amin(0).float(), rows.amax(0).float(), 1.1)


class Sequences:
    """A batch of sequences, and their cache in some format.

    Attributes:
        q, k, v: [B, heads, T, D] of all tokens that will ever be appended.
    """

    def __init__(
        self, form: str, batch: int = 2, kv_heads: int = 2, group: int = 2, width: int = 32, tokens: int = 40,
        capacity: int = 48, residual: int = 0, first: int = 0,
    ) -> None:  # fmt: skip
        self.form, self.kept = form, {"residual": residual, "first": first}
        self.q = torch.randn(batch, kv_heads * group, tokens, width, dtype=torch.float64)
        self.k, self.v = (torch.randn(batch, kv_heads, tokens, width, dtype=torch.float64) for _ in range(2))
        self.statics = [static_of(form, x) for x in (self.k, self.v)]
        parts = cache_format(form, **self.kept).parts(width, torch.float64)
        shapes = [(batch, kv_heads, part.rows(capacity), part.width) for part in parts]
        self.caches = [
            [torch.zeros(shape, dtype=part.dtype) for shape, part in zip(shapes, parts, strict=True)] for _ in range(2)
        ]
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def append(self, counts: list[int], **options: Any) -> Tensor:
        """The next tokens of every sequence, right-padded with garbage: the output [B, N, S, D]."""
        rows, count = max(counts), torch.tensor(counts)
        places = (self.lengths[:, None] + torch.arange(rows)).clamp(max=self.q.shape[2] - 1)
        q, k, v = (x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in self.all)
        padding = (torch.arange(rows) >= count[:, None])[:, None, :, None]
        k, v = (torch.where(padding, 1e3, x) for x in (k, v))
        options = {"scale": 0.3, "kind": "causal", **options}
        tensors = [options.pop(name, None) for name in ("sinks", "key_bias", "frequencies")]
        out, *new = quantized_cached_attention(
            q, k, v, *self.caches, self.lengths, count, *self.statics, *tensors, k_format=self.form, v_format=self.form,
            **self.kept, **options,
        )  # fmt: skip
        half = len(self.caches[0])
        self.caches = [new[:half], new[half:]]
        self.lengths = self.lengths + count
        return out

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def row(self, sequence: int, position: int, **options: Any) -> Tensor:
        """The output [N, D] of one query, from nothing but its own keys and values."""
        form, length = parse(self.form), position + 1
        options = {"scale": 0.3, "kind": "causal", "window": 0, "softcap": 0.0, "first_position": 0, **options}
        read = []
        for x, static in zip((self.k, self.v), self.statics, strict=True):
            x = x[sequence : sequence + 1, :, :length].clone()
            quantized = max(0, (length - self.kept["residual"]) // form.group_tokens * form.group_tokens)
            first = min(self.kept["first"], length)
            if quantized > first and self.form != "full":
                coded = form.decode(form.encode(x[:, :, :quantized], static), static, x.dtype, x.shape[3])
                x[:, :, first:quantized] = coded[:, :, first:]
            read.append(x)
        q = self.q[sequence : sequence + 1, :, position : position + 1]
        allowed = visible(options["kind"], options["window"], torch.tensor(position), torch.arange(length))
        constant = key_bias_products(
            q, options.get("key_bias"), options.get("frequencies"), length, options["first_position"]
        )
        sinks = options.get("sinks")
        return attend(q, *read, allowed, None, sinks, options["scale"], options["softcap"], constant)[0, :, 0]


def check(sequences: Sequences, steps: list[list[int]], **options: Any) -> None:
    for counts in steps:
        before = sequences.lengths.tolist()
        out = sequences.append(counts, **options)
        for sequence, count in enumerate(counts):
            for i in range(count):
                expected = sequences.row(sequence, before[sequence] + i, **options)
                torch.testing.assert_close(out[sequence, :, i], expected, rtol=1e-9, atol=1e-9)


STEPS = [[7, 3], [1, 1], [1, 9], [5, 2], [1, 1], [17, 16], [1, 1]]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kept", [{}, {"residual": 5}, {"first": 3}, {"residual": 9, "first": 2}], ids=str)
def test_ragged_batches(form: str, kept: dict[str, int]) -> None:
    """Different numbers of new tokens a sequence, whose padding is never written."""
    check(Sequences(form, **kept), STEPS)


@pytest.mark.parametrize(("group", "width"), [*zip(GROUPS, itertools.cycle(WIDTHS), strict=False)])
@pytest.mark.parametrize("form", ["int8_channel", "int4_group:16", "kivi4:8"])
def test_groups_and_head_sizes(form: str, group: int, width: int) -> None:
    check(Sequences(form, group=group, width=width, tokens=12, capacity=13), [[9, 4], [1, 1], [1, 1]])


ATTENTION: list[dict[str, Any]] = [
    {"kind": "sliding", "window": 6},
    {"kind": "chunked", "window": 8},
    {"softcap": 2.0},
    {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    {
        "key_bias": torch.arange(128, dtype=torch.float64).reshape(2, 2, 32).sin() * 20,
        "frequencies": torch.cat([torch.logspace(0, -3, 16)] * 2), "first_position": 2,
    },
]  # fmt: skip


@pytest.mark.parametrize("form", ["int8_token", "kivi4:8"])
@pytest.mark.parametrize("options", ATTENTION, ids=lambda options: "-".join(options))
def test_kinds_of_attention(form: str, options: dict[str, Any]) -> None:
    check(Sequences(form, residual=4), STEPS, **options)


@pytest.mark.parametrize("form", ["int8_channel", "kivi4:24"])
@pytest.mark.parametrize("length", [TILE - 1, TILE, TILE + 1, 2 * TILE])
def test_lengths_around_tiles(form: str, length: int) -> None:
    """The cache is read tile by tile; the last query sees both sides of every seam."""
    sequences = Sequences(form, batch=1, kv_heads=1, group=1, width=16, tokens=length + 2, capacity=2 * TILE + 7)
    sequences.append([length])
    out = sequences.append([2])
    for i in range(2):
        torch.testing.assert_close(out[0, :, i], sequences.row(0, length + i), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMATS)
def test_a_cache_that_is_not_contiguous(form: str) -> None:
    sequences, strided = (Sequences(form, residual=3) for _ in range(2))
    strided.q, strided.k, strided.v, strided.statics = *sequences.all, sequences.statics
    for half in strided.caches:
        half[:] = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in half]
    for counts in STEPS[:4]:
        torch.testing.assert_close(strided.append(counts), sequences.append(counts), rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(itertools.chain(*sequences.caches), itertools.chain(*strided.caches), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("form", FORMATS)
def test_the_mutating_twin_does_the_same(form: str) -> None:
    one, other = Sequences(form, residual=4, first=1), Sequences(form, residual=4, first=1)
    other.q, other.k, other.v, other.statics = *one.all, one.statics
    out = one.append([9, 9])
    operands = (x[:, :, :9] for x in other.all)
    got = quantized_cached_attention_(
        *operands, *other.caches, other.lengths, None, *other.statics, k_format=form, v_format=form, **other.kept,
        scale=0.3, kind="causal",
    )  # fmt: skip
    assert torch.equal(got, out)
    for mine, theirs in zip(itertools.chain(*one.caches), itertools.chain(*other.caches), strict=True):
        assert torch.equal(mine, theirs)


def test_nothing_is_encoded_twice() -> None:
    """Codes that are there stay as they are, whatever follows."""
    sequences = Sequences("int4_group:16")
    sequences.append([20, 20])
    before = [part[:, :, :20].clone() for half in sequences.caches for part in half]
    sequences.append([20, 20])
    after = [part[:, :, :20] for half in sequences.caches for part in half]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(before, after, strict=True))


def test_the_operators_follow_their_schemas() -> None:
    sequences = Sequences("int8_token", tokens=4, capacity=4, residual=2)
    operands = (*sequences.all, *sequences.caches, sequences.lengths)
    options = {"k_format": "int8_token", "v_format": "int8_token", "residual": 2, "scale": 0.3, "kind": "causal"}
    for each in (quantized_cached_attention, quantized_cached_attention_):
        torch.library.opcheck(each, operands, options, test_utils=("test_schema", "test_faketensor"))


def test_non_finite_values_stay_visible() -> None:
    """A key that is NaN or infinite does what its format's definition says, in the rows that see it and in no other."""
    sequences = Sequences("int8_token", batch=1, tokens=6)
    sequences.k[0, :, 3, 5] = float("nan")
    out = sequences.append([6])
    assert torch.isfinite(out[:, :, :3]).all() and torch.isnan(out[:, :, 3:]).all()
    sequences = Sequences("int8_channel", batch=1, tokens=6)
    sequences.k[0, :, 3, 5] = float("inf")
    sequences.append([6])
    assert (sequences.caches[0][0][0, :, 3, 5] == 127).all()
