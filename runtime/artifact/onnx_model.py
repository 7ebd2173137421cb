"""What an ONNX model may hold that comes from an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import onnx
from onnx.helper import tensor_dtype_to_np_dtype
from torch import Tensor

from skipstone.ir.errors import ArtifactError
from skipstone.ir.program import Program
from skipstone.runtime.onnx.lower import LoweredModel
from skipstone.runtime.session import cache_layout

DOMAINS = ("", "ai.onnx", "com.microsoft")
FOREIGN = ("EPContext",)
"""Operators that read files or hold code compiled elsewhere."""


def lowered_model(proto: bytes, tensors: Mapping[str, Tensor], written: Any, program: Program) -> LoweredModel:
    """A lowered program that was saved, if it asks for nothing outside of itself.

    Args:
        proto: the serialized model.
        tensors: its external initializers, by name.
        written: for each output that replaces a cache buffer, that buffer.
        program: what it was lowered from.
    Raises:
        ArtifactError: it has data elsewhere, operators of unknown domains, or other inputs or outputs.
        Exception: any, where the bytes are no model.
    """
    model = onnx.ModelProto.FromString(proto)
    initializers = {each.name: each for each in model.graph.initializer}
    external = [each for each in _messages(model) if isinstance(each, onnx.TensorProto) and _is_external(each)]
    for each in external:
        # ONNX Runtime reads files for all but these, which it is given in memory.
        if initializers.get(each.name) is not each or each.name not in tensors:
            raise ArtifactError(f"the tensor {each.name!r} of the ONNX model has its data elsewhere.")
        _check_type(each, tensors[each.name])
    if unused := tensors.keys() - {each.name for each in external}:
        raise ArtifactError(f"the ONNX model has no external tensor {min(unused)!r}.")
    for node in _messages(model):
        if isinstance(node, onnx.NodeProto) and (node.domain not in DOMAINS or node.op_type in FOREIGN):
            raise ArtifactError(f"the ONNX model has an operator {node.domain}.{node.op_type}.")
    inputs, outputs = (tuple(each.name for each in ports) for ports in (model.graph.input, model.graph.output))
    if inputs != tuple(port.name for port in program.inputs):
        raise ArtifactError("the ONNX model has other inputs than its program.")
    buffers = {each.name for each in cache_layout(program)}
    needed = {port.name for port in program.outputs} | written.keys()
    if not needed <= set(outputs) or not set(written.values()) <= buffers:
        raise ArtifactError("the ONNX model has other outputs than its program.")
    return LoweredModel(proto, dict(tensors), inputs, outputs, dict(written))


def _messages(message: Any) -> Iterator[Any]:
    """A message and all that it holds, at whatever depth."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else (value,):
                yield from _messages(each)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL or bool(tensor.external_data)


def _check_type(expected: onnx.TensorProto, tensor: Tensor) -> None:
    dtype = numpy.dtype(tensor_dtype_to_np_dtype(expected.data_type))
    if tuple(expected.dims) != tuple(tensor.shape) or dtype != tensor.numpy().dtype or not tensor.is_contiguous():
        raise ArtifactError(f"the tensor {expected.name!r} is not what the ONNX model expects.")
