"""Rotary embeddings of queries and keys, as graphs write them: ``x cos + rotate_half(x) sin`` (arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from skipstone.ir.norms import is_shape, only_user, target_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding.

    Attributes:
        heads: [..., B, H, S, D], before it.
        result: behind it.
        cos, sin: [B, S, D], in the dtype of the heads.
    """

    heads: fx.Node
    result: fx.Node
    cos: fx.Node
    sin: fx.Node


def rotation(heads: fx.Node) -> Rotation | None:
    """The rotary embedding of heads [..., B, H, S, D], if that is all that is made of them."""
    width = heads.meta["val"].shape[-1]
    products = [user for user in heads.users if user.target is aten.mul.Tensor]
    result = only_user(products[0]) if len(products) == 1 else None
    if target_of(result) is not aten.add.Tensor or result.kwargs:  # type: ignore[union-attr]
        return None
    other: Any = _other(result, products[0])  # type: ignore[arg-type]
    joined = next((each for each in getattr(other, "args", ()) if target_of(each) is aten.cat.default), None)
    if target_of(other) is not aten.mul.Tensor or joined is None or not _is_last(joined, joined.args[1:]):
        return None
    halves: list[Any] = joined.args[0]
    if len(halves) != 2 or target_of(halves[0]) is not aten.neg.default:
        return None
    second, first = halves[0].args[0], halves[1]
    is_half = _is_slice(first, heads, 0, width // 2) and _is_slice(second, heads, width // 2, width)
    inner = (products[0], other, joined, halves[0], first, second)
    if not is_half or len(heads.users) != 3 or any(len(each.users) != 1 for each in inner):
        return None
    cos, sin = _angles(_other(products[0], heads), heads), _angles(_other(other, joined), heads)
    return None if cos is None or sin is None else Rotation(heads, result, cos, sin)  # type: ignore[arg-type]


def _angles(factor: Any, heads: fx.Node) -> fx.Node | None:
    """The value [B, S, D] that stands for all heads in a factor of theirs."""
    if target_of(factor) is not aten.unsqueeze.default or factor.args[1] not in (1, -3):
        return None
    shape, source = heads.meta["val"].shape, factor.args[0]
    has_shape = is_shape(source, (shape[-4], *shape[-2:]))
    return source if has_shape and source.meta["val"].dtype == heads.meta["val"].dtype else None


def _is_slice(node: Any, whole: fx.Node, begin: int, end: int) -> bool:
    if target_of(node) is not aten.slice.Tensor or node.args[0] is not whole or len(node.args) != 4:
        return False
    _, axis, first, last = node.args
    return _is_last(whole, (axis,)) and first == begin and min(last, whole.meta["val"].shape[-1]) == end


def _is_last(whole: fx.Node, axis: tuple[Any, ...]) -> bool:
    return bool(axis) and axis[0] in (-1, whole.meta["val"].ndim - 1)


def _other(node: fx.Node, operand: fx.Node) -> Any:
    """The operand of a sum or product that is not this one."""
    return node.args[1] if node.args[0] is operand else node.args[0]
