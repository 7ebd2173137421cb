"""The ONNX forms of `skipstone::skip_predicate`, in few operators, and of `skipstone::gate`, a condition around what it
spares.

A decoder step is so short that operators count even where they have next to nothing to compute: an FFN of the size of
GPT-2's takes as long as some two hundred of them.

Where every row skips, the condition gives zeros; else it computes the gate's value for all rows and clears those that
skip. Weights stay initializers of the model, which the branch reads from outside: none is copied, and of a branch that
is not taken none is read. Caches are written outside, since nothing that leaves the model is spared.

torch.onnx sees one symbolic operator (`symbol`), which `expand` replaces in the model that it gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import Tensor

from skipstone.ir.gates import decoding
from skipstone.runtime.onnx.tape import BranchTape

_DOMAIN, _OPERATOR = "skipstone", "Gate"


def bounds(rows: int, start: Tensor, decode_start: Tensor, *, threshold: float, warmup_tokens: int) -> Tensor:
    """float32 [B, S]: what the cosine of each token has to reach for `skip_predicate` to hold.

    Cosines that rounding takes out of [-1, 1] meet what they met inside.
    """
    bound = -math.inf if threshold <= -1 else math.inf if threshold > 1 else threshold
    decoded = decoding(rows, start, decode_start, warmup_tokens)
    return torch.where(decoded, bound, math.inf)


def predicate(before: Tensor, after: Tensor, bound: Tensor, met: Tensor | None) -> Tensor:
    """`skip_predicate` for given `bounds`: whether the cosine of [B, S, H] reaches them, or `met` holds already."""
    units = [
        torch.onnx.ops.symbolic("::LpNormalization", (x,), {"axis": -1, "p": 2}, dtype=x.dtype, shape=x.shape)
        for x in (before, after)
    ]
    reached = (units[0] * units[1]).sum(dim=-1) >= bound
    return reached if met is None else reached.bitwise_or(met)


def symbol(x: Tensor, skip: Tensor) -> Tensor:
    """The operator as torch.onnx shall see it; see `skipstone::gate` for the arguments and the result."""
    return torch.onnx.ops.symbolic(f"{_DOMAIN}::{_OPERATOR}", (x, skip), dtype=x.dtype, shape=x.shape, version=1)


def expand(model: ir.Model) -> None:
    """Replace every `symbol` in a model, and move what it spares into a branch."""
    graph = model.graph
    everywhere: dict[ir.Value, ir.Value] = {}
    for gate in [node for node in graph if (node.domain, node.op_type) == (_DOMAIN, _OPERATOR)]:
        spared = _spared(graph, gate)
        x, skip = gate.inputs
        prefix = str(gate.outputs[0].name)
        tape = BranchTape(prefix)
        if skip not in everywhere:
            everywhere[skip] = tape.op("ReduceMin", [skip], {"keepdims": 0})
        computed, skipped = (BranchTape(f"{prefix}.{branch}") for branch in ("computed", "skipped"))
        rows = computed.op("Unsqueeze", [skip, computed.integers(-1)])
        cleared = computed.op("Where", [rows, computed.number(0.0), x])
        graph.remove(spared)
        branches = {
            "then_branch": skipped.branch(_zeros(skipped, skip, x.shape[-1])),
            "else_branch": ir.Graph([], [cleared], nodes=[*spared, *computed.named()], name=computed.prefix),
        }
        result = tape.op("If", [everywhere[skip]], branches)
        nodes = tape.named()
        for node in nodes:
            node.metadata_props.update(gate.metadata_props)
        ir.convenience.replace_nodes_and_values(graph, gate, [gate], nodes, gate.outputs, [result])
    graph.opset_imports.pop(_DOMAIN, None)


def _zeros(tape: BranchTape, skip: ir.Value, width: int) -> ir.Value:
    sizes = tape.op("Concat", [tape.op("Shape", [skip]), tape.integers(width)], {"axis": 0})
    return tape.op("ConstantOfShape", [sizes])


def _spared(graph: ir.Graph, gate: ir.Node) -> list[ir.Node]:
    """The nodes whose results only the value of this gate needs, in graph order; `skipstone.ir.gates.spared`."""
    place = {inner: node for node in graph for inner in _with_branches(node)}
    skip = gate.inputs[1].producer()
    inside: dict[ir.Node, None] = {gate: None}
    for node in reversed(list(graph)[: graph.index(gate)]):
        used = [place[user] for value in node.outputs for user in value.consumers()]
        leaves = any(value.is_graph_output() for value in node.outputs)
        if used and not leaves and node is not skip and all(user in inside for user in used):
            inside[node] = None
    return list(inside)[:0:-1]


def _with_branches(node: ir.Node) -> Iterator[ir.Node]:
    """A node, and those of the branches that are its attributes."""
    yield node
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _with_branches(inner)
