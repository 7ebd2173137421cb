"""The linear way past a layer's branches: how a change of the stream before a layer shows behind it.

A residual layer is ``f(h) = A h + branch(h)``. `A` is read off the operators between two values of the stream: sums
pass a change on, products with what does not depend on the stream scale it, casts leave it alone, and whatever else it
goes through (a norm, a matrix product, an attention) is branch. `A` is what a structured Newton correction of parallel
layers takes for the layer's Jacobian; arXiv 2605.17842.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

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
_DIVISIONS = (aten.div.Tensor, aten.div.Scalar)


class _Share(Enum):
    """What of the stream is in a value, beside the branches."""

    LINEAR = "a multiple that is known"
    UNKNOWN = "a multiple that depends on the stream itself"


@dataclass(frozen=True)
class SkipPath:
    """The operators that carry the stream linearly from one value to another.

    Attributes:
        entry: the stream's value before.
        nodes: the operators, of `SUMS`, `SCALINGS`, `COPIES` and `RESHAPES` alone, in graph order; the value behind
            comes last.
        is_identity: whether a change passes as it is.
    """

    entry: fx.Node
    nodes: tuple[fx.Node, ...]
    is_identity: bool


def _passes(node: fx.Node, carrying: set[fx.Node]) -> bool:
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


def skip_path(entry: fx.Node, nodes: Sequence[fx.Node]) -> SkipPath:
    """The linear way from `entry` to the last of the nodes.

    Args:
        nodes: all operators between the two, in graph order.
    Raises:
        Unsupported: there is none, as behind a norm (post-norm), or it depends on the stream, as behind a gate.
    """
    inside = {entry, *nodes}
    shares: dict[fx.Node, _Share] = {entry: _Share.LINEAR}
    for node in nodes:
        if share := _share(node, shares, inside):
            shares[node] = share
    found = shares.get(nodes[-1])
    if found is not _Share.LINEAR:
        why = "no linear way past the layer: a norm stands in the residual stream (post-norm)"
        if found is _Share.UNKNOWN:
            why = "a residual stream that is multiplied by a function of itself (a gate or a norm)"
        hint = "Only layers of the form h + branch(h), or a * h + branch(h), can run in parallel."
        raise Unsupported(f"layer_parallel: {why}", where=module_path(nodes[-1]) or nodes[-1].name, hint=hint)
    needed = {nodes[-1]}
    for node in reversed(nodes):
        if node in needed:
            needed |= {operand for operand in node.all_input_nodes if operand in shares}
    path = tuple(node for node in nodes if node in needed)
    carrying = {entry, *path}
    return SkipPath(entry, path, all(_passes(node, carrying) for node in path))


def _share(node: fx.Node, shares: dict[fx.Node, _Share], inside: set[fx.Node]) -> _Share | None:
    """What of the stream is in the node's value, from what is in its operands; None if it is all branch."""
    carried = {operand: shares[operand] for operand in node.all_input_nodes if operand in shares}
    if not carried or node.target not in (*SUMS, *SCALINGS, *COPIES, *RESHAPES):
        return None
    if node.target in SCALINGS:
        if node.target in _DIVISIONS and node.args[1] in inside:
            return _Share.UNKNOWN if node.args[0] in carried else None
        if sum(operand in inside for operand in node.args) > 1:
            return _Share.UNKNOWN
    return _Share.UNKNOWN if _Share.UNKNOWN in carried.values() else _Share.LINEAR
