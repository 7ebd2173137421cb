"""The optimizers of the reference models: Muon for the hidden matrices, AdamW for the rest.

Both read their step size from a tensor, and neither waits for the device, so that a CUDA graph can hold them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, those of torch.optim.Muon."""

ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with Nesterov momentum and `adjust_lr_fn="match_rms_adamw"`, all matrices of a shape at once.

    Args:
        parameters: matrices.
        rate: the step size, a tensor of no dimensions.
        momentum, decay: of the gradients, and of the weights.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: Tensor, momentum: float, decay: float) -> None:
        super().__init__(parameters, {"lr": rate, "momentum": momentum, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step on all parameters, which must have gradients."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                alike[parameter.shape].append(parameter)
            for (rows, columns), parameters in alike.items():
                gradients = [parameter.grad for parameter in parameters]
                means = [self._mean(parameter) for parameter in parameters]
                torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, means, group["momentum"])
                update = orthogonal(torch.stack(ahead)).to(parameters[0].dtype)
                update = update * (-0.2 * max(rows, columns) ** 0.5 * group["lr"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, update.unbind())

    def _mean(self, parameter: nn.Parameter) -> Tensor:
        """The running mean of a parameter's gradients."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each of the matrices U S V^T [n, rows, columns], by a Newton-Schulz iteration in bfloat16."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    a, b, c = COEFFICIENTS
    found = matrices.bfloat16()
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, head and gains."""
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (hidden if inside else rest).append(parameter)
    device = rest[0].device
    rates = [torch.tensor(rate, device=device) for _ in range(2)]
    return [
        Muon(hidden, rates[0], momentum=0.95, decay=0.01),
        torch.optim.AdamW(rest, rates[1], betas=(0.9, 0.95), weight_decay=0.0, capturable=device.type == "cuda"),
    ]
