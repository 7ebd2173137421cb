"""`skipstone::matmul_nbits`: a product with a weight of few bits, as `com.microsoft::MatMulNBits` defines it.

A weight [N, K] is cut along K into blocks, the last of which may reach beyond K. Each block has a scale and a zero
point: an element is ``(code - zero_point) * scale``. Of 4 bits, two codes stand in a byte, the first in its lower half,
and so do zero points (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.ir.errors import InvalidInput

BITS = (4, 8)


def check_operands(x: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> None:
    """Return if the operands of `matmul_nbits` fit each other.

    Raises:
        InvalidInput: they differ in size, or have the wrong dtype.
    """
    if bits not in BITS:
        raise InvalidInput(f"Weights of {bits} bits.", hint="MatMulNBits is used with 4 and 8.")
    if codes.dim() != 3 or (codes.dtype, zero_points.dtype) != (torch.uint8, torch.uint8):
        raise InvalidInput(f"Codes {codes.dtype} {tuple(codes.shape)}, expected bytes [N, blocks, bytes of a block].")
    columns, blocks, width = codes.shape
    size = width * 8 // bits
    if x.dim() < 2 or not (blocks - 1) * size < x.shape[-1] <= blocks * size:
        raise InvalidInput(f"{blocks} blocks of {size} weights do not fit rows {tuple(x.shape)}.")
    if scales.shape != (columns, blocks) or not scales.is_floating_point():
        raise InvalidInput(f"Scales {scales.dtype} {tuple(scales.shape)}, expected one for each of {columns, blocks}.")
    if zero_points.shape != (columns, -(-blocks * bits // 8)):
        raise InvalidInput(f"Zero points {tuple(zero_points.shape)}, expected one for each of {columns, blocks}.")


def dequantized(codes: Tensor, scales: Tensor, zero_points: Tensor, width: int, bits: int) -> Tensor:
    """The weight [N, width] in the scales' dtype; see `matmul_nbits` for the arguments."""
    if bits == 4:
        codes, zero_points = (torch.stack((each & 15, each >> 4), dim=-1).flatten(-2) for each in (codes, zero_points))
    offsets = zero_points[:, : scales.shape[1]].unsqueeze(-1)
    steps = codes.to(scales.dtype) - offsets.to(scales.dtype)
    return (steps * scales.unsqueeze(-1)).flatten(1)[:, :width]


@torch.library.custom_op("skipstone::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, *, bits: int, activations: str = "float32"
) -> Tensor:
    """``x @ weight.T`` for the weight that the codes stand for.

    Args:
        x: [..., K], with two dimensions or more.
        codes: uint8 [N, blocks, block size * bits / 8].
        scales: float [N, blocks].
        zero_points: uint8 [N, ceil(blocks * bits / 8)].
        bits: of a code, 4 or 8.
        activations: ``"int8"`` lets a runtime round each block of `x` to 8 bits for the product. This reference does
            not.
    Returns:
        [..., N] in x's dtype; the weight has the wider of x's dtype and that of the scales.
    Raises:
        InvalidInput: the operands do not fit each other.
    """
    check_operands(x, codes, scales, zero_points, bits)
    scales = scales.to(torch.promote_types(x.dtype, scales.dtype))
    return F.linear(x.to(scales.dtype), dequantized(codes, scales, zero_points, x.shape[-1], bits)).to(x.dtype)


@matmul_nbits.register_fake
def _(x, codes, scales, zero_points, *, bits, activations="float32"):  # type: ignore[no-untyped-def]
    check_operands(x, codes, scales, zero_points, bits)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


MATMUL_NBITS = torch.ops.skipstone.matmul_nbits.default
