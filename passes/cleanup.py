"""Remove what computes nothing, and compute what stands twice only once."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from skipstone.ir.dialect import KEEP
from skipstone.ir.program import Program
from skipstone.passes.base import Pass, Remark

aten = torch.ops.aten

_COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    KEEP,
)
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)


@dataclass(frozen=True)
class Cleanup(Pass):
    """Drop identities (copies, casts to the same type, dropout in evaluation, whole slices), merge equal nodes.

    `keep` is one of them: only where there is a cache, it means something.
    """

    name: ClassVar[str] = "cleanup"

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        identities = merged = 0
        first: dict[Any, fx.Node] = {}
        returned = set(program.output_node().all_input_nodes)
        for node in list(program.nodes()):
            source = _identity_of(node)
            if source is not None and not (node in returned and source.op == "placeholder"):
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
                identities += 1
                continue
            key = _key(node)
            if key is None:
                continue
            if key in first and node not in returned:
                node.replace_all_uses_with(first[key])
                program.graph.erase_node(node)
                merged += 1
            else:
                first.setdefault(key, node)
        remarks = []
        if identities:
            remarks.append(self.applied("graph", f"{identities} identities removed", identities=identities))
        if merged:
            remarks.append(self.applied("graph", f"{merged} repeated computations merged", merged=merged))
        return remarks


def _identity_of(node: fx.Node) -> fx.Node | None:
    """The argument that `node` returns unchanged in value, shape and dtype, if it does."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or "val" not in source.meta or not isinstance(source.meta["val"], torch.Tensor):
        return None
    value, result = source.meta["val"], node.meta.get("val")
    if node.target in _COPIES:
        same = True
    elif node.target in _CASTS:
        same = isinstance(result, torch.Tensor) and (value.dtype, value.device) == (result.dtype, result.device)
    elif node.target is aten.dropout.default:
        same = node.args[2] is False
    elif node.target is aten.slice.Tensor:
        start, end = (*node.args[2:4], None, None)[:2]
        same = start in (None, 0) and end in (None, sys.maxsize) and len(node.args) < 5
    elif node.target in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor):
        neutral = 1 if node.target in (aten.mul.Tensor, aten.div.Tensor) else 0
        other = node.args[1]
        same = isinstance(other, int | float) and other == neutral and not node.kwargs and value.dtype == result.dtype  # type: ignore[union-attr]
    else:
        same = False
    return source if same else None


def _key(node: fx.Node) -> Any:
    """Equal for nodes that compute the same value; None where that cannot be said."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    try:
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((name, _frozen(item)) for name, item in value.items()))
    return (type(value).__name__, value) if isinstance(value, int | float | bool) else value
