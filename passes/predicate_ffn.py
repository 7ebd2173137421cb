"""Let the linear layers that a gate spares look at its decision themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from skipstone.ir.cost import is_view
from skipstone.ir.dialect import GATE, PREDICATED_LINEAR
from skipstone.ir.errors import Unsupported
from skipstone.ir.gates import spared
from skipstone.ir.linear import operator_name
from skipstone.ir.linear_layer import LinearLayer, linear_layer
from skipstone.ir.program import Program, module_path, provenance
from skipstone.ir.row_local import is_row_local
from skipstone.passes.base import Pass, Remark

aten = torch.ops.aten

_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class PredicateFFN(Pass):
    """Turn the linear layers that gates spare into `predicated_linear`, which reads no weight where every row skips.

    For targets that cannot leave out a part of the graph without waiting for the device. What stands between the linear
    layers (norm, activation, product) is computed on the zeros of the rows that skip. It keeps rows apart, as the proof
    for the cache says or, without a cache of ours, the form of each operator, so that no other row changes; what it
    makes of zeros, the gate clears. A gate right behind a linear layer that obeys, bias or not, has nothing left to
    clear and goes.

    It is all linear layers of a gate or none: a gate is left as it was where another operator reads a matrix (experts).
    """

    name: ClassVar[str] = "predicate_ffn"

    def check(self, program: Program) -> None:
        """See `Pass.check`."""
        gates, refusals = list(program.nodes(GATE)), []
        for gate in gates:
            try:
                _linear_layers(program, gate)
            except Unsupported as reason:
                refusals.append(reason)
        if refusals and len(refusals) == len(gates):
            raise refusals[0]

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        remarks = []
        for gate in list(program.nodes(GATE)):
            where = module_path(gate)
            try:
                layers = _linear_layers(program, gate)
            except Unsupported as reason:
                remarks.append(self.refused(where, reason.feature))
                continue
            for layer in layers:
                _predicate(program, layer, gate.args[1])
            _remove_if_obeyed(program, gate)
            size = sum(layer.weight_bytes for layer in layers)
            remarks.append(self.applied(where, f"{len(layers)} linear layers obey its gate", spared_bytes=size))
        return remarks or [self.missed("model", "no gate")]


def _linear_layers(program: Program, gate: fx.Node) -> list[LinearLayer]:
    """All calls that read a matrix and are spared by a gate.

    Raises:
        Unsupported: one of them is no linear layer, or its rows are not known to be tokens; or tokens may meet.
    """
    layers, rows = [], gate.args[1].meta["val"].shape  # type: ignore[union-attr]
    is_proved = bool(program.slots())
    for node in spared(gate):
        matrices = [operand for operand in node.all_input_nodes if _is_matrix(operand)]
        if is_view(node) or not matrices:
            if not is_proved and not is_row_local(node, rows):
                what = f"a gate that spares {operator_name(node)} ({node.name}), by which tokens may meet"
                raise Unsupported(what, where=module_path(node), hint="Take this layer out of those that it may skip.")
            continue
        layer = _linear(node, rows)
        if layer is None or layer.weight not in matrices:
            what = f"a gate that spares {operator_name(node)} ({node.name}), which is no linear layer of tokens"
            hint = "Take this layer out of those that skip_ffn_adaptive may skip, or that out of the plan."
            raise Unsupported(what, where=module_path(node), hint=hint)
        layers.append(layer)
    if not layers:
        raise Unsupported("a gate that spares no linear layer", where=module_path(gate))
    return layers


def _is_matrix(node: fx.Node) -> bool:
    """Whether a value is a tensor of the program with more than one dimension, or a view of one."""
    while node.op == "call_function" and is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr" and sum(size > 1 for size in node.meta["val"].shape) > 1


def _linear(node: fx.Node, tokens: Any) -> LinearLayer | None:
    """The linear layer that a call is, if its rows are the tokens; its `x` is then what holds them as [B, S, H]."""
    layer = linear_layer(node)
    rows = None if layer is None else _token_rows(layer.x, tokens)
    if layer is None or rows is None or layer.weight.meta["val"].dim() != 2:
        return None
    columns = layer.weight.meta["val"].shape[1 if layer.transposed else 0]
    fits = layer.bias is None or layer.bias.meta["val"].shape == (columns,)
    return replace(layer, x=rows) if fits else None


def _token_rows(x: fx.Node, tokens: Any) -> fx.Node | None:
    """The value [B, S, H] of which x is all rows in order, in one dimension or in two."""

    def is_rows(value: Tensor) -> bool:
        return value.dim() == 3 and value.shape[:2] == tokens

    rows: Any = x
    while not is_rows(rows.meta["val"]) and rows.target in _RESHAPES:
        rows = rows.args[0]
    value = rows.meta["val"]
    return rows if is_rows(value) and value.shape[-1] == x.meta["val"].shape[-1] else None


def _predicate(program: Program, layer: LinearLayer, skip: Any) -> None:
    """Put a `predicated_linear` in the place of a linear layer."""
    node = layer.node
    with provenance(program, PredicateFFN.name, like=node), program.graph.inserting_before(node):
        weight = layer.weight
        if layer.transposed:
            is_transpose = weight.target is aten.t.default
            weight = weight.args[0] if is_transpose else program.call(aten.t.default, weight)  # type: ignore[assignment]
        result = program.call(PREDICATED_LINEAR, layer.x, weight, skip, layer.bias)
        if node.meta["val"].dim() == 2:
            result = program.call(aten.reshape.default, result, [-1, result.meta["val"].shape[-1]])
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)


def _remove_if_obeyed(program: Program, gate: fx.Node) -> None:
    """Remove a gate that stands right behind a linear layer with the same decision: its rows are zeros already."""
    x, skip = gate.args
    source: Any = x
    while source.target in _RESHAPES:
        source = source.args[0]
    if source.target is PREDICATED_LINEAR and source.args[2] is skip and _token_rows(x, source.meta["val"].shape[:2]):  # type: ignore[arg-type]
        gate.replace_all_uses_with(x)  # type: ignore[arg-type]
        program.graph.erase_node(gate)
