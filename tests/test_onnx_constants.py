"""Folding constants in ONNX models: what follows from constants is computed, parameters stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import parser

from skipstone.runtime.onnx.constants import LARGEST, fold_constants

MODEL = """
<ir_version: 10, opset_import: ["" : 23]>
shapes (float[2, 3, 4] x) => (float[2, N] flat, float[M] part, float[4] raised, int64 seven, int64 eight)
<float[4] gain = {1, 2, 3, 4}, int32[4] codes = {4, 3, 2, 1}>
{
   minus = Constant <value_int = -1> ()
   two = Constant <value_int = 2> ()
   one = Constant <value = int64[1] {1}> ()
   size = Cast <to = 7> (two)
   first = Reshape (size, one)
   rest = Reshape (minus, one)
   shape = Concat <axis = 0> (first, rest)
   flat = Reshape (x, shape)
   again = Cast <to = 7> (minus)
   line = Reshape (again, one)
   row = Reshape (x, line)
   zero = Constant <value_ints = [0]> ()
   steps = Constant <value_ints = [1]> ()
   stop = Reshape (size, one)
   part = Slice (row, zero, stop, zero, steps)
   decoded = Cast <to = 1> (codes)
   raised = Add (gain, decoded)
   seven = Constant <value_int = 7> ()
   whole = Constant <value_float = 8.0> ()
   eight = Cast <to = 7> (whole)
}
"""


def folded() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    before = parser.parse_model(MODEL)
    model = ir.from_proto(before)
    fold_constants(model)
    return before, ir.to_proto(model)


def results(model: onnx.ModelProto) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.arange(24, dtype=np.float32).reshape(2, 3, 4)})


def test_results_are_those_of_before() -> None:
    before, after = folded()
    onnx.checker.check_model(after)
    for mine, other in zip(results(after), results(before), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_constants_are_computed_and_each_is_there_once() -> None:
    _, after = folded()
    kinds = Counter(node.op_type for node in after.graph.node)
    kinds.pop("Constant", None)  # results that are constants stay as they are
    assert kinds == {"Reshape": 2, "Slice": 1, "Cast": 1, "Add": 1}
    constants = [each for each in after.graph.initializer if each.name not in ("gain", "codes", "seven", "eight")]
    values = [tuple(onnx.numpy_helper.to_array(each).reshape(-1).tolist()) for each in constants]
    assert sorted(values) == [(-1,), (0,), (1,), (2,), (2, -1)]
    assert all(each.name.startswith("constants.") for each in constants)


def test_parameters_are_left_alone() -> None:
    _, after = folded()
    stored = {each.name: onnx.numpy_helper.to_array(each).tolist() for each in after.graph.initializer}
    assert stored["gain"] == [1, 2, 3, 4] and stored["codes"] == [4, 3, 2, 1]
    (cast,) = [node for node in after.graph.node if node.op_type == "Cast"]
    assert list(cast.input) == ["codes"]


def test_large_constants_are_not_made() -> None:
    text = MODEL.replace("seven = Constant <value_int = 7> ()", f"n = Constant <value_ints = [{LARGEST + 1}]> ()\n"
                         "table = ConstantOfShape (n)\n total = ReduceSum <keepdims = 0> (table)\n"
                         "seven = Cast <to = 7> (total)")  # fmt: skip
    model = ir.from_proto(parser.parse_model(text))
    fold_constants(model)
    assert "ConstantOfShape" in {node.op_type for node in model.graph}
    assert all(each.const_value.size <= LARGEST for each in model.graph.initializers.values())
