"""Keep the weights of linear layers in 4 or 8 bits, rounded by ONNX Runtime's own quantizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from skipstone.ir.cost import is_view
from skipstone.ir.dialect import EXPERTS, MATMUL_NBITS
from skipstone.ir.errors import InternalError
from skipstone.ir.linear_layer import LinearLayer, linear_layer
from skipstone.ir.program import Program, module_path, provenance
from skipstone.passes.base import Pass, Remark

aten = torch.ops.aten

_TRANSPOSES = (aten.t.default, aten.transpose.int)
_READERS = (
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default, aten.bmm.default,
    aten.baddbmm.default, aten.einsum.default, aten.conv1d.default, aten.conv2d.default, aten.convolution.default,
    EXPERTS, aten.embedding.default,
)  # fmt: skip
"""What reads matrices of weights."""


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Turn each linear layer into `matmul_nbits`, a product with a weight of few bits.

    Weights are cut into blocks along the dimension that is summed over. Each block has a float32 scale and a zero
    point of its own, and its elements are rounded to the nearest code: there is no calibration, and 4 bits in blocks of
    32 take 5.1 bits a weight. Embedding tables, experts, and stacks of several weights (`FuseParallel`) stay as they
    are. A table that is the weight of the head, too, is then kept twice: as a table, and as codes.

    Attributes:
        bits: of a weight.
        block_size: weights that share a scale.
        activations: what products read on ONNX Runtime. ``"int8"`` also rounds each block of a layer's input to 8 bits,
            which is faster; where a CPU has no kernel for that, they are read as they are.
    """

    name: ClassVar[str] = "quantize_weights"

    bits: Literal[4, 8] = 4
    block_size: Literal[16, 32, 64, 128, 256] = 32
    activations: Literal["float32", "int8"] = "float32"

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        weights = _Weights(program, self)
        remarks = []
        for node in list(program.nodes()):
            if (product := _product(node)) is not None:
                remarks.append(self._quantize(program, product, weights))
        program.recompile()
        if self.bits == 8 and self.activations == "float32" and remarks:
            why = "activations in float32: ONNX Runtime unpacks weights of 8 bits anew each time; 'int8' is faster"
            remarks.append(self.missed("model", why))
        return remarks + [
            self.missed(module_path(node) or node.name, why)
            for node in program.nodes(*_READERS)
            for operand in node.all_input_nodes
            if (why := weights.left(node, operand))
        ]

    def _quantize(self, program: Program, product: LinearLayer, weights: _Weights) -> Remark:
        node = product.node
        with provenance(program, self.name, like=node), program.graph.inserting_before(node):
            operands = weights.operands(product)
            options = {"bits": self.bits, "activations": self.activations}
            result = program.call(MATMUL_NBITS, product.x, *operands, **options)
            if product.bias is not None:
                result = program.call(aten.add.Tensor, result, product.bias)
        node.replace_all_uses_with(result)
        program.graph.erase_node(node)
        before, after = (sum(each.meta["val"].nbytes for each in own) for own in ([product.weight], operands))
        where = module_path(result) or result.name
        return self.applied(where, f"{self.bits} bits in blocks of {self.block_size}", bytes=after, bytes_before=before)

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        for node in program.nodes():
            if _product(node) is not None:
                raise InternalError(f"{node.name} still reads a weight in full precision")


def _product(node: fx.Node) -> LinearLayer | None:
    """The linear layer that a call is, if its weight is a matrix of the program."""
    layer = linear_layer(node)
    if layer is None:
        return None
    if layer.weight.target in _TRANSPOSES and layer.weight.args[0].meta["val"].dim() == 2:  # type: ignore[union-attr]
        layer = replace(layer, weight=layer.weight.args[0], transposed=not layer.transposed)  # type: ignore[arg-type]
    value = layer.weight.meta["val"]
    is_matrix = layer.weight.op == "get_attr" and value.dim() == 2 and value.is_floating_point()
    return layer if is_matrix and layer.x.op != "get_attr" and layer.x.meta["val"].dim() >= 2 else None


@dataclass
class _Weights:
    """The quantized weights of a program; what several layers read is quantized and kept once."""

    program: Program
    config: QuantizeWeights
    nodes: dict[Any, list[fx.Node]] = field(default_factory=dict)

    def operands(self, product: LinearLayer) -> list[fx.Node]:
        """Codes, scales and zero points of a layer's weight, for which nodes stand before their first use."""
        name = str(product.weight.target)
        weight = self.program.tensor(name)
        key = weight.data_ptr(), tuple(weight.shape), weight.stride(), product.transposed
        if key not in self.nodes:
            bits = self.config.bits
            parts = quantized(weight.T if product.transposed else weight, bits, self.config.block_size)
            stem = self._free(f"{name.replace('.', '_')}_Q{bits}")
            names = (stem, f"{stem}_scales", f"{stem}_zero_points")
            self.nodes[key] = [self.program.add_tensor(*each) for each in zip(names, parts, strict=True)]
        return self.nodes[key]

    def left(self, node: fx.Node, operand: fx.Node) -> str:
        """How an operand of a call stays as it is, if it is a matrix of weights that does; else ""."""
        while operand.op == "call_function" and is_view(operand) and isinstance(operand.args[0], fx.Node):
            operand = operand.args[0]
        if operand.op != "get_attr" or operand.meta["val"].dim() < 2 or not operand.meta["val"].is_floating_point():
            return ""
        weight = self.program.tensor(str(operand.target))
        why = "not a matrix that all rows are multiplied by, which MatMulNBits takes"
        if node.target is aten.embedding.default:
            twice = any(key[0] == weight.data_ptr() for key in self.nodes)
            why = "a table" + (", beside the codes that a linear layer has of it" if twice else "")
        return f"{weight.nbytes:,} bytes in {str(weight.dtype).removeprefix('torch.')}: {why}"

    def _free(self, name: str) -> str:
        number, free = 1, name
        while hasattr(self.program.module, free):
            number, free = number + 1, f"{name}_{number}"
        return free


def quantized(weight: Tensor, bits: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a weight [N, K], as `skipstone::matmul_nbits` takes them."""
    with _logging_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    quantizer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=block_size, bits=bits))
    columns = weight.detach().T.float().cpu().contiguous().numpy()
    codes, scales, zero_points = map(torch.from_numpy, quantizer.qbits_block_quant(columns))
    return codes.to(weight.device), scales.to(weight.device), zero_points.to(weight.device)


@contextmanager
def _logging_kept() -> Iterator[None]:
    """Leave logging as the user has set it up: ONNX Runtime's quantizer configures it when it is imported."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
