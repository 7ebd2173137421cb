"""`skipstone::experts`: a mixture of experts as one operator of the dialect.

Which experts a token takes, and with which weights, is decided outside. The operator computes the chosen experts: each
is a small FFN, and the matrices of all are stacked along the first dimension.
"""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(StrEnum):
    """The activation between an expert's two products; swish is ``x * sigmoid(alpha * x)``, SiLU with alpha 1."""

    SWISH = "swish"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU_SQUARED = "relu_squared"


class Layout(StrEnum):
    """What the first product gives: the gate and then the up part, both in turn, or no gate at all."""

    CONCATENATED = "concatenated"
    INTERLEAVED = "interleaved"
    UNGATED = "ungated"


def activate(x: Tensor, activation: str, alpha: float) -> Tensor:
    """The activation of `x`, of any shape; see `Activation`."""
    match Activation(activation):
        case Activation.SWISH:
            return x * torch.sigmoid(alpha * x)
        case Activation.GELU:
            return F.gelu(x)
        case Activation.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        case Activation.RELU:
            return F.relu(x)
        case Activation.RELU_SQUARED:
            return F.relu(x).square()


def gated(x: Tensor, activation: str, layout: str, alpha: float, limit: float, shift: float) -> Tensor:
    """``activation(gate) * (up + shift)`` of a first product [T, 2 * I]; ``activation(x)`` [T, I] without a gate.

    A positive `limit` bounds the gate from above and the up part on both sides.
    """
    match Layout(layout):
        case Layout.UNGATED:
            return activate(x, activation, alpha)
        case Layout.CONCATENATED:
            gate, up = x.chunk(2, dim=-1)
        case Layout.INTERLEAVED:
            gate, up = x[..., ::2], x[..., 1::2]
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return activate(gate, activation, alpha) * (up + shift)


def experts_reference(
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
    """`experts` in plain PyTorch operators; gradients pass through it."""
    exact = torch.promote_types(x.dtype, torch.float32)
    result = torch.zeros_like(x, dtype=exact)

    def product(rows: Tensor, stack: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        matrix = stack[expert].to(exact)
        return F.linear(rows, matrix.T if transposed else matrix, None if bias is None else bias[expert].to(exact))

    for expert in index.unique().tolist():
        if 0 <= expert < up.shape[0]:
            token, choice = torch.where(index == expert)
            hidden = product(x[token].to(exact), up, up_bias, expert)
            hidden = gated(hidden, activation, layout, alpha, limit, shift)
            out = product(hidden, down, down_bias, expert)
            result.index_add_(0, token, out * weights[token, choice, None].to(exact))
    return result.to(x.dtype)


@torch.library.custom_op("skipstone::experts", mutates_args=())
def experts(
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
    """The weighted sum of the chosen experts of each token, in the wider of float32 and the input's dtype.

    Args:
        x: [T, H], one row a token.
        index: int64 [T, K], the experts of each token. A number outside of 0 to E - 1 names none and adds nothing.
        weights: [T, K], the factor of each chosen expert's result.
        up: [E, U, H], the first matrix of each expert, with U = I where the layout is ungated and 2 * I elsewhere.
        down: [E, H, I], the second.
        up_bias, down_bias: [E, U] and [E, H].
        activation, alpha: see `Activation`.
        layout: see `Layout`.
        limit: bound of the gate from above and of the up part on both sides, 0 for none.
        shift: added to the up part.
        transposed: the matrices are [E, H, U] and [E, I, H].
    Returns:
        [T, H] in x's dtype.
    """
    options = {"activation": activation, "layout": layout, "alpha": alpha, "limit": limit, "shift": shift}
    operands = (x, index, weights, up, down, up_bias, down_bias)
    return experts_reference(*operands, **options, transposed=transposed)  # type: ignore[arg-type]


@experts.register_fake
def _(x, index, weights, up, down, up_bias=None, down_bias=None, **options):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


EXPERTS = torch.ops.skipstone.experts.default
