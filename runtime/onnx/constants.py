"""Compute what follows from constants alone, and keep each of them once.

torch.onnx spells sizes, axes and indices out at every node: casts and reshapes of constants, a large part of a small
model's graph. ONNX Runtime folds them when it loads a model; here it is done once, so that files and graphs are as
small as what they say. Parameters are left alone: they keep their names, and the memory that they share.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants as fold

LARGEST = 128
"""Elements of the largest constants that are folded."""


def fold_constants(model: ir.Model) -> None:
    """Fold small constants; those that are left become initializers, each value once."""
    initializers = model.graph.initializers
    parameters = set(initializers)

    def should_fold(node: ir.Node) -> bool | None:
        reads_parameter = any(value is not None and value.name in parameters for value in node.inputs)
        return False if reads_parameter else None  # None: as by default

    fold(model, input_size_limit=LARGEST, output_size_limit=LARGEST, should_fold=should_fold)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    known: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for name, constant in list(initializers.items()):
        tensor = constant.const_value
        if name in parameters or constant.is_graph_output() or tensor is None:
            continue
        first = known.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), constant)
        if first is constant:
            constant.name = f"constants.{len(known) - 1}"
        else:
            ir.convenience.replace_all_uses_with(constant, first)
    RemoveUnusedNodesPass()(model)
