"""Drop moves that cancel: heads are split and merged between operators that both want rows [B, S, N * D]."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def cancel_moves(model: ir.Model) -> None:
    """Remove transpositions that undo each other, reshapes of reshapes, and reshapes to the shape that is there."""
    results = set(model.graph.outputs)
    for node in model.graph:
        if node.op_type not in ("Transpose", "Reshape") or node.domain or node.outputs[0] in results:
            continue
        source = _undone(node) if node.op_type == "Transpose" else _reshaped(node)
        if source is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
    RemoveUnusedNodesPass()(model)


def _undone(node: ir.Node) -> ir.Value | None:
    """What a transposition of a transposition leaves as it was."""
    first = _producer(node, "Transpose")
    if first is None:
        return None
    inner, outer = (list(each.attributes["perm"].as_ints()) for each in (first, node))
    return first.inputs[0] if [inner[axis] for axis in outer] == list(range(len(outer))) else None


def _reshaped(node: ir.Node) -> ir.Value | None:
    """Let a reshape start from the first of a chain of them; that value, if it has the wanted shape already."""
    while (inner := _producer(node, "Reshape")) is not None:
        node.replace_input_with(0, inner.inputs[0])
    source, shape = node.inputs[0], node.outputs[0].shape
    if source is None or source.shape is None or shape is None:
        return None
    known = all(isinstance(size, int) or size.value is not None for size in shape)
    return source if known and source.shape == shape else None


def _producer(node: ir.Node, kind: str) -> ir.Node | None:
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer if producer is not None and producer.op_type == kind and not producer.domain else None
