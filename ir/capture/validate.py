"""A captured program must compute what the model computes, at sizes it was not traced with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference allowed, as a share of the output's range. Half precisions differ by their own rounding."""

SIZES = ((3, 11), (2, 29), (1, 1))
"""Batch and sequence sizes that are compared: the traced one, a longer one, and single tokens."""


def compare(program: Program, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Run both at several sizes.

    Raises:
        Unsupported: an output differs by more than the tolerance.
    """
    limit = program.source.max_positions or SIZES[1][1]
    for batch, length in SIZES:
        sample = {name: _resize(value, batch, min(length, limit), program) for name, value in inputs.items()}
        with torch.no_grad():
            expected = model(**sample)
            actual = program.run(**{port.name: sample[port.name] for port in program.inputs})
        expected = (expected,) if isinstance(expected, Tensor) else torch.utils._pytree.tree_leaves(expected)
        for want, (name, got) in zip(expected, actual.items(), strict=True):
            if not isinstance(want, Tensor):
                continue
            difference = relative_difference(got, want)
            if not difference <= TOLERANCE.get(want.dtype, 0.0):
                raise Unsupported(
                    f"this model: the captured graph differs from it in {name} by {difference:.1e} of the range "
                    f"(batch {batch}, length {length})",
                    hint="Its code does something at this size that tracing did not see.",
                )


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the range of `expected`; infinite when the shapes or the NaNs disagree."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0 or not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    span = (expected.max() - expected.min()).double().clamp(min=1e-30)
    difference = (actual.double() - expected.double()).abs().max() / span
    return float("inf") if difference.isnan() else float(difference)


def _resize(value: Tensor, batch: int, length: int, program: Program) -> Tensor:
    """The example at another batch and sequence size where those axes are dynamic: rows wrap around, positions go on."""
    name = next((port.name for port in program.inputs if value.ndim and port.name), "")
    del name
    if value.ndim >= 1:
        value = value[torch.arange(batch) % value.shape[0]]
    if value.ndim >= 2:
        index = torch.arange(length)
        if not value.is_floating_point() and value.ndim == 2 and torch.equal(
            value[0], torch.arange(value.shape[1], device=value.device)
        ):
            return index.to(value.device).repeat(batch, 1)
        value = value[:, index % value.shape[1]]
    return value.contiguous()
