"""Linear layers in ATen's spellings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearLayer:
    """``x @ weight.T + bias``, or ``x @ weight + bias`` where the weight stands `transposed`.

    Attributes:
        node: the call.
        x: the rows.
        weight: [N, H], or [H, N] if `transposed`.
        bias: [N], or None.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool

    @property
    def weight_bytes(self) -> int:
        """Of the matrix."""
        value = self.weight.meta["val"]
        return int(value.numel()) * value.element_size()


def linear_layer(node: fx.Node) -> LinearLayer | None:
    """What a call multiplies, if it has the form of a linear layer; what the operands are is left to the caller."""
    args: Any = (*node.args, None)
    if node.kwargs:
        return None
    match node.target:
        case aten.linear.default:
            return LinearLayer(node, args[0], args[1], args[2], transposed=False)
        case aten.mm.default | aten.matmul.default:
            return LinearLayer(node, args[0], args[1], None, transposed=True)
        case aten.addmm.default:
            return LinearLayer(node, args[1], args[2], args[0], transposed=True)
    return None
