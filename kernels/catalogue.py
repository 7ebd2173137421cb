"""The kernels of the library, in the forms that decode steps and prompts of usual models launch them in.

Tensors have no data here, so that all of it can be compiled and looked at without a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.kernels.compile import PROCESSORS, Variant, capability, variant_launches
from skipstone.kernels.launch import Launch
from skipstone.kernels.predicated_linear import linear_launch
from skipstone.kernels.row_linear import row_launch
from skipstone.kernels.take_best import choice_launches

FORMATS = ("full", "int8_channel", "int4_channel", "int8_token", "fp8_token", "int4_group:32", "nvfp4", "mxfp4")
"""Of quantized caches, and the model's own dtype."""

WIDTH, FFN, HEAD, VOCABULARY = 4096, 14336, 128, 128256
"""Of the linear layers: those of Llama 3 with 8 billion parameters."""


@dataclass(frozen=True)
class Entry:
    """A launch.

    Attributes:
        use: what it is launched for.
        launch: the kernel, with what it is launched with.
    """

    use: str
    launch: Launch

    @property
    def kernel(self) -> str:
        """The name of the kernel."""
        return str(self.launch.kernel.__name__)


def catalogue(arch: str) -> Iterator[Entry]:
    """All entries for an architecture.

    Args:
        arch: such as "sm_90".
    Raises:
        Unsupported: it is not the name of one, or older than the kernels support.
    """
    for form in FORMATS:
        for width in (64, 128):
            for queries, use in ((1, "a token"), (512, "a prompt")):
                for launch in variant_launches(Variant(form, form, width, queries=queries), arch):
                    yield Entry(f"attention, {form}, {width} channels, {use}", launch)
    for rows, use in ((1, "a token"), (512, "a prompt")):
        x, skip = _tensor(1, rows, WIDTH), _tensor(1, rows, dtype=torch.bool)
        launch = linear_launch(x, _tensor(FFN, WIDTH), skip, None, _tensor(1, rows, FFN), capability(arch), PROCESSORS)
        yield Entry(f"linear layer that tokens may skip, {use}", launch)
    yield from _row_linear(arch)
    integers = _tensor(1, 1, dtype=torch.int64)
    choice = _tensor(1, VOCABULARY), integers, integers, integers, [integers, integers], capability(arch)
    for launch in choice_launches(*choice):
        yield Entry("the choice of a token", launch)


def _row_linear(arch: str) -> Iterator[Entry]:
    """The products of a decode step."""

    def entry(use: str, depth: int, widths: list[int], lanes: int = 1, skip: bool = False, gate: bool = False) -> Entry:
        angles = None if gate or len(widths) == 1 else _tensor(1, HEAD)
        norm, total = depth == WIDTH, widths[0] if gate else sum(widths)
        return Entry(
            use,
            row_launch(
                _tensor(1, 1, depth), [_tensor(lanes, each, depth) for each in widths], [None] * len(widths),
                _tensor(lanes, depth) if norm else None, None if norm else _tensor(1, 1, total),
                _tensor(1, dtype=torch.bool) if skip else None, angles, angles, _tensor(lanes, 1, total),
                None if angles is None else [HEAD, HEAD, 0], 1e-6 if norm else None, 0.0, "silu" if gate else "none",
                gate, capability(arch), PROCESSORS,
            ),
        )  # fmt: skip

    yield entry("norm, rotated queries and keys, and values", WIDTH, [WIDTH, WIDTH // 4, WIDTH // 4])
    yield entry("the same of 8 layers at the same time", WIDTH, [WIDTH, WIDTH // 4, WIDTH // 4], lanes=8)
    yield entry("norm and gated FFN", WIDTH, [FFN, FFN], gate=True)
    yield entry("the same, where tokens may skip", WIDTH, [FFN, FFN], skip=True, gate=True)
    yield entry("the rest of the FFN, and its sum", FFN, [WIDTH])


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
