"""What decode steps run in the place of products of matrices: for single rows, a kernel or sums that Inductor fuses.

More rows are matrix products, and stay apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.ir.predicated import PREDICATED_LINEAR
from skipstone.ir.row_linear import ACTIVATIONS, ROW_LINEAR, rotate

ROWS = 1
"""Most rows for which `row_linear` is used, where it has a kernel: for more it was not measured."""


def multiply(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gain: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotated: Sequence[int],
    eps: float | None,
    offset: float,
    activation: str,
    is_gated: bool,
) -> tuple[Tensor, ...]:
    """`skipstone.ir.row_linear.row_linear`, by its kernel where there is one, apart for each weight unless gated.

    Args:
        x: [..., D]; for weights of lanes [B, S, D], the same for all of them, or [N, B, S, D].
        weights: [F, D] each, or [N, F, D]. A single one that is gated holds the gate's weight and the other's.
        biases, gain: one tensor, or one for each lane.
        residual: of the shape of the results, or the same for all lanes.
        skip: [B, S], for weights without lanes.
        cos, sin: [B, S, head size] of a rotary embedding, and
        rotated: how many of the first results of each weight have it.
    """
    is_stack = weights[0].dim() == 3
    shape = x.shape[1:-1] if is_stack and x.dim() == 4 else x.shape[:-1]
    lanes = weights[0].shape[:1] if is_stack else ()
    if has_kernel(x, shape.numel()):
        if is_gated and len(weights) == 1:
            weights = weights[0].chunk(2, dim=-2)
            biases = [None, None] if biases[0] is None else biases[0].chunk(2, dim=-1)
        widths = [weights[0].shape[-2]] if is_gated else [weight.shape[-2] for weight in weights]
        head_sizes = None
        if cos is not None:
            weights, biases, head_sizes = _at_rotated(weights, biases, rotated, cos.shape[-1])
        result = ROW_LINEAR(
            _in_lanes(x, shape.numel()),
            [weight if is_stack else weight.unsqueeze(0) for weight in weights],
            [bias if is_stack or bias is None else bias.unsqueeze(0) for bias in biases],
            gain if gain is None or gain.dim() == 2 else gain.unsqueeze(0),
            None if residual is None else _in_lanes(residual, shape.numel()),
            None if skip is None else skip.reshape(-1),
            *(None if each is None else each.reshape(-1, each.shape[-1]) for each in (cos, sin)),
            head_sizes=head_sizes, eps=eps, offset=offset, activation=activation, is_gated=is_gated,
        )  # fmt: skip
        return result.reshape(*lanes, *shape, -1).split(widths, dim=-1)
    exact = torch.promote_types(x.dtype, torch.float32)
    if eps is not None:
        rows = x.to(exact)
        rows = rows * (rows.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        if gain is not None:
            gain = gain.to(exact) + offset
            rows = rows * (gain if gain.dim() == 1 else gain.reshape(-1, *[1] * len(shape), gain.shape[-1]))
        x = rows.to(x.dtype)
    if is_stack:
        stacked = _in_lanes(x, shape.numel()).expand(*lanes, -1, -1)
        results = [matmul(stacked, weight.mT).reshape(*lanes, *shape, -1) for weight in weights]
    elif skip is not None:
        results = [PREDICATED_LINEAR(x, weight, skip, bias) for weight, bias in zip(weights, biases, strict=True)]
    else:
        results = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if cos is not None and sin is not None:
        results = [
            torch.cat([rotate(each[..., :count], cos, sin), each[..., count:]], dim=-1) if count else each
            for each, count in zip(results, rotated, strict=True)
        ]
    if is_gated and len(results) == 1:
        results = list(results[0].chunk(2, dim=-1))
    act = ACTIVATIONS[activation]
    results = [act(results[0]) * results[1]] if is_gated else [act(each) for each in results]
    return tuple(each if residual is None else each + residual for each in results)


def _at_rotated(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], rotated: Sequence[int], size: int
) -> tuple[list[Tensor], list[Tensor | None], list[int]]:
    """Weights and biases that are rotated as a whole or not at all, and the head size of those that are, or 0."""
    parts: list[tuple[Tensor, Tensor | None, int]] = []
    for weight, bias, count in zip(weights, biases, rotated, strict=True):
        places = [(0, count, size), (count, weight.shape[-2], 0)]
        parts += [
            (weight[..., begin:end, :], None if bias is None else bias[..., begin:end], head)
            for begin, end, head in places
            if begin < end
        ]
    return [part[0] for part in parts], [part[1] for part in parts], [part[2] for part in parts]


def has_kernel(x: Tensor, rows: int) -> bool:
    """Whether `row_linear` is used for so many rows."""
    return x.is_cuda and rows <= ROWS


def _in_lanes(x: Tensor, rows: int) -> Tensor:
    """A tensor [N, rows, D]."""
    return x.reshape(-1, rows, x.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer. Of a single row it is a sum, which Inductor fuses with what stands around it into one kernel."""
    if x.shape[:-1].numel() == 1:
        exact = torch.promote_types(x.dtype, torch.float32)
        result = (x.reshape(-1).to(exact) * weight.to(exact)).sum(dim=-1)
        result = result if bias is None else result + bias.to(exact)
        return result.to(x.dtype).reshape(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def matmul(x: Tensor, factor: Tensor) -> Tensor:
    """A product; of a stack of single rows and one of matrices, [N, 1, D] and [N, D, F], a sum like `linear`.

    Of columns and rows it is no sum: the angles of a rotary embedding are frequencies times positions.
    """
    if x.dim() >= 2 and factor.dim() >= 2 and x.shape[-1] == 1:
        return x * factor
    if x.dim() == factor.dim() == 3 and x.shape[1] == 1:
        exact = torch.promote_types(x.dtype, torch.float32)
        return (x.to(exact) * factor.mT.to(exact)).sum(dim=-1).to(x.dtype).unsqueeze(1)
    return torch.matmul(x, factor)


def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """`torch.gather`; of a single element of each, that is all of them."""
    return x if x.shape[dim] == 1 and x.shape == index.shape else torch.gather(x, dim, index)
