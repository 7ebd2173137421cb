"""Kernels in Triton's interpreter, against the reference of their operator.

`tests/test_kernels.py` runs this file in a process of its own: the interpreter is chosen before triton is imported.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.formats import parse
from skipstone.ir.quantized import cache_format, quantized_cached_attention_
from skipstone.kernels.call import Call
from skipstone.kernels.quantized_cached_attention import launches

FORMATS = ("full", "int8_channel", "int4_channel", "int8_token", "fp8_token", "int4_group", "nvfp4", "mxfp4")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
"""Largest error over the largest output."""

STEPS = [[17, 9], [1, 1], [3, 2]]


def buffers(
    form: str, kept: dict[str, int], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> list[list[Tensor]]:
    """Caches of keys and of values: shape is B, KH, C, D."""
    batch, heads, capacity, width = shape
    parts = cache_format(form, **kept).parts(width, dtype)
    return [[torch.zeros(batch, heads, p.rows(capacity), p.width, dtype=p.dtype) for p in parts] for _ in range(2)]


def check(
    form: str,
    steps: list[list[int]] = STEPS,
    *,
    group: int = 2,
    kv_heads: int = 2,
    width: int = 64,
    capacity: int = 40,
    processors: int = 4,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    given: int = 0,
    residual: int = 0,
    first: int = 0,
    sinks: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """Ragged steps through both: the same bytes in the cache, and the same outputs, which are returned.

    A step of `given` tokens is not the kernels' task.
    """
    kept = {"residual": residual, "first": first}
    batch = len(steps[0])
    shape = (batch, kv_heads, capacity, width)
    expected, got = (buffers(form, kept, shape, dtype) for _ in range(2))
    if strided:
        got = [[part.transpose(1, 2).contiguous().transpose(1, 2) for part in half] for half in got]
    extremes = torch.full((kv_heads, width), 3.0)
    static = parse(form).static_from(-extremes, extremes, 1.1)
    options = {"k_format": form, "v_format": form, "scale": width**-0.5, "kind": "causal", **kept, **options}
    start, outputs = torch.zeros(batch, dtype=torch.int64), []
    for counts in steps:
        rows, count = max(counts), torch.tensor(counts)
        q = torch.randn(batch, kv_heads * group, rows, width, dtype=dtype)
        k, v = (torch.randn(batch, kv_heads, rows, width, dtype=dtype) for _ in range(2))
        operands = (start, count, static, static, sinks)
        wanted = quantized_cached_attention_(q, k, v, *expected, *operands, **options)
        if rows == given:  # a prompt that the kernels need not read: the interpreter is slow
            for mine, theirs in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
                mine.copy_(theirs)
            start = start + count
            continue
        out = torch.full_like(wanted, float("nan"))
        call = Call(q, k, v, *got, *operands, **options)
        call.check()
        for launch in launches(call, out, processors):
            launch()
        for row, number in [(row, number) for row, number in enumerate(counts) if number]:
            mine, theirs = (x[row, :, :number].float() for x in (out, wanted))
            assert (mine - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()
        for mine, theirs in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
            assert torch.equal(mine, theirs)
        outputs += [out[row, :, :number] for row, number in enumerate(counts)]
        start = start + count
    return outputs


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_formats(form: str, dtype: torch.dtype) -> None:
    check(form, dtype=dtype)


@pytest.mark.parametrize("form", FORMATS)
def test_windows_caps_and_sinks(form: str) -> None:
    check(form, kind="sliding", window=5, softcap=2.0, sinks=torch.randn(4))


@pytest.mark.parametrize("form", FORMATS[1:])
def test_rows_in_full_precision(form: str) -> None:
    check(form, residual=4, first=2)


@pytest.mark.parametrize(
    ("group", "width"), [(1, 64), (2, 80), (4, 96), (6, 128), (7, 64), (8, 96), (16, 64), (1, 128)]
)
@pytest.mark.parametrize("form", ["int8_token", pytest.param("int4_channel", marks=pytest.mark.slow)])
def test_groups_and_head_sizes(form: str, group: int, width: int) -> None:
    check(form, [[9, 5], [1, 1]], group=group, width=width)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("form", ["int8_token", pytest.param("int4_group", marks=pytest.mark.slow)])
def test_lengths_around_block_edges(form: str, length: int) -> None:
    check(form, [[length, max(1, length - 1)], [1, 1]], capacity=80, kv_heads=1, group=2)


@pytest.mark.parametrize("queries", range(1, 9))
def test_several_queries(queries: int) -> None:
    check("int8_token", [[11, 4], [queries, queries]], kv_heads=1)


@pytest.mark.parametrize("form", ["int8_channel", "int4_group", "nvfp4"])
def test_caches_that_are_not_contiguous(form: str) -> None:
    check(form, strided=True)


@pytest.mark.parametrize("form", ["int8_token", "int4_group", "fp8_token"])
def test_the_number_of_splits_does_not_matter(form: str) -> None:
    """One program for a sequence, or many that are merged."""
    results = []
    for processors in (1, 64):
        torch.manual_seed(1)
        steps = [[300, 70], [1, 1], [2, 1]]
        results.append(check(form, steps, given=300, capacity=320, kv_heads=1, processors=processors))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


def test_nothing_new_and_nothing_there() -> None:
    """A sequence without a new row is left as it is beside one that has some."""
    check("int8_token", [[5, 0], [0, 3], [1, 1]])


@pytest.mark.parametrize("form", ["int8_token", "int4_channel", "int4_group", "nvfp4"])
def test_one_by_one_is_as_in_a_chunk(form: str) -> None:
    whole, single = (buffers(form, {}, (1, 2, 20, 64), torch.float32) for _ in range(2))
    q, k, v = torch.randn(1, 4, 18, 64), torch.randn(1, 2, 18, 64), torch.randn(1, 2, 18, 64)
    static = parse(form).static_from(torch.full((2, 64), -3.0), torch.full((2, 64), 3.0), 1.1)
    for caches, pieces in ((whole, [slice(0, 18)]), (single, [slice(i, i + 1) for i in range(18)])):
        for piece in pieces:
            start = torch.tensor([piece.start])
            parts = (x[:, :, piece] for x in (q, k, v))
            call = Call(*parts, *caches, start, None, static, static, k_format=form, v_format=form, scale=0.1)
            for launch in launches(call, torch.empty(1, 4, piece.stop - piece.start, 64), 4):
                launch()
    for mine, theirs in zip(itertools.chain(*whole), itertools.chain(*single), strict=True):
        assert torch.equal(mine, theirs)


def test_what_has_no_kernel_is_refused() -> None:
    caches = buffers("kivi4", {}, (1, 1, 40, 64), torch.float32)
    q = torch.randn(1, 1, 1, 64)
    start = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(Unsupported, match="kivi4"):
        Call(q, q, q, *caches, start, k_format="kivi4", v_format="kivi4").check()
    caches = buffers("full", {}, (1, 1, 40, 64), torch.float32)
    with pytest.raises(Unsupported, match="of kind 'bidirectional'"):
        Call(q, q, q, *caches, start, kind="bidirectional").check()
    with pytest.raises(Unsupported, match="float64"):
        Call(q.double(), q.double(), q.double(), *caches, start).check()
    caches = buffers("int8_channel", {}, (1, 1, 40, 64), torch.float32)
    with pytest.raises(InvalidInput, match="float32"):
        static = torch.ones(1, 64, dtype=torch.float64)
        Call(q, q, q, *caches, start, None, static, static, k_format="int8_channel", v_format="int8_channel").check()
