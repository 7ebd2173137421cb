"""Recognise attention in captured graphs: `scaled_dot_product_attention` and matmul-softmax-matmul."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from skipstone.ir.dialect import ATTENTION, Kind
from skipstone.ir.program import Program, fake_value, provenance

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_TRANSPARENT = (aten.clone.default, aten.contiguous.default, aten.dropout.default, aten.alias.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def recognise_attention(program: Program) -> int:
    """Replace every attention that is recognised by a `skipstone::attention` node, numbered in call order.

    Returns:
        how many were replaced.
    """
    found = 0
    for node in list(program.nodes()):
        match = _from_sdpa(node) if node.target is _SDPA else _from_softmax(node)
        if match is None:
            continue
        q, k, v, mask, bias, options = match
        cross = _length(q) != _length(k)
        with provenance(program, "capture", like=node), program.graph.inserting_before(node):
            new = program.graph.call_function(
                ATTENTION, (q, k, v, mask, bias), {**options, "slot": -1 if cross else found}
            )
        new.meta["val"] = fake_value(new)
        node.replace_all_uses_with(new)
        found += 0 if cross else 1
    program.recompile()
    return found


Match = tuple[fx.Node, fx.Node, fx.Node, fx.Node | None, fx.Node | None, dict[str, Any]]


def _from_sdpa(node: fx.Node) -> Match | None:
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    arguments |= node.kwargs
    q, k, v, mask = (arguments.get(name) for name in ("query", "key", "value", "attn_mask"))
    if arguments.get("dropout_p") or q.meta["val"].ndim != 4:  # type: ignore[union-attr]
        return None
    scale = arguments.get("scale")
    kind = Kind.CAUSAL if arguments.get("is_causal") else Kind.EXPLICIT if mask is not None else Kind.BIDIRECTIONAL
    options = {
        "scale": float(scale) if isinstance(scale, int | float) else int(q.meta["val"].shape[-1]) ** -0.5,  # type: ignore
        "kind": str(kind),
    }
    boolean = mask is not None and mask.meta["val"].dtype == torch.bool  # type: ignore[union-attr]
    return q, k, v, (mask if boolean else None), (None if boolean else mask), options  # type: ignore[return-value]


def _from_softmax(node: fx.Node) -> Match | None:
    """matmul(softmax(matmul(q, k^T) * scale [+ bias] [masked]), v), all four-dimensional."""
    if node.target is not aten.matmul.default:
        return None
    weights, v = _through(node.args[0]), node.args[1]
    if weights.op != "call_function" or weights.target not in (aten.softmax.int, aten._softmax.default):
        return None
    axis = weights.args[1]
    logits, scale, bias, mask = _through(weights.args[0]), 1.0, None, None
    if axis not in (-1, 3) or node.meta["val"].ndim != 4:
        return None
    if logits.target is aten.masked_fill.Scalar and float(logits.args[2]) < -1e4:  # type: ignore[arg-type]
        mask, logits = logits.args[1], _through(logits.args[0])
    elif logits.target is aten.add.Tensor and isinstance(logits.args[1], fx.Node):
        bias, logits = logits.args[1], _through(logits.args[0])
    if logits.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(logits.args[1], int | float):
        factor = float(logits.args[1])
        scale, logits = (factor if logits.target is aten.mul.Tensor else 1 / factor), _through(logits.args[0])
    if logits.op != "call_function" or logits.target is not aten.matmul.default:
        return None
    q, transposed = logits.args
    if transposed.target is not aten.transpose.int or {int(a) % 4 for a in transposed.args[1:]} != {2, 3}:  # type: ignore
        return None
    k = transposed.args[0]  # type: ignore[union-attr]
    if any(operand.meta["val"].ndim != 4 for operand in (q, k, v)):  # type: ignore[union-attr]
        return None
    if mask is not None:
        with mask.graph.inserting_after(mask):  # type: ignore[union-attr]
            keep = mask.graph.call_function(aten.logical_not.default, (mask,))  # type: ignore[union-attr]
        keep.meta |= {**mask.meta, "val": fake_value(keep)}  # type: ignore[union-attr]
        mask = keep
    kind = Kind.BIDIRECTIONAL if mask is None and bias is None else Kind.EXPLICIT
    return q, k, v, mask, bias, {"scale": scale, "kind": str(kind)}  # type: ignore[return-value]


def _through(value: Any) -> Any:
    """The value behind operators that do not change it in evaluation mode, and behind casts."""
    while isinstance(value, fx.Node) and value.target in (*_TRANSPARENT, aten._to_copy.default, aten.to.dtype):
        value = value.args[0]
    return value


def _length(node: fx.Node) -> Any:
    return node.meta["val"].shape[2]
