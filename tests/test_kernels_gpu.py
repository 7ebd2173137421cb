"""The operators on a GPU, as executables call them, against their references on the CPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.predicated import predicated_linear
from skipstone.ir.quantized import quantized_cached_attention_, quantized_cached_attention_reference
from tests import kernel_cases, predicated_cases
from tests.kernel_cases import FORMATS, GROUPS_AND_WIDTHS, LENGTHS, buffers

# Importing them registers the kernels.
pytest.importorskip("skipstone.kernels.quantized_cached_attention", reason="needs triton")
pytest.importorskip("skipstone.kernels.predicated_linear", reason="needs triton")
pytestmark = pytest.mark.gpu

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

check = partial(kernel_cases.check, quantized_cached_attention_, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str, dtype: torch.dtype) -> None:
    check(form, dtype=dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("sliding", torch.float16), ("chunked", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_windows_caps_and_sinks(form: str, kind: str, dtype: torch.dtype) -> None:
    check(form, kind=kind, window=5, softcap=2.0, sinks=torch.randn(4), dtype=dtype)


@HALVES
@pytest.mark.parametrize("form", FORMATS[1:])
def test_rows_in_full_precision(form: str, dtype: torch.dtype) -> None:
    check(form, residual=4, first=2, dtype=dtype)


@pytest.mark.parametrize(("group", "width"), [*GROUPS_AND_WIDTHS, (4, 128), (4, 192), (4, 256)])
@pytest.mark.parametrize("form", ["int8_token", "int4_channel"])
def test_groups_and_head_sizes(form: str, group: int, width: int) -> None:
    check(form, [[9, 5], [1, 1]], group=group, width=width, dtype=torch.bfloat16)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["int8_token", "int4_group"])
def test_lengths_around_block_edges(form: str, length: int) -> None:
    check(form, [[length, max(1, length - 1)], [1, 1]], capacity=80, dtype=torch.bfloat16)


@pytest.mark.parametrize("queries", range(1, 9))
@pytest.mark.parametrize("form", ["int8_token", "nvfp4"])
def test_several_queries(form: str, queries: int) -> None:
    check(form, [[11, 4], [queries, queries]], dtype=torch.bfloat16)


@pytest.mark.parametrize("form", FORMATS)
def test_caches_that_are_not_contiguous(form: str) -> None:
    check(form, strided=True, dtype=torch.bfloat16)


def test_nothing_new_and_nothing_there() -> None:
    check("int8_token", [[5, 0], [0, 3], [1, 1]], dtype=torch.bfloat16)


@HALVES
@pytest.mark.parametrize("form", FORMATS)
def test_a_long_past_that_many_programs_share(form: str, dtype: torch.dtype) -> None:
    check(form, [[1500, 400], [1, 1], [5, 2]], given=1500, capacity=2048, group=4, width=128, dtype=dtype)


@HALVES
@pytest.mark.parametrize("form", FORMATS)
def test_a_prompt_over_a_past(form: str, dtype: torch.dtype) -> None:
    """So many queries and heads that no keys are split: that is the other kernel."""
    steps = [[600, 250], [300, 170]]
    check(form, steps, given=600, capacity=1000, group=4, kv_heads=8, width=128, dtype=dtype)


@pytest.mark.parametrize("form", FORMATS)
def test_a_prompt_over_a_past_with_all_options(form: str) -> None:
    check(
        form, [[600, 250], [300, 170]], given=600, capacity=1000, group=4, kv_heads=8, residual=64, first=4,
        kind="sliding", window=200, softcap=5.0, sinks=torch.randn(32), dtype=torch.bfloat16,
    )  # fmt: skip


class Replayed:
    """The operator in a CUDA graph: captured at the first call, and replayed with the operands of every call."""

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Sequence[Tensor], v_cache: Sequence[Tensor],
        *others: Tensor | None, **options: Any,
    ) -> Tensor:  # fmt: skip
        operands = (q, k, v, *others)
        if self.graph is None:
            # The caches are those of every call, everything else is copied to where the graph reads it.
            self.operands = [None if x is None else x.clone() for x in operands]
            call = partial(
                quantized_cached_attention_, *self.operands[:3], k_cache, v_cache, *self.operands[3:], **options
            )
            call()  # compiles; to write the same rows again changes nothing
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = call()
        for mine, new in zip(self.operands, operands, strict=True):
            if mine is not None and new is not None:
                mine.copy_(new)
        self.graph.replay()
        return self.out


@pytest.mark.parametrize(("residual", "first"), [(0, 0), (16, 2)])
@pytest.mark.parametrize("form", FORMATS)
def test_a_cuda_graph_is_right_for_other_lengths(form: str, residual: int, first: int) -> None:
    """Between replays the sequences grow by hundreds of tokens, and the shares of the programs with them."""
    steps = [[1, 0], [400, 30], [1, 1], [400, 399], [1, 0], [400, 1], [1, 1]]
    kernel_cases.check(
        Replayed(), form, steps, device="cuda", given=400, capacity=2048, group=4, width=128, residual=residual,
        first=first, dtype=torch.bfloat16,
    )  # fmt: skip


def unwaiting(*operands: Any, **options: Any) -> Tensor:
    """The operator, where an error is raised if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return quantized_cached_attention_(*operands, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMATS)
