"""A captured program must compute what the model computes, at sizes it was not traced with."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch import Tensor, nn

from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program, Role

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
        sample = _resized(program, inputs, batch, min(length, limit))
        with torch.no_grad():
            expected = model(**sample)
            try:
                actual = program.run(**{port.name: sample[port.name] for port in program.inputs})
            except (RuntimeError, IndexError, ValueError) as error:
                raise Unsupported(
                    f"this model: the captured graph fails at batch {batch}, length {length}, where the model does not "
                    f"({(str(error).splitlines() or [''])[0]})"
                ) from error
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


def _resized(program: Program, inputs: Mapping[str, Tensor], batch: int, length: int) -> dict[str, Tensor]:
    """The example at another size: dynamic axes wrap around or are cut, and positions go on.

    The symbol of a first axis is a batch; every other symbol is a length.
    """
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    sizes: dict[sympy.Symbol, int] = {}
    sample = dict(inputs)
    for port, node in zip(program.inputs, placeholders, strict=True):
        value = inputs[port.name]
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                continue
            for symbol in size.node.expr.free_symbols:
                sizes.setdefault(symbol, length if axis else batch)
            wanted = int(size.node.expr.subs(sizes))
            if wanted < 1:
                raise Unsupported(f"an input of size {size.node.expr}, which is {wanted} here", where=port.name)
            value = value.index_select(axis, torch.arange(wanted, device=value.device) % value.shape[axis])
        if port.role is Role.POSITIONS:
            value = torch.arange(value.shape[-1], device=value.device).expand_as(value)
        sample[port.name] = value.contiguous()
    return sample
