"""The ONNX form of `skipstone::experts`: for each expert a condition around its two products.

An expert that no token chose costs a condition and reads no weights, and one that is chosen works on its rows together,
so that one form serves decode and prefill. The matrices of each expert are initializers of their own that alias their
part of the stack: weights are never gathered or copied. (ONNX Runtime's own MoE kernel takes, on CPUs, interleaved
SwiGLU alone.)

torch.onnx sees one symbolic operator (`symbol`), which `expand` replaces in the model that it gives.
"""

from __future__ import annotations

import sys
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from skipstone.ir.dialect import Activation, Layout
from skipstone.runtime.onnx.tape import BranchTape

_DOMAIN, _OPERATOR = "skipstone", "Experts"
_MICROSOFT = "com.microsoft"


def symbol(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    layout: str,
    alpha: float = 1.0,
    limit: float = 0.0,
    shift: float = 0.0,
    transposed: bool = False,
) -> Tensor:
    """The operator as torch.onnx shall see it; see `skipstone::experts` for the arguments and the result."""
    sizes = {"experts": up.shape[0], "choices": index.shape[1], "width": x.shape[1]}
    gate: dict[str, Any] = {"activation": activation, "layout": layout, "alpha": alpha, "limit": limit, "shift": shift}
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{_OPERATOR}",
        (x, index, weights, up, down, up_bias, down_bias),
        {**sizes, **gate, "transposed": int(transposed)},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def expand(model: ir.Model) -> None:
    """Replace every `symbol` in a model by operators that ONNX Runtime has."""
    graph = model.graph
    for node in [node for node in graph if (node.domain, node.op_type) == (_DOMAIN, _OPERATOR)]:
        stacks = node.inputs[3:5]
        _Expansion(graph, node).run()
        for stack in stacks:
            if stack in graph.initializers.values() and not stack.uses():
                graph.initializers.pop(stack.name)
    graph.opset_imports.pop(_DOMAIN, None)


