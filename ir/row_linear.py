"""`skipstone::row_linear`: linear layers of few rows, with the norm before them and what is made of their results.

To decode is to multiply a row, or a few, with every weight of the model. Such a product takes as long as reading its
weight; norms, activations, rotary embeddings and sums take longer to begin than to do. So they are parts of it here.
Layers that run at the same time are lanes, each with weights and a gain of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.ir.errors import InvalidInput

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}

MOST_ROWS = 8
"""Of kernels. More rows are for matrix products of tensor cores."""


def check_operands(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gain: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    head_sizes: Sequence[int] | None,
    activation: str,
    is_gated: bool,
) -> None:
    """Return if the operands of `row_linear` fit each other.

    Raises:
        InvalidInput: they differ in size, dtype or device, or ask for what there is not.
    """
    if activation not in ACTIVATIONS:
        raise InvalidInput(f"The activation {activation!r} is none of {', '.join(ACTIVATIONS)}.")
    if not weights or len(weights) != len(biases):
        raise InvalidInput(f"{len(weights)} weights with {len(biases)} biases.")
    if x.dim() != 3 or any(weight.dim() != 3 or weight.shape[2] != x.shape[2] for weight in weights):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise InvalidInput(f"Weights {shapes} do not fit rows {tuple(x.shape)}.")
    lanes, rows, width = weights[0].shape[0], x.shape[1], x.shape[2]
    if x.shape[0] not in (1, lanes) or any(weight.shape[0] != lanes for weight in weights):
        raise InvalidInput(f"Rows of {x.shape[0]} lanes with weights of {[weight.shape[0] for weight in weights]}.")
    if is_gated and (len(weights) != 2 or weights[0].shape != weights[1].shape):
        raise InvalidInput("A gated product has two weights of one shape.")
    for weight, bias in zip(weights, biases, strict=True):
        if bias is not None and bias.shape != weight.shape[:2]:
            raise InvalidInput(f"A bias {tuple(bias.shape)} does not fit a weight {tuple(weight.shape)}.")
    if gain is not None and gain.shape not in ((1, width), (lanes, width)):
        raise InvalidInput(f"A gain {tuple(gain.shape)} does not fit rows {tuple(x.shape)}.")
    total = columns(weights, is_gated)
    if residual is not None and residual.shape not in ((1, rows, total), (lanes, rows, total)):
        raise InvalidInput(f"Rows {tuple(residual.shape)} cannot be added to the results.")
    if skip is not None and (skip.shape != (rows,) or skip.dtype != torch.bool or skip.device != x.device):
        raise InvalidInput(f"Decisions {skip.dtype} {tuple(skip.shape)} on {skip.device} are not one bool a row.")
    _check_rotation(rows, weights, cos, sin, head_sizes, activation != "none" or is_gated or residual is not None)
    others = [each for each in (*weights, *biases, gain, residual, cos, sin) if each is not None]
    if any(other.dtype != x.dtype or other.device != x.device for other in others):
        raise InvalidInput(f"Rows of {x.dtype} on {x.device} with operands of other dtypes or devices.")


def _check_rotation(
    rows: int,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    head_sizes: Sequence[int] | None,
    has_more: bool,
) -> None:
    if (cos is None) != (sin is None) or (cos is None) != (not head_sizes):
        raise InvalidInput("A rotary embedding has cosines, sines and head sizes, or none of them.")
    if cos is None or sin is None or not head_sizes:
        return
    if has_more:
        raise InvalidInput("Nothing but a rotary embedding is behind a product that has one.")
    if len(head_sizes) != len(weights) or any(size not in (0, cos.shape[-1]) for size in head_sizes):
        raise InvalidInput(f"Heads of {list(head_sizes)} channels do not fit cosines of {cos.shape[-1]}.")
    if cos.shape != (rows, cos.shape[-1]) or sin.shape != cos.shape or cos.shape[-1] % 2:
        raise InvalidInput(f"Cosines {tuple(cos.shape)} and sines {tuple(sin.shape)} do not fit {rows} rows.")
    if any(size and weight.shape[1] % size for weight, size in zip(weights, head_sizes, strict=True)):
        raise InvalidInput(f"Weights {[tuple(weight.shape) for weight in weights]} are not of whole heads.")


def columns(weights: Sequence[Tensor], is_gated: bool) -> int:
    """The width of the results."""
    return weights[0].shape[1] if is_gated else sum(weight.shape[1] for weight in weights)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of rows [..., F] of heads that stand side by side, by cosines and sines [..., head size]."""
    heads = x.unflatten(-1, (-1, cos.shape[-1]))
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (heads * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).flatten(-2)


