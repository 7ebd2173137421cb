"""A captured program must compute what the model computes, at sizes it was not traced with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, product

import sympy
import torch
from torch import Tensor, fx, nn

from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program, Role

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference allowed, as a share of the output's range. Half precisions differ by their own rounding."""

SIZES = ((3, 11), (2, 29), (1, 1))
"""Batch and sequence sizes that are compared: the traced one, a longer one, and single tokens."""

LARGEST = 4097
"""Up to here sizes are looked for at which a model may go another way than the trace."""

FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What a model may raise where it does not take its inputs."""

Sizes = Mapping[sympy.Symbol, int]


def compare(program: Program, model: nn.Module, inputs: Mapping[str, Tensor], longest: int | None = None) -> None:
    """Run both on the example, at several sizes, and where the model's own code asks for sizes (`_other_ways`).

    Sizes that the model itself does not take (more tokens than it has positions) are passed over.

    Args:
        longest: the longest sequence that the model says it takes.
    Raises:
        Unsupported: an output differs by more than the tolerance, or the program fails where the model does not.
    """
    limit = program.source.max_positions or SIZES[1][1]
    usual = (_sizes(program, batch, min(length, limit)) for batch, length in SIZES)
    samples = [inputs, *(_resized(program, inputs, sizes) for sizes in chain(usual, _other_ways(program, longest)))]
    apart = {tuple(value.shape for value in each.values()): each for each in samples}
    if not any([_compare_at(program, model, sample) for sample in apart.values()]):
        raise Unsupported("this model: it fails at all sizes that were tried")


def _compare_at(program: Program, model: nn.Module, sample: Mapping[str, Tensor]) -> bool:
    """Run both; False if the model does not take these inputs."""
    at = ", ".join(f"{name} {list(value.shape)}" for name, value in sample.items())
    with torch.no_grad():
        try:
            expected = model(**sample)
        except FAILURES:
            return False
        try:
            actual = program.run(**{port.name: sample[port.name] for port in program.inputs})
        except FAILURES as error:
            raise Unsupported(
                f"this model: the captured graph fails at {at}, where the model does not "
                f"({(str(error).splitlines() or [''])[0]})"
            ) from error
    expected = (expected,) if isinstance(expected, Tensor) else torch.utils._pytree.tree_leaves(expected)
    for want, (name, got) in zip(expected, actual.items(), strict=True):
        if not isinstance(want, Tensor):
            continue
        difference = relative_difference(got, want) if got.dtype == want.dtype else float("inf")
        if not difference <= TOLERANCE.get(want.dtype, 0.0):
            raise Unsupported(
                f"this model: the captured graph differs from it in {name} by {difference:.1e} of the range ({at})",
                hint="Its code does something at this size that tracing did not see. Axes that are not named in "
                "dynamic_shapes keep the size of the example.",
            )
    return True


def _other_ways(program: Program, longest: int | None) -> Iterator[Sizes]:
    """For each condition on sizes that held while tracing, the smallest sizes at which it does not.

    There the model may take another branch, which is not in the graph. It may also fail, where the condition is one of
    its operators (no more rows than a table has), or do the same.
    """
    environment = next((size.node.shape_env for node in _placeholders(program) for size in _open(node)), None)
    if environment is None:
        return
    is_length = _sizes(program, batch=False, length=True)
    if program.output(Role.LOGITS) is not None:  # behind the last position calls are refused
        longest = program.source.max_positions
    for condition in dict.fromkeys(environment.replace(guard.expr) for guard in environment.guards):
        symbols = sorted(condition.free_symbols, key=str)
        if not symbols or not is_length.keys() >= set(symbols):
            continue
        sizes = _violation(condition, symbols)
        if sizes is None or (longest and any(size > longest for symbol, size in sizes.items() if is_length[symbol])):
            continue
        yield dict.fromkeys(is_length, 2) | sizes


def _violation(condition: sympy.Basic, symbols: Sequence[sympy.Symbol]) -> dict[sympy.Symbol, int] | None:
    """The smallest sizes, from two up, among those near the condition's own numbers, at which it does not hold."""
    numbers = {abs(int(number)) + shift for number in condition.atoms(sympy.Integer) for shift in (-1, 0, 1)}
    tried = sorted(number for number in {*range(2, 9), *numbers} if 2 <= number <= LARGEST)
    for values in sorted(islice(product(tried, repeat=len(symbols)), 4096), key=sum):
        sizes = dict(zip(symbols, values, strict=True))
        if condition.subs(sizes) == sympy.false:
            return sizes
    return None


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the range of `expected` (over its size, where it is but one number).

    It is infinite when shapes, NaNs or infinities disagree.
    """
    if actual.shape != expected.shape:
        return float("inf")
    finite = actual.isfinite() & expected.isfinite()
    if not finite.all():
        if not torch.allclose(actual[~finite], expected[~finite], rtol=0.0, atol=0.0, equal_nan=True):
            return float("inf")
        actual, expected = actual[finite], expected[finite]
    if expected.numel() == 0 or not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    span = expected.max() - expected.min()
    span = (span if span > 0 else expected.abs().max()).double().clamp(min=1e-30)
    return float((actual.double() - expected.double()).abs().max() / span)


def _sizes(program: Program, batch: int, length: int) -> dict[sympy.Symbol, int]:
    """A size for each symbol: that of a first axis is a batch; every other is a length."""
    sizes: dict[sympy.Symbol, int] = {}
    for node in _placeholders(program):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    sizes.setdefault(symbol, length if axis else batch)
    return sizes


def _resized(program: Program, inputs: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """The example at another size: dynamic axes wrap around or are cut, and positions go on."""
    sample = dict(inputs)
    for port, node in zip(program.inputs, _placeholders(program), strict=True):
        value = inputs[port.name]
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                continue
            wanted = int(size.node.expr.subs(sizes))
            if wanted < 1:
                raise Unsupported(f"an input of size {size.node.expr}, which is {wanted} here", where=port.name)
            value = value.index_select(axis, torch.arange(wanted, device=value.device) % value.shape[axis])
        if port.role is Role.POSITIONS:
            value = torch.arange(value.shape[-1], device=value.device).expand_as(value)
        sample[port.name] = value.contiguous()
    return sample


def _placeholders(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "placeholder"]


def _open(node: fx.Node) -> list[torch.SymInt]:
    return [size for size in node.meta["val"].shape if isinstance(size, torch.SymInt)]
