"""Newer versions of the standard operators, through ONNX's version converter."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import version_converter

from skipstone.ir.errors import InvalidInput, Unsupported

OPSET = 23
"""The version that torch.onnx writes."""


def check_opset(opset: int) -> None:
    """Refuse a version that there is no way to.

    Raises:
        InvalidInput: it is lower than `OPSET`, or newer than the installed ONNX knows.
    """
    newest = onnx.defs.onnx_opset_version()
    if type(opset) is not int or not OPSET <= opset <= newest:
        hint = f"Versions {OPSET} to {newest} can be written here."
        raise InvalidInput(f"opset {opset!r} cannot be written.", hint=hint)


def at_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A model with its standard operators in version `opset`; nodes keep their names and metadata.

    Raises:
        Unsupported: ONNX has no conversion for one of its operators.
    """
    if opset == OPSET:
        return model
    try:
        converted = version_converter.convert_version(model, opset)
    except (RuntimeError, onnx.checker.ValidationError) as error:  # ConvertError is a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise Unsupported(f"opset {opset} ({reason})", hint=f"Export with opset {OPSET}.") from error
    # The converter drops metadata, and sets no version of the format.
    known = {node.name: node.metadata_props for node in _nodes(model.graph)}
    for node in _nodes(converted.graph):
        if node.name in known:
            node.metadata_props.extend(known[node.name])
    converted.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(converted.opset_import, True))
    return converted


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the branches in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