@torch.library.custom_op("skipstone::row_linear", mutates_args=())
def row_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gain: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    head_sizes: Sequence[int] | None = None,
    eps: float | None = None,
    offset: float = 0.0,
    activation: str = "none",
    is_gated: bool = False,
) -> Tensor:
    """``y_i = norm(x) @ weights[i].T + biases[i]``, and ``activation(y_0) * y_1`` if gated, or else all of them joined.

    Without a gate, the activation is that of every result; `residual` is added last. Queries and keys get their rotary
    embedding (RoFormer, arXiv 2104.09864), ``y cos + rotate_half(y) sin`` for each head. All of it is computed in the
    wider of float32 and x's dtype, and rounded once.

    Args:
        x: [L, R, D] for L lanes and R rows. Of `x`, `gain` and `residual`, one lane stands for all.
        weights: [L, F_i, D] each.
        biases: [L, F_i] or None each.
        gain: [L, D] of the norm, None for one.
        residual: [L, R, F].
        skip: bool [R]: products of these rows are zeros, whatever `x` and the weights hold. No weight is read where all
            rows skip.
        cos, sin: [R, head size] of the rotary embedding.
        head_sizes: of each weight whose results have it; 0 for the others.
        eps: of the RMSNorm ``x * rsqrt(mean(x ** 2) + eps) * (gain + offset)``; None for no norm.
        offset: added to the gain.
        activation: one of `ACTIVATIONS`.
        is_gated: multiply two products.
    Returns:
        [L, R, F] in x's dtype, with F the sum of all F_i, or F_0 if gated.
    Raises:
        InvalidInput: see `check_operands`.
    """
    check_operands(x, weights, biases, gain, residual, skip, cos, sin, head_sizes, activation, is_gated)
    exact = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(exact)
    if eps is not None:
        rows = rows * (rows.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        rows = rows if gain is None else rows * (gain.to(exact).unsqueeze(1) + offset)
    products = [rows @ weight.to(exact).mT for weight in weights]
    products = [
        each if bias is None else each + bias.to(exact).unsqueeze(1)
        for each, bias in zip(products, biases, strict=True)
    ]
    if cos is not None and sin is not None and head_sizes:
        products = [
            rotate(each, cos.to(exact), sin.to(exact)) if size else each
            for each, size in zip(products, head_sizes, strict=True)
        ]
    act = ACTIVATIONS[activation]
    result = act(products[0]) * products[1] if is_gated else act(torch.cat(products, dim=-1))
    if skip is not None:
        result = result.masked_fill(skip.unsqueeze(-1), 0)
    return (result if residual is None else result + residual.to(exact)).to(x.dtype)


@row_linear.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weights, biases, gain=None, residual=None, skip=None, cos=None, sin=None, *, head_sizes=None, eps=None,
    offset=0.0, activation="none", is_gated=False
):  # fmt: skip
    check_operands(x, weights, biases, gain, residual, skip, cos, sin, head_sizes, activation, is_gated)
    return x.new_empty(weights[0].shape[0], x.shape[1], columns(weights, is_gated))


ROW_LINEAR = torch.ops.skipstone.row_linear.default
