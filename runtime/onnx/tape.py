"""Recording ONNX nodes that take the place of one node, some of them in the branches of conditions."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape


class BranchTape(Tape):
    """Records nodes whose values are named after `prefix`: a branch must not use the names of the graph around it."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def integer(self, value: int) -> ir.Value:
        return self.op("Constant", [], {"value_int": value})

    def integers(self, *values: int) -> ir.Value:
        return self.op("Constant", [], {"value_ints": values})

    def number(self, value: float) -> ir.Value:
        return self.op("Constant", [], {"value_float": value})

    def named(self) -> Sequence[ir.Node]:
        """What was recorded."""
        for number, value in enumerate(value for node in self.nodes for value in node.outputs):
            value.name = f"{self.prefix}.{number}"
        return self.nodes

    def branch(self, *results: ir.Value) -> ir.Graph:
        """What was recorded, as the branch of a condition."""
        return ir.Graph([], results, nodes=self.named(), name=self.prefix)
