"""The linear way past a layer's branches: how a change of the stream before a layer shows behind it.

A residual layer is ``f(h) = A h + branch(h)``. `A` is read off the operators between two values of the stream: sums
pass a change on, products with what does not depend on the stream scale it, casts leave it alone, and whatever else it
goes through (a norm, a product over features, an attention) is branch. In hyper-connections the stream is several
streams, on an axis of their own, which products over that axis mix (arXiv 2409.19606, 2512.24880). `A` is what a
structured Newton correction of parallel layers takes for the layer's Jacobian; arXiv 2605.17842.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch
from torch import fx

from skipstone.ir.einsum import equation, summed
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import module_path

aten = torch.ops.aten

SUMS = (aten.add.Tensor, aten.sub.Tensor, operator.add, operator.sub)
SCALINGS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, operator.mul)
COPIES = (
    aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.alias.default,
    aten.dropout.default,
)  # fmt: skip
"""Operators that pass a change on as it is; casts too: the trace of a segment has its own dtype."""
RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dim,
)  # fmt: skip
"""Operators that keep all elements in their order."""
PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.einsum.default)
"""Products of two tensors, which must have one dtype."""
_MOVES = (aten.transpose.int, aten.permute.default, aten.expand.default)
_REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim)
_DIVISIONS = (aten.div.Tensor, aten.div.Scalar)


class Coefficient(IntEnum):
    """What multiplies the stream in a value, beside the branches."""

    CONSTANT = 0
    """A number or a matrix that does not depend on the stream."""
    DEPENDENT = 1
    """One that does: a gate, or mixing matrices that each token makes for itself."""
    UNKNOWN = 2
    """The stream itself: which of the factors is the stream cannot be said."""


@dataclass(frozen=True)
class SkipPath:
    """The operators that carry the stream linearly from one value to another.

    Attributes:
        entry: the stream's value before.
        nodes: the operators in graph order, the value behind last; empty if the two values are one.
        coefficient: what they multiply it by.
        kind: "identity" if a change passes as it is, "mixing" if streams are mixed, else "scale".
    """

    entry: fx.Node
    nodes: tuple[fx.Node, ...]
    coefficient: Coefficient
    kind: Literal["identity", "scale", "mixing"]

    @property
    def is_identity(self) -> bool:
        """Whether a change passes as it is."""
        return self.kind == "identity"


def skip_path(entry: fx.Node, nodes: Sequence[fx.Node], at_iterate: bool = False) -> SkipPath:
    """The linear way from `entry` to the last of the nodes.

    Args:
        nodes: all operators between the two, in graph order.
        at_iterate: take it also where a factor depends on the stream.
    Raises:
        Unsupported: there is none, as behind a norm (post-norm), or it depends on the stream, as behind a gate.
    """
    path, where = linear_way(entry, nodes), module_path(nodes[-1]) or nodes[-1].name
    if path is None:
        why = "layer_parallel: no linear way past the layer: a norm stands in the residual stream (post-norm)"
        hint = "Only layers of the form h + branch(h), a * h + branch(h), or H h + branch(h) can run in parallel."
        raise Unsupported(why, where=where, hint=hint)
    if path.coefficient is Coefficient.UNKNOWN:
        hint = "Layers like this cannot run in parallel."
        raise Unsupported("layer_parallel: a residual stream that is multiplied by itself", where=where, hint=hint)
    if path.coefficient is Coefficient.DEPENDENT and not at_iterate:
        why = "layer_parallel: a residual stream that is multiplied by a function of itself (a gate, a norm, or mixing)"
        hint = "The surrogate 'at_iterate' takes the function's value for a constant in each iteration."
        raise Unsupported(why, where=where, hint=hint)
    return path


def linear_way(entry: fx.Node, nodes: Sequence[fx.Node]) -> SkipPath | None:
    """The linear way from `entry` to the last of the nodes, whatever it is multiplied by; None if there is none.

    Args:
        nodes: all operators between the two, in graph order; none if the two are one.
    """
    inside = {entry, *nodes}
    found = {entry: Coefficient.CONSTANT}
    for node in nodes:
        if (coefficient := _coefficient(node, found, inside)) is not None:
            found[node] = coefficient
    last = nodes[-1] if nodes else entry
    if last not in found:
        return None
    needed = {last}
    for node in reversed(nodes):
        if node in needed:
            needed |= {operand for operand in node.all_input_nodes if operand in found and passes_on(node, operand)}
    path = tuple(node for node in nodes if node in needed)
    carrying, kind = {entry, *path}, "identity"
    if any(node.target in (*PRODUCTS, *_REDUCTIONS, *_MOVES) for node in path):
        kind = "mixing"
    elif not all(_leaves_alone(node, carrying) for node in path):
        kind = "scale"
    return SkipPath(entry, path, found[last], kind)  # type: ignore[arg-type]


def _coefficient(node: fx.Node, found: dict[fx.Node, Coefficient], inside: set[fx.Node]) -> Coefficient | None:
    """What multiplies the stream in the node's value, from that of its operands; None if it is all branch."""
    carried = [operand for operand in node.all_input_nodes if operand in found and passes_on(node, operand)]
    if not carried:
        return None
    most = max(found[operand] for operand in carried)
    if node.target in (*SCALINGS, *PRODUCTS):
        factors: list[fx.Node] = []
        fx.map_arg(node.args, factors.append)
        if sum(factor in inside for factor in factors) > 1:
            alone = sum(factor in found for factor in factors) == 1
            most = max(most, Coefficient.DEPENDENT if alone else Coefficient.UNKNOWN)
    return most


