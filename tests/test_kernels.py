"""Triton kernels without a GPU: what they compute, in the interpreter, and what they need, compiled."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.interpreter import run_interpreted

pytest.importorskip("triton", reason="needs the extra `triton`")


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(chosen: str) -> None:
    """Runs `interpreted_kernels.py` where triton interprets."""
    run_interpreted("interpreted_kernels.py", chosen)


@pytest.mark.parametrize(
    ("batch", "context", "queries", "shares"),
    [
        (8, 32768, 1, 4),  # 64 blocks, 264 programs at a time: 256
        (1, 32768, 1, 33),  # all 264
        (1, 1000, 1, 16),  # too few keys for more
        (33, 32768, 1, 1),
        (24, 32768, 1, 4),  # 192 blocks are 73% of a round; 768 programs, 97% of three
        (34, 32768, 1, 3),  # 272 blocks are 52% of two rounds; 816 programs, 77% of four
        (1000, 32768, 1, 1),
        (2, 32768, 64, 1),  # 256 blocks of a prompt
    ],
)
def test_programs_leave_few_processors_idle(batch: int, context: int, queries: int, shares: int) -> None:
    from skipstone.kernels.decode_attention import splits
    from skipstone.kernels.tuning import Tile

    call: Any = SimpleNamespace(batch=batch, kv_heads=8, group=4, queries=queries, capacity=context)
    tile = Tile(8, 128, 4, 3, keys_first=True, programs=2) if queries == 1 else Tile(16, 32, 8, 3, programs=2)
    assert splits(call, tile, processors=132) == shares


SHARED = {"sm_80": 163, "sm_90": 227}
"""KiB of shared memory that a program may have."""

FORMATS = ("full", "int8_channel", "int4_channel", "int8_token", "fp8_token", "int4_group", "nvfp4", "mxfp4")
PAIRS = [(form, form) for form in FORMATS]
PAIRS += [("int8_token", "int4_group"), ("fp8_token", "nvfp4"), ("full", "int8_token")]
"""Formats of keys and values: each with itself, and keys that are more exact."""


def check_that_it_fits(arch: str, *options: Any, **more: Any) -> None:
    """All kernels of a call, which is described as in `skipstone.kernels.compile.Variant`."""
    from skipstone.kernels.compile import Variant, usage, variant_launches

    variant = Variant(*options, **more)
    for launch in variant_launches(variant, arch):
        needs = usage(launch, arch)
        assert needs.spilled == 0 and needs.registers <= 255, (launch.kernel, variant, needs)
        assert needs.shared <= SHARED[arch] * 1024, (launch.kernel, variant, needs)


@pytest.mark.parametrize(
    ("arch", "pair", "width", "queries", "options"),
    [
        ("sm_80", ("int8_token", "int8_token"), 128, 1, False),
        ("sm_90", ("int8_token", "int8_token"), 128, 1, False),
        ("sm_90", ("fp8_token", "fp8_token"), 128, 1024, False),
        ("sm_90", ("full", "int8_token"), 64, 1, True),
        ("sm_80", ("nvfp4", "nvfp4"), 128, 1, True),
        ("sm_80", ("int8_token", "int4_group"), 128, 8, True),
        ("sm_90", ("int8_channel", "int8_channel"), 256, 1, True),
    ],
)
def test_registers_and_shared_memory(arch: str, pair: tuple[str, str], width: int, queries: int, options: bool) -> None:
    """Calls that are frequent, and those that take the most."""
    check_that_it_fits(arch, *pair, width, queries=queries, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 192, 256])
def test_registers_and_shared_memory_of_head_sizes(arch: str, pair: tuple[str, str], width: int) -> None:
    if width % 32 and {"int4_group", "mxfp4"} & set(pair):
        pytest.skip("groups of 32 channels")
    for queries, options in itertools.product((1, 8, 1024), (False, True)):
        check_that_it_fits(arch, *pair, width, queries=queries, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float16, 128), (torch.float16, 256), (torch.float32, 128)], ids=str
)
def test_registers_and_shared_memory_of_dtypes(
    arch: str, pair: tuple[str, str], dtype: torch.dtype, width: int
) -> None:
    for queries, options in itertools.product((1, 8, 1024), (False, True)):
        check_that_it_fits(arch, *pair, width, dtype, queries, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("form", ["full", "int8_token", "nvfp4"])
@pytest.mark.parametrize("group", [1, 7, 16])
def test_registers_and_shared_memory_of_groups(arch: str, form: str, group: int) -> None:
    for queries in (1, 8):
        check_that_it_fits(arch, form, form, 128, queries=queries, group=group, options=True)


def predicated_launch(
    rows: int, columns: int, width: int, dtype: torch.dtype, arch: str, transposed: bool = False
) -> Any:
    """The launch of `predicated_linear` on tensors without data, for a device with as many processors as an H100."""
    from skipstone.kernels.predicated_linear import linear_launch

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = tensor(width, columns).t() if transposed else tensor(columns, width)
    x, skip, out = tensor(1, rows, width), tensor(1, rows, dtype=torch.bool), tensor(1, rows, columns)
    return linear_launch(x, weight, skip, tensor(columns), out, int(arch.removeprefix("sm_")), 132)


def check_that_a_linear_layer_fits(arch: str, *options: Any, **more: Any) -> None:
    """Registers and shared memory of `predicated_launch`."""
    from skipstone.kernels.compile import usage

    needs = usage(predicated_launch(*options, arch=arch, **more), arch)
    assert needs.spilled == 0 and needs.registers <= 255, (options, more, needs)
    assert needs.shared <= SHARED[arch] * 1024, (options, more, needs)


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(
    ("rows", "columns", "width", "dtype"),
    [
        (1, 14336, 4096, torch.bfloat16),  # both matrices of an FFN of Llama 3 with 8 billion parameters
        (1, 4096, 14336, torch.bfloat16),
        (1, 4096, 14336, torch.float32),
        (2048, 14336, 4096, torch.float16),
        (300, 47, 33, torch.bfloat16),  # nothing that 16 divides
    ],
    ids=str,
)
def test_registers_and_shared_memory_of_linear_layers(
    arch: str, rows: int, columns: int, width: int, dtype: torch.dtype
) -> None:
    check_that_a_linear_layer_fits(arch, rows, columns, width, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 33, 1024])
def test_registers_and_shared_memory_of_all_tiles(arch: str, dtype: torch.dtype, rows: int) -> None:
    for columns, width in ((28672, 4096), (14336, 4096), (4096, 14336), (47000, 33), (47, 33), (1, 1)):
        check_that_a_linear_layer_fits(arch, rows, columns, width, dtype)
    for columns, width in ((28672, 4096), (3072, 768), (3073, 767)):
        check_that_a_linear_layer_fits(arch, rows, columns, width, dtype, transposed=True)


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("rows", [1, 1024])
def test_compiled_code_looks_at_the_decisions_before_anything_else(arch: str, rows: int) -> None:
    """In front of the first branch of the program nothing is loaded but bytes, and behind it are the copies of x."""
    from skipstone.kernels.compile import compile_launch

    ptx = compile_launch(predicated_launch(rows, 4096, 14336, torch.bfloat16, arch), arch).asm["ptx"]
    before, _, behind = ptx.partition(" bra ")
    loads = re.findall(r"ld\.global\S*|cp\.async\.c\S*", before)
    assert loads and set(loads) == {"ld.global.b8"}
    assert "cp.async.c" in behind
