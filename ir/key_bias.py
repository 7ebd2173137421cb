"""Key biases that are large against the keys: what makes Qwen2 and Qwen2.5 fail in every format below 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipstone.ir.errors import Unsupported
from skipstone.ir.linear import CASTS, MOVES
from skipstone.ir.program import Program
from skipstone.ir.projections import Projections, Weights
from skipstone.ir.statistics import sites

aten = torch.ops.aten

LARGE_BIAS = 8.0
"""How many times as long as a channel of the keys is wide a bias has to be to count as large."""


def large_key_biases(program: Program, threshold: float = LARGE_BIAS) -> dict[str, float]:
    """The attentions whose key projection has a large bias. It takes no data.

    For each key-value head the measure is ``||b|| / (||W diag(g)||_F / sqrt(D))``, with W and b the head's rows of the
    projection and g the weight of the norm before it (ones without a norm): the length of the bias over the root mean
    square that the keys' channels have for normalised inputs. A norm between projection and attention changes nothing
    about the proportion, so such biases count too. A bias that has been split off the keys is no longer there.

    Returns:
        by the name of the attention (`skipstone.ir.statistics.sites`): the largest measure over its heads, where that
        exceeds `threshold`.
    """
    projections = Projections(program)
    found: dict[str, float] = {}
    for node, site in sites(program).items():
        try:
            path = projections.before(node.args[1], loose=True)  # type: ignore[arg-type]
        except Unsupported:
            continue  # no single projection makes these keys
        if path.source.bias is None:
            continue
        bias = program.tensor(str(path.source.bias.target)).detach().double()
        sizes = expected_sizes(projections, path.source)
        for head in range(path.origins[0].shape[0]):
            rows = path.elements(head)
            length, width = float(bias[rows].norm()), float(sizes[rows].square().mean().sqrt())
            if length > threshold * width:
                found[site] = max(found.get(site, 0.0), length / width if width else torch.inf)
    return found


def expected_sizes(projections: Projections, source: Weights) -> Tensor:
    """The root mean square of each result of a projection, without its bias, for normalised inputs: float64 [n]."""
    tensor = projections.program.tensor
    weight = tensor(str(source.weight.target)).detach().double()
    weight = weight if source.axis == 0 else weight.T
    operand: Any = source.node.args[1 if source.node.target is aten.addmm.default else 0]
    while operand.target in (*CASTS, *MOVES):
        operand = operand.args[0]
    norm = projections.weights(operand)
    if norm is not None and norm.axis is None:
        weight = weight * (tensor(str(norm.weight.target)).detach().double() + norm.offset)
    return weight.norm(dim=1)
