"""Experts of a few tokens without asking the device which ones they are."""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.ir.experts import gated


def gathered_experts(
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
    """`skipstone.ir.experts.experts` of few tokens: only the matrices of chosen experts are read, each once a token.

    The products are written as sums, into which Inductor fuses the choice of the matrices.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    named = (index >= 0) & (index < up.shape[0])
    chosen = index.clamp(0, up.shape[0] - 1)

    def product(rows: Tensor, stack: Tensor, bias: Tensor | None) -> Tensor:
        """[T, K, width of rows] times the chosen matrices."""
        matrices = stack[chosen].to(exact)
        if transposed:
            result = (rows.unsqueeze(-1) * matrices).sum(dim=-2)
        else:
            result = (rows.unsqueeze(-2) * matrices).sum(dim=-1)
        return result if bias is None else result + bias[chosen].to(exact)

    hidden = product(x.to(exact).unsqueeze(1), up, up_bias)
    hidden = gated(hidden, activation, layout, alpha, limit, shift)
    out = product(hidden, down, down_bias) * weights.to(exact).unsqueeze(-1)
    return torch.where(named.unsqueeze(-1), out, 0).sum(dim=1).to(x.dtype)