class _Expansion:
    """Replaces one node; all tokens' choices [T, K] are looked at as one row of T * K."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.x, self.index, self.weights, self.up, self.down, *biases = node.inputs
        self.up_bias, self.down_bias = (*biases, None, None)[:2]  # torch.onnx leaves out those at the end
        self.option: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}

    def run(self) -> None:
        option, tape = self.option, BranchTape(f"{self.node.outputs[0].name}")
        experts, choices, width = option["experts"], option["choices"], option["width"]
        index = tape.op("Reshape", [self.index, tape.integers(-1)])
        chosen = tape.op("Equal", [tape.op("Unsqueeze", [tape.integers(*range(experts)), tape.integers(1)]), index])
        # The choices of expert 0, then those of expert 1, ...; a choice that names no expert is not among them.
        sorted_choices = tape.op("Gather", [tape.op("NonZero", [chosen]), tape.integer(1)])
        ones = tape.op("Cast", [chosen], {"to": ir.DataType.INT64})
        counts = tape.op("ReduceSum", [ones, tape.integers(1)], {"keepdims": 0})
        of_expert = tape.op_multi_out("Split", [sorted_choices, counts], num_outputs=experts)
        used = tape.op("Cast", [counts], {"to": ir.DataType.BOOL})
        is_used = tape.op_multi_out("Split", [used], {"num_outputs": experts}, num_outputs=experts)
        rows = tape.op("Concat", [self._expert(tape, e, is_used[e], of_expert[e]) for e in range(experts)], {"axis": 0})
        weights = tape.op("Reshape", [self.weights, tape.integers(-1, 1)])
        rows = tape.op("Mul", [rows, tape.op("Gather", [weights, sorted_choices])])
        size = tape.op("Concat", [tape.op("Shape", [index]), tape.integers(width)], {"axis": 0})
        places = tape.op("Unsqueeze", [sorted_choices, tape.integers(1)])
        rows = tape.op("ScatterND", [tape.op("ConstantOfShape", [size]), places, rows])
        rows = tape.op("Reshape", [rows, tape.integers(-1, choices, width)])
        result = tape.op("ReduceSum", [rows, tape.integers(1)], {"keepdims": 0})
        nodes = tape.named()
        for node in nodes:
            node.metadata_props.update(self.node.metadata_props)
        ir.convenience.replace_nodes_and_values(self.graph, self.node, [self.node], nodes, self.node.outputs, [result])

    def _expert(self, tape: BranchTape, expert: int, used: ir.Value, choices: ir.Value) -> ir.Value:
        """The rows [n, H] that an expert gives for its n choices; without any the expert is not computed."""
        name = f"{tape.prefix}.expert_{expert}"
        inside = BranchTape(f"{name}.then")
        rows = inside.op("Gather", [self.x, inside.op("Div", [choices, inside.integer(self.option["choices"])])])
        rows = self._product(inside, rows, self.up, self.up_bias, expert)
        rows = self._product(inside, self._gate(inside, rows), self.down, self.down_bias, expert)
        other = BranchTape(f"{name}.else")
        nothing = other.op("Constant", [], {"value": ir.tensor(torch.zeros(0, self.option["width"]))})
        branches = {"then_branch": inside.branch(rows), "else_branch": other.branch(nothing)}
        return tape.op("If", [used], branches)

    def _product(
        self, tape: BranchTape, rows: ir.Value, stack: ir.Value, bias: ir.Value | None, expert: int
    ) -> ir.Value:
        matrix = self._part(tape, stack, expert)
        if self.option["transposed"]:
            rows = tape.op("MatMul", [rows, matrix])
        else:
            rows = tape.op("FusedMatMul", [rows, matrix], {"transB": 1}, domain=_MICROSOFT)
        return rows if bias is None else tape.op("Add", [rows, tape.op("Gather", [bias, tape.integer(expert)])])

    def _part(self, tape: BranchTape, stack: ir.Value, expert: int) -> ir.Value:
        """The matrix of one expert: an initializer over its part of the stack's memory."""
        if stack.const_value is None:
            return tape.op("Gather", [stack, tape.integer(expert)])
        name = f"{stack.name}.{expert}"
        if name not in self.graph.initializers:
            part = ir.tensor(torch.from_numpy(stack.const_value.numpy())[expert], name=name)
            self.graph.register_initializer(
                ir.Value(name=name, shape=part.shape, type=ir.TensorType(part.dtype), const_value=part)
            )
        return self.graph.initializers[name]

    def _gate(self, tape: BranchTape, rows: ir.Value) -> ir.Value:
        """`skipstone.ir.experts.gated`."""
        limit = self.option["limit"]
        match Layout(self.option["layout"]):
            case Layout.UNGATED:
                return self._activate(tape, rows)
            case Layout.CONCATENATED:
                gate, up = tape.op_multi_out("Split", [rows], {"axis": -1, "num_outputs": 2}, num_outputs=2)
            case Layout.INTERLEAVED:
                to_end = [tape.integers(sys.maxsize), tape.integers(-1), tape.integers(2)]
                gate, up = (tape.op("Slice", [rows, tape.integers(first), *to_end]) for first in (0, 1))
        if limit > 0:
            gate = tape.op("Min", [gate, tape.number(limit)])
            up = tape.op("Clip", [up, tape.number(-limit), tape.number(limit)])
        if self.option["shift"] != 0:
            up = tape.op("Add", [up, tape.number(self.option["shift"])])
        return tape.op("Mul", [self._activate(tape, gate), up])

    def _activate(self, tape: BranchTape, rows: ir.Value) -> ir.Value:
        """`skipstone.ir.experts.activate`."""
        match Activation(self.option["activation"]):
            case Activation.SWISH:
                return tape.op("QuickGelu", [rows], {"alpha": self.option["alpha"]}, domain=_MICROSOFT)
            case Activation.GELU:
                return tape.op("Gelu", [rows])
            case Activation.GELU_TANH:
                return tape.op("Gelu", [rows], {"approximate": "tanh"})
            case Activation.RELU:
                return tape.op("Relu", [rows])
            case Activation.RELU_SQUARED:
                positive = tape.op("Relu", [rows])
                return tape.op("Mul", [positive, positive])