def passes_on(node: fx.Node, operand: fx.Node) -> bool:
    """Whether an operator is linear in an operand, whatever its others are, and keeps the operand's features apart.

    The features of a value are its last dimension. Sums over others count where these have a fixed size, as the axis of
    the streams in hyper-connections does: those over batch or sequence are branches.
    """
    if node.target in SUMS:
        return sizes(node) == sizes(operand)
    if node.target in _DIVISIONS:
        return operand is node.args[0]
    if node.target in (*SCALINGS, *COPIES, *RESHAPES):
        return True
    if node.target is aten.expand.default:
        return sizes(operand)[-1] == sizes(node)[-1]
    if node.target not in (*_MOVES, *PRODUCTS, *_REDUCTIONS):
        return False
    shape = operand.meta["val"].shape
    if node.target is aten.transpose.int:
        return all(dim % len(shape) != len(shape) - 1 for dim in node.args[1:])  # type: ignore[operator]
    if node.target is aten.permute.default:
        return node.args[1][-1] % len(shape) == len(shape) - 1  # type: ignore[index, operator, return-value]
    axes = _summed(node, operand)
    return axes is not None and all(
        axis % len(shape) != len(shape) - 1 and isinstance(shape[axis], int) for axis in axes
    )


def _summed(node: fx.Node, operand: fx.Node) -> list[int] | None:
    """The dimensions of an operand that a reduction or a product sums over; None where features are among them."""
    if node.target in _REDUCTIONS:
        return list(node.args[1] or range(operand.meta["val"].ndim))  # type: ignore[arg-type]
    if node.target is aten.einsum.default:
        sources, result = equation(node)
        own = [names for each, names in zip(node.args[1], sources, strict=True) if each is operand]  # type: ignore[arg-type]
        if len(own) > 1 or own[0][-1:] != result[-1:]:
            return None
        return [dim for each, dim in summed(node) if each is operand]
    if operand is not node.args[1] or operand.meta["val"].ndim == 1:
        return None
    return None if sizes(operand)[-1] == "1" else [-2]  # features that stand as a column are in the rows


def _leaves_alone(node: fx.Node, carrying: set[fx.Node]) -> bool:
    """Whether an operator leaves a change as it is: a copy, or a sum that neither scales it nor adds it to itself."""
    if node.target in (*COPIES, *RESHAPES):
        return True
    if node.target not in SUMS or len(node.args) < 2:
        return False
    left, right = (operand in carrying for operand in node.args[:2])
    if left == right:
        return False
    added = node.target in (aten.add.Tensor, operator.add) and bool(node.kwargs.get("alpha", 1) == 1)
    return left or added


def sizes(node: fx.Node) -> list[str]:
    """The sizes of a value, to compare without asking whether two open ones might be the same."""
    return list(map(str, node.meta["val"].shape))
