"""Weights of few bits, read back from ONNX files with numpy, and put into the user's own model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.numpy_helper import to_array
from torch import nn

from tests.export_cases import all_nodes


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis, one an element."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(*packed.shape[:-1], -1)


def dequantized(codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, width: int, bits: int) -> np.ndarray:
    """The weight [N, width] in float64, element by element as the operator's documentation defines it."""
    rows, blocks, _ = codes.shape
    codes, zero_points = unpacked(codes, bits), unpacked(zero_points, bits)
    weight = np.empty((rows, width))
    for block in range(blocks):
        columns = slice(block * codes.shape[2], min((block + 1) * codes.shape[2], width))
        steps = codes[:, block, : columns.stop - columns.start].astype(np.float64) - zero_points[:, block, None]
        weight[:, columns] = steps * scales[:, block, None].astype(np.float64)
    return weight


def products(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The products with weights of few bits, those in branches, too."""
    return (node for node in all_nodes(model.graph) if node.op_type == "MatMulNBits")


def dequantized_model(model: nn.Module, file: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The user's model with the weights of an ONNX model, each found by the module path that its node has."""
    lowered = onnx.load(file)
    tensors = {each.name: to_array(each) for each in lowered.graph.initializer}
    changed = copy.deepcopy(model).to(dtype)
    for node in products(lowered):
        path = {note.key: note.value for note in node.metadata_props}["skipstone.module"]
        options = {each.name: each.i for each in node.attribute}
        parts = (tensors[name] for name in node.input[1:4])
        weight = torch.tensor(dequantized(*parts, options["K"], options["bits"]), dtype=dtype)
        module = changed.get_submodule(path)
        assert isinstance(module, nn.Linear) and module.weight.shape == weight.shape
        module.weight = nn.Parameter(weight)  # a tied one is tied no more
    return changed
