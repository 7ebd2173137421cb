"""Kernels in Triton's interpreter, against the reference of their operator.

`tests/test_kernels.py` runs this file in a process of its own: the interpreter is chosen before triton is imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.formats import parse
from skipstone.kernels.call import Call
from skipstone.kernels.predicated_linear import linear_launch
from skipstone.kernels.quantized_cached_attention import launches
from tests import kernel_cases, predicated_cases
from tests.kernel_cases import FORMATS, GROUPS_AND_WIDTHS, LENGTHS, buffers


def interpret(q: Tensor, *operands: Any, processors: int = 4, **options: Any) -> Tensor:
    """What is launched on a device with so many processors."""
    call = Call(q, *operands, **options)
    call.check()
    out = torch.full((*q.shape[:3], call.v.shape[-1]), float("nan"), dtype=q.dtype)
    for launch in launches(call, out, processors):
        launch()
    return out


check = partial(kernel_cases.check, interpret)

DEFAULT = ("full", "int8_channel")
SOME_FORMATS = [form if form in DEFAULT else pytest.param(form, marks=pytest.mark.slow) for form in FORMATS]
"""All formats, those that take long behind the marker."""


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_formats(form: str, dtype: torch.dtype) -> None:
    check(form, dtype=dtype)


@pytest.mark.parametrize("form", SOME_FORMATS)
def test_windows_caps_and_sinks(form: str) -> None:
    check(form, kind="sliding", window=5, softcap=2.0, sinks=torch.randn(4))


@pytest.mark.parametrize("form", SOME_FORMATS[1:])
def test_rows_in_full_precision(form: str) -> None:
    check(form, residual=4, first=2)


@pytest.mark.parametrize(
    ("group", "width"),
    [
        pair if pair in ((2, 80), (6, 128), (7, 64), (16, 64)) else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in GROUPS_AND_WIDTHS
    ],
)
@pytest.mark.parametrize("form", ["int8_token", pytest.param("int4_channel", marks=pytest.mark.slow)])
def test_groups_and_head_sizes(form: str, group: int, width: int) -> None:
    check(form, [[9, 5], [1, 1]], group=group, width=width)


@pytest.mark.parametrize(("form", "width"), [("int8_token", 65), ("fp8_token", 65), ("int4_channel", 66)])
def test_rows_of_an_odd_number_of_bytes(form: str, width: int) -> None:
    """Nothing wider than a byte can be read from them."""
    check(form, [[9, 5], [1, 1]], width=width, kv_heads=1)


@pytest.mark.parametrize(
    "length",
    [pytest.param(length, marks=pytest.mark.slow) if length in (15, 31, 33, 63) else length for length in LENGTHS],
)
@pytest.mark.parametrize("form", ["int8_token", pytest.param("int4_group", marks=pytest.mark.slow)])
def test_lengths_around_block_edges(form: str, length: int) -> None:
    check(form, [[length, max(1, length - 1)], [1, 1]], capacity=80, kv_heads=1, group=2)


@pytest.mark.parametrize(
    "length", [64, 128, 383, *(pytest.param(length, marks=pytest.mark.slow) for length in (63, 127))]
)
@pytest.mark.parametrize(
    "form", ["int8_token", *(pytest.param(form, marks=pytest.mark.slow) for form in ("full", "fp8_token"))]
)
def test_lengths_around_edges_of_wide_tiles(form: str, length: int) -> None:
    """Single tokens in half precision, where tiles are the largest and several programs share the keys."""
    steps = [[length, length // 3], [1, 1]]
    check(form, steps, given=length, capacity=600, kv_heads=1, group=5, width=32, dtype=torch.float16)


@pytest.mark.parametrize(
    "queries", [1, 3, *(pytest.param(queries, marks=pytest.mark.slow) for queries in (2, 4, 5, 6, 7, 8))]
)
def test_several_queries(queries: int) -> None:
    check("int8_token", [[11, 4], [queries, queries]], kv_heads=1)


@pytest.mark.parametrize(
    "form", ["int8_channel", *(pytest.param(form, marks=pytest.mark.slow) for form in ("int4_group", "nvfp4"))]
)
def test_caches_that_are_not_contiguous(form: str) -> None:
    check(form, strided=True)


@pytest.mark.parametrize(
    "form", ["int8_token", *(pytest.param(form, marks=pytest.mark.slow) for form in ("int4_group", "fp8_token"))]
)
def test_the_number_of_splits_does_not_matter(form: str) -> None:
    """One program for a sequence, or many that are merged."""
    results = []
    for processors in (1, 64):
        torch.manual_seed(1)
        steps = [[300, 70], [1, 1], [2, 1]]
        run = partial(interpret, processors=processors)
        results.append(kernel_cases.check(run, form, steps, given=300, capacity=320, kv_heads=1))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


def test_nothing_new_and_nothing_there() -> None:
    """A sequence without a new row is left as it is beside one that has some."""
    check("int8_token", [[5, 0], [0, 3], [1, 1]])


@pytest.mark.parametrize(
    "form",
    [
        "int8_token",
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("int4_group", "int4_channel", "nvfp4")),
    ],
)
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
    with pytest.raises(Unsupported, match=r"key bias .* Quantize with condition=False"):
        Call(q, q, q, *caches, start, key_bias=torch.zeros(2, 1, 64)).check()
    with pytest.raises(Unsupported, match=r"sm_75.* sm_80 or later"):
        Call(q, q, q, *caches, start, arch=75).check()
    caches = buffers("int8_channel", {}, (1, 1, 40, 64), torch.float32)
    with pytest.raises(InvalidInput, match="float32"):
        static = torch.ones(1, 64, dtype=torch.float64)
        Call(q, q, q, *caches, start, None, static, static, k_format="int8_channel", v_format="int8_channel").check()


# predicated_linear


def obey(
    x: Tensor, weight: Tensor, skip: Tensor, bias: Tensor | None = None, arch: int = 80, processors: int = 4
) -> Tensor:
    """What is launched on a device of this generation with so many processors."""
    out = torch.full((*x.shape[:2], weight.shape[0]), float("nan"), dtype=x.dtype)
    linear_launch(x, weight, skip, bias, out, arch, processors)()
    return out


@pytest.mark.parametrize(
    "who",
    [
        who if who in ("some", "all") else pytest.param(who, marks=pytest.mark.slow)
        for who in predicated_cases.DECISIONS
    ],
)
@pytest.mark.parametrize("shape", predicated_cases.SHAPES, ids=str)
def test_rows_that_skip_are_zeros_and_others_are_exact(shape: tuple[int, int, int, int], who: str) -> None:
    predicated_cases.check(obey, shape, who)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", [(3, 1, 48, 80), (1, 130, 64, 144), (1, 130, 63, 20)], ids=str)
def test_half_precision(shape: tuple[int, int, int, int], arch: int) -> None:
    predicated_cases.check(partial(obey, arch=arch), shape, dtype=torch.float16)


@pytest.mark.parametrize("options", [{"transposed": True}, {"strided": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 40, 72), (1, 40, 70, 96)], ids=str)
def test_weights_with_any_strides(shape: tuple[int, int, int, int], options: dict[str, bool]) -> None:
    predicated_cases.check(obey, shape, **options)


@pytest.mark.parametrize("processors", [1, 2, 132])
def test_tiles_of_any_width_give_the_same(processors: int) -> None:
    predicated_cases.check(partial(obey, processors=processors), (1, 3, 80, 250))


@contextmanager
def watched() -> Iterator[list[Any]]:
    """The addresses that kernels load from meanwhile, in arrays."""
    addresses: list[Any] = []
    original = InterpreterBuilder.create_masked_load

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses.append(pointers.data[mask.data])
        return original(self, pointers, mask, *rest)

    with patch.object(InterpreterBuilder, "create_masked_load", load):
        yield addresses


def read(addresses: list[Any], *tensors: Tensor) -> list[int]:
    """How many elements of each tensor were loaded, each counted once, and how many of none of them."""
    rest = {int(address) for each in addresses for address in each.flatten()}
    counts = []
    for x in tensors:
        inside = {address for address in rest if x.data_ptr() <= address < x.data_ptr() + x.nbytes}
        rest -= inside
        counts.append(len(inside))
    return [*counts, len(rest)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_is_read_where_every_row_skips(dtype: torch.dtype) -> None:
    """Neither the weight, the bias nor x; what they hold, not even NaN, makes no difference."""
    x, weight, bias = (torch.full(shape, float("nan"), dtype=dtype) for shape in ((3, 2, 40), (72, 40), (72,)))
    skip = torch.ones(3, 2, dtype=torch.bool)
    with watched() as addresses:
        out = obey(x, weight, skip, bias)
    assert torch.equal(out, torch.zeros(3, 2, 72, dtype=dtype))
    assert read(addresses, x, weight, bias, skip) == [0, 0, 0, 6, 0]
    skip[1, 1] = False
    with watched() as addresses:
        assert obey(x, weight, skip, bias)[1, 1].isnan().all()
    assert read(addresses, x, weight, bias, skip) == [40, 72 * 40, 72, 6, 0]


def test_tiles_of_a_prompt_read_only_the_rows_that_do_not_skip() -> None:
    x, weight, skip = torch.randn(1, 150, 24), torch.randn(8, 24), torch.ones(1, 150, dtype=torch.bool)
    skip[0, 70:72] = False
    with watched() as addresses:
        obey(x, weight, skip)
    assert read(addresses, x, weight, skip) == [2 * 24, 8 * 24, 150, 0]


def test_linear_layers_without_a_kernel_are_refused() -> None:
    x, skip = torch.randn(1, 1, 8), torch.zeros(1, 1, dtype=torch.bool)
    weight = torch.randn(4, 8)
    with pytest.raises(Unsupported, match="float64"):
        obey(x.double(), weight.double(), skip)
    with pytest.raises(Unsupported, match=r"sm_75.* sm_80 or later"):
        obey(x, weight, skip, arch=75)
    with pytest.raises(Unsupported, match=r"a weight \(4, 8\) with strides \(16777216, 1\)"):
        obey(x, torch.empty_strided((4, 8), (2**24, 1), device="meta"), skip)
