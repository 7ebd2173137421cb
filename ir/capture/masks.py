"""Read the kind of an attention mask from what defines it, by evaluating it on sampled positions.

What defines it is either a function of positions, or the part of a graph that computes it from the sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from types import FunctionType
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from skipstone.ir.dialect import Kind, visible
from skipstone.ir.program import Program, Role

aten = torch.ops.aten

MaskFunction = Callable[[Any, Any, Any, Any], Any]

HIDDEN = -1e4
"""Logits from here down get no weight."""

_SHAPE_ONLY = (
    aten.sym_size.int, aten.ones_like.default, aten.zeros_like.default, aten.full_like.default,
    aten.new_ones.default, aten.new_zeros.default, aten.new_full.default,
)  # fmt: skip
"""Operators that look at the shape of their operand, not at its content."""

_LARGEST = 2048
"""Windows up to this size are told from none by evaluating masks of twice the length."""


def classify(function: MaskFunction, local_size: int | None) -> tuple[Kind, int]:
    """The kind and window that reproduce `function` on every sampled pair of positions, or explicit.

    Args:
        function: `f(batch, head, query, key) -> bool` on broadcasting index tensors.
        local_size: the window or chunk size that came with it, if any. Samples reach past it, so that a large window
            is never taken for none.
    """
    if _reads_data(function):
        return Kind.EXPLICIT, 0
    positions = _samples(local_size)
    queries, keys = positions[:, None], positions[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    try:
        truth = torch.as_tensor(function(zero, zero, queries, keys)).broadcast_to(len(positions), len(positions))
    except IndexError:  # it looks positions up in a table of the present length
        return Kind.EXPLICIT, 0
    near = (local_size - 1, local_size, local_size + 1) if local_size else range(1, 65)
    candidates: list[tuple[Kind, int]] = [(Kind.CAUSAL, 0), (Kind.BIDIRECTIONAL, 0)]
    for kind in (Kind.SLIDING, Kind.CHUNKED, Kind.BIDIRECTIONAL, Kind.BLOCK_CAUSAL):
        candidates += [(kind, window) for window in near if window > 0]
    for kind, window in candidates:
        pattern = visible(kind, window, queries, keys)
        if torch.equal(truth, torch.ones_like(truth) if pattern is None else pattern):
            return kind, window
    return Kind.EXPLICIT, 0


def _samples(local_size: int | None) -> Tensor:
    """Dense small positions, powers of two up to a million, and the neighbourhood of multiples of `local_size`."""
    positions = {*range(72), *(2**power for power in range(7, 21))}
    for multiple in range(1, 5):
        positions |= {max(0, multiple * (local_size or 0) + shift) for shift in range(-3, 4)}
    return torch.tensor(sorted(positions))


def _reads_data(function: Any) -> bool:
    """Whether the function closes over tensors with content; all-zero ones (no left padding) carry none."""
    return any(bool(tensor.any()) for tensor in _closed_over(function, set()))


def _closed_over(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _closed_over(item, seen)
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            yield from _closed_over(cell.cell_contents, seen)


def classify_nodes(
    program: Program, shows: Sequence[fx.Node], hides: Sequence[fx.Node] = ()
) -> tuple[Kind, int] | None:
    """The kind and window of masks that the graph computes from the sizes alone, taken together.

    The part of the graph that computes them is run at several lengths, which reach past every number that stands in it:
    a window is such a number.

    Args:
        program: the program; batch and sequence are the first two axes of its tokens, embeddings or first input.
        shows: nodes that broadcast to [B, N, S, S]; boolean, true where a query may attend, or floating point with 0
            for visible and a number up to `HIDDEN` for hidden.
        hides: boolean nodes that are true where a query may not attend.
    Returns:
        None where a mask depends on more than sizes, or they make no known kind, or cannot be told from one.
    """
    nodes = _made_from_sizes((*shows, *hides))
    if nodes is None:
        return None
    numbers = sorted({number for node in nodes for number in _numbers(program, node)})
    if numbers and numbers[-1] > _LARGEST:
        return None
    placeholders = (each for each in program.graph.nodes if each.op == "placeholder")
    first = program.input(Role.TOKENS) or program.input(Role.EMBEDDINGS) or next(placeholders)
    limit = program.source.max_positions or 2 * _LARGEST + 1
    lengths = {3, 17, 66, *(multiple * number + 1 for multiple, number in product((1, 2), numbers))}
    candidates: list[tuple[Kind, int]] | None = None
    for length in sorted({min(each, limit) for each in lengths}, reverse=True):
        values = _evaluate(program, nodes, first, length)
        positions, truth = torch.arange(length), torch.ones(length, length, dtype=torch.bool)
        for mask in (*shows, *hides):
            pattern = _pattern(values[mask], length, mask in hides) if values else None
            if pattern is None:
                return None
            truth = truth & pattern
        if candidates is None:  # the longest mask shows the window, if there is one
            candidates = [(Kind.CAUSAL, 0), (Kind.BIDIRECTIONAL, 0)]
            candidates += product((Kind.SLIDING, Kind.CHUNKED, Kind.BIDIRECTIONAL, Kind.BLOCK_CAUSAL), _windows(truth))
        candidates = [each for each in candidates if _agrees(each, positions, truth)]
    return candidates[0] if candidates else None


def _windows(truth: Tensor) -> list[int]:
    """Sizes that a pattern [S, S] may have: what the last query sees, what the first sees, how long that is seen."""
    last, first, seen = int(truth[-1].sum()), int(truth[0].sum()), int(truth[:, 0].sum())
    return sorted({size for size in (last, first, first - 1, seen) if size > 0})


def _agrees(candidate: tuple[Kind, int], positions: Tensor, truth: Tensor) -> bool:
    pattern = visible(*candidate, positions[:, None], positions[None, :])
    return bool(truth.all()) if pattern is None else torch.equal(truth, pattern)


def _made_from_sizes(results: Sequence[fx.Node]) -> list[fx.Node] | None:
    """What computes `results`, in graph order, if no input's content takes part in it."""
    needed, pending = set(results), list(results)
    while pending:
        current = pending.pop()
        if current.op == "placeholder" or torch.Tag.nondeterministic_seeded in getattr(current.target, "tags", ()):
            return None
        operands = current.all_input_nodes
        if current.target in _SHAPE_ONLY:
            operands = [operand for operand in operands if not isinstance(operand.meta.get("val"), Tensor)]
        pending += [operand for operand in operands if operand not in needed]
        needed.update(operands)
    return [each for each in results[0].graph.nodes if each in needed]


