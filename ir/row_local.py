"""Operators that keep tokens apart by their form: each row of the result follows from the same row of the operands.

`skipstone.ir.sequence` proves as much of whole programs, from sizes that are symbols. Here sizes may be numbers, as in
the graphs of Dynamo, so that little is known to be row by row: what works on each element, or along the last dimension.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_COPIES = (aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.alias.default,
           aten.detach.default, aten.type_as.default, aten.dropout.default)  # fmt: skip
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints)
_ALONG: dict[Any, int] = {
    aten.mean.dim: 1, aten.sum.dim_IntList: 1, aten.amax.default: 1, aten.amin.default: 1, aten.softmax.int: 1,
    aten.var.correction: 1, aten.linalg_vector_norm.default: 2, aten.split.Tensor: 2, aten.split_with_sizes.default: 2,
    aten.chunk.default: 2, aten.glu.default: 1, aten.slice.Tensor: 1,
}  # fmt: skip
"""Operators along one dimension or several: where these stand among the arguments."""
_NORMS = (aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default)
"""Operators along as many last dimensions as their second argument has sizes."""


def is_row_local(node: fx.Node, rows: Sequence[Any]) -> bool:
    """Whether a call computes each token's row from that row of its operands alone.

    Args:
        node: a call; of its operands, those that depend on tokens hold them as [B, S, ...] or [B * S, ...].
        rows: B and S.
    """
    target: Any = node.target
    value = node.meta["val"]
    if target is operator.getitem or not isinstance(value, Tensor | tuple | list) or _is_constant(node):
        return True  # one of several results, each of which has been looked at; a size; a view of a weight
    operands = [each.meta["val"] for each in node.all_input_nodes if isinstance(each.meta.get("val"), Tensor)]
    results = value if isinstance(value, tuple | list) else (value,)
    if not all(_holds_rows(each, rows) for each in results):
        return False
    if target in _RESHAPES:
        return _holds_rows(operands[0], rows) and results[0].shape[-1] == operands[0].shape[-1]
    if target in _COPIES or torch.Tag.pointwise in getattr(target, "tags", ()):
        return all(_fits(each, results[0]) for each in operands)
    if target in _NORMS:
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    place = _ALONG.get(target)
    if place is None:
        return False
    default = {aten.chunk.default: 0, aten.split.Tensor: 0, aten.split_with_sizes.default: 0, aten.slice.Tensor: 0}
    along: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", default.get(target, -1))
    last = operands[0].ndim - 1
    return bool(along) and all(each in (-1, last) for each in (along if isinstance(along, Sequence) else (along,)))


def _is_constant(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op == "get_attr"
    return bool(node.all_input_nodes) and all(map(_is_constant, node.all_input_nodes))


def _holds_rows(value: Any, rows: Sequence[Any]) -> bool:
    batch, length = rows
    shape = value.shape
    return bool(shape[:2] == (batch, length) if len(shape) == 3 else len(shape) == 2 and shape[0] == batch * length)


def _fits(operand: Tensor, result: Tensor) -> bool:
    """Whether elements meet those of the same row: all rows are there, or one stands for all."""
    return operand.ndim <= 1 or (
        operand.ndim == result.ndim and operand.shape[:-1] in (result.shape[:-1], (1,) * (result.ndim - 1))
    )
