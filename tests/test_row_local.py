"""Operators that keep tokens apart by their form: what is taken for one is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipstone.ir.row_local import is_row_local

B, S, H = 2, 3, 6
GAIN = torch.randn(H)
ROW = GAIN.view(1, 1, H)

APART: dict[str, Callable[[Tensor], Tensor]] = {
    "RMSNorm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * GAIN,
    "LayerNorm": lambda x: F.layer_norm(x, (H,), GAIN),
    "activations": lambda x: F.silu(x) * F.gelu(x, approximate="tanh") + torch.relu(x).square(),
    "halves": lambda x: x.chunk(2, dim=-1)[0] * x.split(3, dim=2)[1],
    "a part": lambda x: x[..., 2:5],
    "softmax": lambda x: x.softmax(-1),
    "casts": lambda x: x.double().clone().to(x.dtype),
    "rows in one dimension": lambda x: torch.tanh(x.reshape(-1, H)).view(B, S, H),
    "a number": lambda x: 2 * x.clamp(max=1) - 3,
    "a row for all": lambda x: x + ROW,
}
TOGETHER: dict[str, Callable[[Tensor], Tensor]] = {
    "a sum over tokens": lambda x: x - x.mean(1, keepdim=True),
    "a sum over all": lambda x: x / x.sum(),
    "a sum of both": lambda x: x - x.amax((1, 2), keepdim=True),
    "a cumulative sum": lambda x: x.cumsum(1),
    "the token before": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
    "a convolution": lambda x: F.conv1d(x.mT, torch.ones(H, 1, 2), padding=1, groups=H).mT[:, :S],
    "a norm of tokens": lambda x: F.layer_norm(x, (S, H)),
    "tokens in another order": lambda x: x.flip(1) + x,
    "the first token": lambda x: x[:, :1] + x,
    "softmax over tokens": lambda x: x.softmax(1),
    "another shape": lambda x: torch.softmax(x.reshape(B, H, S), -1).reshape(B, S, H),
    "a turned shape": lambda x: x.mT.reshape(B, S, H).sigmoid(),
    "sequences": lambda x: x - x.mean(0, keepdim=True),
    "halves of tokens": lambda x: torch.cat([x.chunk(3, dim=1)[1], x[:, 1:]], 1),
    "a table of rows": lambda x: x * torch.arange(B * S * H, dtype=x.dtype).view(B, S, H),
}


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def is_apart(function: Callable[[Tensor], Tensor]) -> bool:
    program = torch.export.export(Call(function), (torch.randn(B, S, H),))
    nodes: list[Any] = [node for node in program.graph.nodes if node.op == "call_function"]
    return all(is_row_local(node, (B, S)) for node in nodes)


@pytest.mark.parametrize("name", APART)
def test_rows_stay_apart(name: str) -> None:
    function = APART[name]
    assert is_apart(function)
    x, other = torch.randn(B, S, H), torch.randn(B, S, H)
    changed = x.clone()
    changed[1, 1] = other[1, 1]
    mine, theirs = function(x), function(changed)
    same = torch.ones(B, S, dtype=torch.bool)
    same[1, 1] = False
    assert torch.equal(mine[same], theirs[same]) and not torch.equal(mine, theirs)


@pytest.mark.parametrize("name", TOGETHER)
def test_what_may_mix_rows_is_not_taken(name: str) -> None:
    assert not is_apart(TOGETHER[name])
