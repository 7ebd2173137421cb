"""`skipstone::predicated_linear`: a linear layer that obeys a gate's decision by itself.

A gate clears rows behind what it spares; to compute none of that where every row skips, somebody has to look at the
decision first, and on a GPU the host would have to wait for it. This operator takes the decision as an operand, so that
a kernel looks at it on the device, and reads no weight where it need not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.ir.errors import InvalidInput


def check_operands(x: Tensor, weight: Tensor, skip: Tensor, bias: Tensor | None) -> None:
    """Return if the operands of `predicated_linear` fit each other.

    Raises:
        InvalidInput: they differ in size, dtype or device.
    """
    others = [weight] if bias is None else [weight, bias]
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise InvalidInput(f"A weight {tuple(weight.shape)} does not fit rows {tuple(x.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InvalidInput(f"A bias {tuple(bias.shape)} does not fit a weight {tuple(weight.shape)}.")
    if x.dim() != 3 or skip.shape != x.shape[:2] or skip.dtype != torch.bool:
        raise InvalidInput(f"Decisions {skip.dtype} {tuple(skip.shape)} are not one bool a row of {tuple(x.shape)}.")
    if any(other.dtype != x.dtype for other in others):
        raise InvalidInput(f"Rows of {x.dtype} with weights of {', '.join(str(other.dtype) for other in others)}.")
    if any(other.device != x.device for other in (*others, skip)):
        raise InvalidInput(f"Rows on {x.device} with weights on {weight.device} and decisions on {skip.device}.")


@torch.library.custom_op("skipstone::predicated_linear", mutates_args=())
def predicated_linear(x: Tensor, weight: Tensor, skip: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, and zeros in the rows that skip, whatever `x`, `weight` and `bias` hold.

    Where all rows skip, `x`, `weight` and `bias` are not read.

    Args:
        x: [B, S, H].
        weight: [N, H], with any strides.
        skip: bool [B, S].
        bias: [N].
    Returns:
        [B, S, N] in x's dtype, which is that of the weight and the bias, too.
    Raises:
        InvalidInput: the operands do not fit each other.
    """
    check_operands(x, weight, skip, bias)
    if x.device.type == "cpu" and skip.all():
        return x.new_zeros(*x.shape[:2], weight.shape[0])
    return F.linear(x, weight, bias).masked_fill(skip.unsqueeze(-1), 0).contiguous()


@predicated_linear.register_fake
def _(x, weight, skip, bias=None):  # type: ignore[no-untyped-def]
    check_operands(x, weight, skip, bias)
    return x.new_empty(*x.shape[:2], weight.shape[0])


PREDICATED_LINEAR = torch.ops.skipstone.predicated_linear.default
