"""A cache is refused wherever tokens mix outside attention, and the node is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from skipstone.ir.capture.module import capture_module
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program
from skipstone.ir.sequence import offenders, prove_cacheable
from tests import models


def copies(x: Tensor, axis: int) -> Tensor:
    """Three copies of the rows [B * S, 8], which stand at `axis` once taken apart, summed."""
    sizes = [x.shape[0] * x.shape[1], 8]
    sizes.insert(axis, 3)
    return x.flatten(0, 1).repeat(3, 1).reshape(sizes).sum(axis).reshape(x.shape)


class Mixer(nn.Module):
    """An embedding, one operation on [B, S, 8], and a head."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.table = nn.Embedding(64, 8)
        self.conv = nn.Conv1d(8, 8, 3, groups=8)
        self.operation = operation

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.head(self.operation(self, self.embed(input_ids), position_ids))  # type: ignore[call-arg]


def captured(operation: Callable[..., Tensor]) -> Program:
    tokens = torch.arange(15).reshape(3, 5) % 11
    example = {"input_ids": tokens, "position_ids": torch.arange(5).repeat(3, 1)}
    return capture_module(Mixer(operation).eval(), example)


MIXING = {
    "convolution": (lambda m, x, p: m.conv(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2), "pad"),
    "token shift": (lambda m, x, p: x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1], "pad"),
    "running sum": (lambda m, x, p: x.cumsum(1), "works along the sequence"),
    "mean": (lambda m, x, p: x - x.mean(1, keepdim=True), "works along the sequence"),
    "gate over tokens": (lambda m, x, p: x * x.transpose(1, 2).softmax(-1).transpose(1, 2), "works along the sequence"),
    "own positions": (lambda m, x, p: x + m.table(torch.arange(x.shape[1])), "counts itself"),
    "length as a number": (lambda m, x, p: x / x.shape[1], "sequence length as a number"),
    "token by token product": (lambda m, x, p: (x @ x.transpose(1, 2)) @ x, "pairs every token"),
    "flip": (lambda m, x, p: x.flip(1), "works along the sequence"),
    "copies taken apart the wrong way": (lambda m, x, p: x + copies(x, 1), "another order"),
    "rows taken apart the wrong way": (
        lambda m, x, p: x.flatten(0, 1).reshape(x.shape[1], x.shape[0], 8).softmax(-1).transpose(0, 1), "another order",
    ),
    "rows merged in two orders": (
        lambda m, x, p: (x.flatten(0, 1) + x.transpose(0, 1).flatten(0, 1)).reshape(x.shape), "two different orders",
    ),
    "einsum over the sequence": (lambda m, x, p: x + torch.einsum("bsd->bd", x).unsqueeze(1), "sums over the sequence"),
    "einsum over what has no name": (
        lambda m, x, p: x + torch.einsum("...d,...d->d", x, x), "sums over the sequence",
    ),
    "einsum over the batch": (lambda m, x, p: x + torch.einsum("bsd->sd", x), "sequences of a batch meet"),
    "einsum of pairs": (lambda m, x, p: torch.einsum("bid,bjd->bij", x, x) @ x, "pairs every token"),
    "einsum over what it names twice": (lambda m, x, p: x + torch.einsum("bsd,bsd", x, x), "sums over the sequence"),
    "last token": (lambda m, x, p: x + x[:, -1:], "takes a part|works along|meets"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_is_refused_by_name(name: str) -> None:
    operation, reason = MIXING[name]
    with pytest.raises(Unsupported, match=reason):
        prove_cacheable(captured(operation))


SOUND = {
    "positions from the input": lambda m, x, p: x + m.table(p),
    "norm and FFN": lambda m, x, p: x + nn.functional.layer_norm(x, (8,)).relu(),
    "heads folded and unfolded": lambda m, x, p: (
        x.reshape(*x.shape[:2], 2, 4).transpose(1, 2).transpose(1, 2).flatten(2)
    ),
    "rows copied and taken apart again": lambda m, x, p: copies(x, 0),
    "rows merged with the batch": lambda m, x, p: x.flatten(0, 1).softmax(-1).reshape(x.shape),
    "einsum over features": lambda m, x, p: torch.einsum("...d, ed -> ...e", x, m.table.weight[:8]),
    "einsum without its result": lambda m, x, p: torch.einsum("bsd,ed", x, m.table.weight[:8]).transpose(1, 2),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_works_row_by_row_is_sound(name: str) -> None:
    program = captured(SOUND[name])
    assert not list(offenders(program))
    tokens = torch.arange(15).reshape(3, 5) % 11
    positions = torch.arange(5).repeat(3, 1)
    whole = program.run(input_ids=tokens, position_ids=positions)["output"]
    alone = program.run(input_ids=tokens[:, 3:4], position_ids=positions[:, 3:4])["output"]
    torch.testing.assert_close(alone, whole[:, 3:4])


@pytest.mark.parametrize("name", [name for name in models.CAUSAL if name != "llama4"])
def test_causal_models_are_sound(name: str) -> None:
    prove_cacheable(models.program(name))
