"""Operators that models write out in small steps and that ONNX has as one: RMSNorm and rotary embedding.

A decoder step is so short that the number of kernels counts: written out, a norm is six of them and a rotation is six.
ONNX Runtime recognises neither in the form that torch.onnx gives them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from skipstone.ir.norms import rms_norm, target_of
from skipstone.ir.program import Program, fake_value, provenance

aten = torch.ops.aten
_LOOK_THROUGH = (aten.unsqueeze.default, aten.cos.default, aten.sin.default, aten.clone.default, aten.alias.default)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels: ``x * cos + cat(-x2, x1) * sin`` for the halves ``x1, x2`` of x (arXiv 2104.09864).

    Args:
        x: [B, N, S, D].
        cos, sin: [B, 1, S, D]; their two halves are equal.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def gather_operators(program: Program) -> Program:
    """A copy of the program in which written-out norms are `aten.rms_norm` and rotations are calls of `rotary`."""
    program = program.copy()
    for node in list(program.nodes(aten.mul.Tensor, aten.add.Tensor)):
        match = _rms_norm(node) if node.target is aten.mul.Tensor else _rotation(node)
        if match is None:
            continue
        result, target, args = match
        with provenance(program, "onnx", like=result), program.graph.inserting_before(result):
            new = program.graph.call_function(target, args)
        new.meta["val"] = fake_value(new)
        result.replace_all_uses_with(new)
    program.recompile()
    return program


Found = tuple[fx.Node, Any, tuple[Any, ...]]  # the node to replace, and the call to replace it with


def _rms_norm(product: fx.Node) -> Found | None:
    """``weight * (x * rsqrt(mean(x ** 2, -1) + eps))``."""
    norm = rms_norm(product)
    if norm is None or norm.gain is None or norm.gain.meta["val"].ndim != 1:
        return None
    if len({each.meta["val"].dtype for each in (product, norm.x, norm.gain)}) > 1:
        return None
    return product, aten.rms_norm.default, (norm.x, [int(norm.x.meta["val"].shape[-1])], norm.gain, norm.eps)


def _rotation(add: fx.Node) -> Found | None:
    """``x * cos + cat([-x[..., D / 2:], x[..., : D / 2]], -1) * sin`` of heads that were transposed to [B, N, S, D]."""
    products: Any = add.args
    if add.kwargs or any(target_of(each) is not aten.mul.Tensor for each in products):
        return None
    (x, cos), (turned, sin) = (each.args for each in products)
    if target_of(turned) is not aten.cat.default or len(turned.args[0]) != 2 or not _is_last(turned, turned.args[1]):
        return None
    negated, first = turned.args[0]
    second = negated.args[0] if target_of(negated) is aten.neg.default else None
    half, odd = divmod(int(x.meta["val"].shape[-1]), 2)
    if odd or not _is_part(first, x, 0, half) or not _is_part(second, x, half, 2 * half):
        return None
    if target_of(x) is not aten.transpose.int or {axis % 4 for axis in x.args[1:]} != {1, 2}:
        return None
    if not all(_has_equal_halves(angle) and _fits(angle, x) for angle in (cos, sin)):
        return None
    return add, rotary, (x, cos, sin)


def _is_part(node: Any, whole: fx.Node, start: int, stop: int) -> bool:
    """Whether `node` is ``whole[..., start:stop]``."""
    if target_of(node) is not aten.slice.Tensor or node.args[0] is not whole or not _is_last(whole, node.args[1]):
        return False
    width = whole.meta["val"].shape[-1]
    return len(node.args) == 4 and node.args[2] == start and min(node.args[3], width) == stop


def _has_equal_halves(angle: Any) -> bool:
    """Whether it comes, element by element, from one tensor joined to itself along the last dimension."""
    while target_of(angle) in _LOOK_THROUGH or (
        target_of(angle) is aten.mul.Tensor and isinstance(angle.args[1], int | float)
    ):
        if angle.target is aten.unsqueeze.default and _is_last(angle, angle.args[1]):
            return False
        angle = angle.args[0]
    if target_of(angle) is not aten.cat.default or not _is_last(angle, angle.args[1] if len(angle.args) > 1 else 0):
        return False
    return len(angle.args[0]) == 2 and angle.args[0][0] is angle.args[0][1]


def _fits(angle: fx.Node, x: fx.Node) -> bool:
    batch, _, rows, width = x.meta["val"].shape
    shape = tuple(angle.meta["val"].shape)
    return len(shape) == 4 and shape == (batch, 1, rows, width)


def _is_last(node: fx.Node, axis: int) -> bool:
    return axis in (-1, node.meta["val"].ndim - 1)
