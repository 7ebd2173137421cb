"""RMSNorm, whether a graph has it as one operator or written out in small steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

_CASTS = (aten._to_copy.default, aten.to.dtype, aten.type_as.default)


@dataclass(frozen=True)
class RMSNorm:
    """``x * rsqrt(mean(x ** 2, -1) + eps) * gain``, arXiv 1910.07467.

    Attributes:
        x: [..., D], before it is cast to a wider dtype.
        gain: [D], or [N, 1, ..., D] where each of N lanes has its own; None for one.
        eps: added to the mean of the squares.
    """

    x: fx.Node
    gain: fx.Node | None
    eps: float


def rms_norm(node: fx.Node) -> RMSNorm | None:
    """The RMSNorm whose result a node is, if it is one. Casts between floating-point dtypes are looked through."""
    inner = uncast(node)
    if target_of(inner) is aten.rms_norm.default:
        x, shape, gain, eps = (*inner.args, None, None)[:4]
        is_complete = isinstance(eps, float) and len(shape) == 1  # type: ignore[arg-type]
        return RMSNorm(x, gain, eps) if is_complete else None  # type: ignore[arg-type]
    gain = None
    if target_of(inner) is aten.mul.Tensor and (found := _gain(inner)) is not None:
        inner, gain = uncast(found[0]), found[1]
    normed = _normed(inner)
    return None if normed is None else RMSNorm(_as(normed[0], node.meta["val"].dtype), gain, normed[1])


def uncast(node: fx.Node) -> fx.Node:
    """The value that a node is in another floating-point dtype, or the node itself."""
    while node.target in _CASTS and not node.kwargs.keys() - {"dtype"} and node.meta["val"].is_floating_point():
        source = node.args[0]
        if not isinstance(source, fx.Node) or not source.meta["val"].is_floating_point():
            break
        node = source
    return node


def is_shape(node: fx.Node, *shapes: Sequence[Any]) -> bool:
    """Whether the shape of a value is certainly one of these, whatever symbolic sizes stand for."""
    given = getattr(node.meta["val"], "shape", None)  # a number has none
    return given is not None and any(
        len(given) == len(shape) and all(statically_known_true(a == b) for a, b in zip(given, shape, strict=True))
        for shape in shapes
    )


def _as(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The value that a node is a cast of, if that has the dtype."""
    source = node
    while source.meta["val"].dtype != dtype:
        if source.target not in _CASTS or not isinstance(source.args[0], fx.Node):
            return node
        source = source.args[0]
    return source


def only_user(node: fx.Node) -> fx.Node | None:
    """What reads a value, if nothing else does."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def target_of(value: Any) -> Any:
    """The function that a value is the result of; None for one that no function makes."""
    return value.target if isinstance(value, fx.Node) and value.op == "call_function" else None


def _gain(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The factors of a product with a vector, or one for each lane: the other factor, and the vector."""
    shape = tuple(product.meta["val"].shape)
    if not shape:
        return None
    lanes = (shape[0], *[1] * (len(shape) - 2), shape[-1])
    for x, gain in (product.args, product.args[::-1]):
        if isinstance(x, fx.Node) and isinstance(gain, fx.Node) and is_shape(gain, shape[-1:], lanes):
            return x, gain
    return None


def _normed(product: fx.Node) -> tuple[fx.Node, float] | None:
    """``x`` and ``eps``, if a node is ``x * rsqrt(mean(x ** 2, -1) + eps)``."""
    if target_of(product) is not aten.mul.Tensor:
        return None
    for x, rsqrt in (product.args, product.args[::-1]):
        if target_of(rsqrt) is not aten.rsqrt.default:
            continue
        shifted: Any = rsqrt.args[0]  # type: ignore[union-attr]
        if target_of(shifted) is not aten.add.Tensor or not isinstance(shifted.args[1], float) or shifted.kwargs:
            continue
        mean = shifted.args[0]
        if target_of(mean) is not aten.mean.dim or list(mean.args[1]) != [-1] or mean.args[2:] != (True,):
            continue
        square = mean.args[0]
        if not mean.kwargs and target_of(square) is aten.pow.Tensor_Scalar and square.args == (x, 2):
            return x, shifted.args[1]  # type: ignore[return-value]
    return None