def test_the_host_does_not_wait(form: str) -> None:
    kernel_cases.check(unwaiting, form, device="cuda", residual=4, dtype=torch.bfloat16)


def reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Sequence[Tensor], v_cache: Sequence[Tensor], *others: Any, **options: Any
) -> Tensor:
    """The reference on the device of its operands, in place."""
    out, keys, values = quantized_cached_attention_reference(q, k, v, k_cache, v_cache, *others, **options)
    for mine, new in zip((*k_cache, *v_cache), (*keys, *values), strict=True):
        mine.copy_(new)
    return out


@pytest.mark.parametrize("form", FORMATS)
def test_the_reference_is_the_same_on_a_gpu(form: str) -> None:
    kernel_cases.check(reference, form, device="cuda")


def test_what_has_no_kernel_is_refused() -> None:
    caches = buffers("kivi4", {}, (1, 1, 40, 64), torch.float32, "cuda")
    q = torch.randn(1, 1, 1, 64, device="cuda")
    start = torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(Unsupported, match="kivi4"):
        quantized_cached_attention_(
            q, q, q, *caches, start, k_format="kivi4", v_format="kivi4", scale=1.0, kind="causal"
        )


# predicated_linear

BIG = (14336, 4096)
"""A weight that takes longer to read than anything else of a launch."""


def obey(x: Tensor, weight: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    """The operator, where an error is raised if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return predicated_linear(x, weight, skip, bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("who", predicated_cases.DECISIONS)
@pytest.mark.parametrize("shape", [*predicated_cases.SHAPES, (1, 1, *BIG), (4, 300, 1024, 1536)], ids=str)
def test_rows_that_skip_are_zeros_and_others_are_exact(
    shape: tuple[int, int, int, int], who: str, dtype: torch.dtype
) -> None:
    predicated_cases.check(obey, shape, who, device="cuda", dtype=dtype)


@HALVES
@pytest.mark.parametrize("options", [{"transposed": True}, {"strided": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 40, 72), (1, 40, 70, 96), (1, 300, 256, 512)], ids=str)
def test_weights_with_any_strides(
    shape: tuple[int, int, int, int], options: dict[str, bool], dtype: torch.dtype
) -> None:
    predicated_cases.check(obey, shape, device="cuda", dtype=dtype, **options)


def test_offsets_beyond_32_bits() -> None:
    """The last rows of a weight of more than 2^31 elements."""
    x, skip = torch.randn(1, 1, 16384, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.bool)
    weight = torch.zeros(2**17 + 64, 16384, dtype=torch.float16, device="cuda")
    last = torch.randn(64, 16384, dtype=torch.float16)
    weight[-64:] = last.cuda()
    given = predicated_linear(x.cuda(), weight, skip.cuda()).cpu()
    expected = x.double() @ last.double().T
    assert not given[..., :-64].any()
    assert (given[..., -64:] - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_a_captured_graph_obeys_other_decisions_and_skips_the_weight() -> None:
    """One graph, replayed while the decision changes on the device: it is right each time, and fast if all skip."""
    x, weight = torch.randn(1, 1, BIG[1], device="cuda"), torch.randn(BIG, device="cuda")
    skip = torch.zeros(1, 1, dtype=torch.bool, device="cuda")
    predicated_linear(x, weight, skip)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = predicated_linear(x, weight, skip)
    expected = (x.double() @ weight.double().T).cpu()
    fastest = {}
    for who in (False, True, False, True):
        skip.fill_(who)
        times = []
        for _ in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        fastest[who] = min(times)
        if who:
            assert not out.any()
        else:
            assert (out.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert fastest[True] < fastest[False] / 3


def test_runs_are_the_same_bit_for_bit() -> None:
    x, weight = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((1, 4, BIG[1]), BIG))
    skip = torch.zeros(1, 4, dtype=torch.bool, device="cuda")
    first = predicated_linear(x, weight, skip)
    assert all(torch.equal(predicated_linear(x, weight, skip), first) for _ in range(5))
    skip[0, 2] = True
    assert torch.equal(predicated_linear(x, weight, skip)[~skip], first[~skip])


def test_linear_layers_without_a_kernel_are_refused() -> None:
    x, weight = torch.randn(1, 1, 8, device="cuda"), torch.randn(4, 8, device="cuda")
    skip = torch.zeros(1, 1, dtype=torch.bool, device="cuda")
    with pytest.raises(Unsupported, match="float64"):
        predicated_linear(x.double(), weight.double(), skip)
    with pytest.raises(InvalidInput, match=r"rows \(1, 1, 7\)"):
        predicated_linear(x[..., 1:], weight, skip)
