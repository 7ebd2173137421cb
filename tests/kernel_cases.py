"""What kernels are asked for wherever they run, and the check against the reference of their operator."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipstone.ir.formats import parse
from skipstone.ir.quantized import cache_format, quantized_cached_attention_

FORMATS = ("full", "int8_channel", "int4_channel", "int8_token", "fp8_token", "int4_group", "nvfp4", "mxfp4")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error over the largest output."""

STEPS = [[17, 9], [1, 1], [3, 2]]
GROUPS_AND_WIDTHS = [(1, 64), (2, 80), (4, 96), (6, 128), (7, 64), (8, 96), (16, 64), (1, 128)]
LENGTHS = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65]

Run = Callable[..., Tensor]
"""An implementation of `skipstone.ir.quantized.quantized_cached_attention_`."""


def buffers(
    form: str, kept: dict[str, int], shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> list[list[Tensor]]:
    """Caches of keys and of values: shape is B, KH, C, D."""
    batch, heads, capacity, width = shape
    parts = cache_format(form, **kept).parts(width, dtype)
    return [
        [torch.zeros(batch, heads, p.rows(capacity), p.width, dtype=p.dtype, device=device) for p in parts]
        for _ in range(2)
    ]


def check(
    run: Run,
    form: str,
    steps: list[list[int]] = STEPS,
    *,
    device: str = "cpu",
    group: int = 2,
    kv_heads: int = 2,
    width: int = 64,
    capacity: int = 40,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    given: int = 0,
    residual: int = 0,
    first: int = 0,
    sinks: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """Ragged steps through both: the same bytes in the cache, and the same outputs, which are returned.

    The reference runs on the CPU, with the same numbers as `run` on its device. A step of `given` tokens is not the
    kernels' task.
    """
    kept = {"residual": residual, "first": first}
    batch = len(steps[0])
    shape = (batch, kv_heads, capacity, width)
    expected, got = buffers(form, kept, shape, dtype), buffers(form, kept, shape, dtype, device)
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
        q, k, v = (x.to(device) for x in (q, k, v))
        out = run(q, k, v, *got, *(None if x is None else x.to(device) for x in operands), **options).cpu()
        for row, number in [(row, number) for row, number in enumerate(counts) if number]:
            mine, theirs = (x[row, :, :number].float() for x in (out, wanted))
            assert (mine - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()
        for mine, theirs in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
            assert torch.equal(mine.cpu(), theirs)
        outputs += [out[row, :, :number] for row, number in enumerate(counts)]
        start = start + count
    return outputs