def _numbers(program: Program, node: fx.Node) -> Iterator[int]:
    """The whole numbers in a node, without sign, and the sizes of a tensor; 1 and a slice's open end say nothing."""
    if node.op == "get_attr":
        values: list[Any] = [*program.tensor(str(node.target)).shape]
    else:
        values = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
    for value in values:
        whole = isinstance(value, int) or (isinstance(value, float) and abs(value) <= _LARGEST and value.is_integer())
        if whole and not isinstance(value, bool) and 1 < abs(value) < 2**62:
            yield abs(int(value))


def _evaluate(program: Program, nodes: list[fx.Node], first: fx.Node, length: int) -> dict[fx.Node, Any]:
    """The values of `nodes` at a batch of two and this length; empty where the graph does not run at it."""
    sizes: dict[sympy.Symbol, int] = {}
    for size, number in zip(first.meta["val"].shape[:2], (2, length), strict=False):
        if isinstance(size, torch.SymInt):
            sizes |= dict.fromkeys(size.node.expr.free_symbols, number)

    def concrete(size: Any) -> int:
        return int(size.node.expr.subs(sizes)) if isinstance(size, torch.SymInt) else int(size)

    def argument(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        fake = node.meta["val"]
        return torch.empty([concrete(size) for size in fake.shape], dtype=fake.dtype)

    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "get_attr":
            values[node] = program.tensor(str(node.target))
            continue
        try:
            args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, TypeError):  # e.g. a size that depends on another symbol
            return {}
    return values


def _pattern(mask: Tensor, length: int, hides: bool) -> Tensor | None:
    """Where a query may attend, [length, length], if the mask is the same for every sequence and head."""
    if mask.dtype == torch.bool:
        allowed = ~mask if hides else mask
    elif bool(((mask == 0) | (mask <= HIDDEN)).all()):
        allowed = mask == 0
    else:
        return None
    flat = allowed.reshape(-1, *allowed.shape[-2:]) if allowed.ndim >= 2 else allowed.reshape(1, 1, -1)
    if not bool((flat == flat[:1]).all()):
        return None
    return flat[0].expand(length, length) if set(flat.shape[1:]) <= {1, length} else None
