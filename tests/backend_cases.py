"""Compiled models and their references, for tests of the backend of torch.compile.

References are models of transformers that compute the same by themselves: with projections of zeros where a sublayer is
left out, and with layers that read the same state where they run in parallel.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import skipstone
from tests.tiny_models import tokens

TOLERANCE = 2e-5


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rewritten graphs run as they are, in the place of what Inductor makes of them."""
    assert callable(skipstone.backend)  # imports the module of that name
    monkeypatch.setattr(sys.modules["skipstone.backend"], "compile_fx", lambda graph, inputs, config_patches: graph)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


Compiled = tuple[Callable[..., Any], list[Any]]


def compiled(model: nn.Module, plan: Any, dynamic: bool | None = None, **options: Any) -> Compiled:
    """The compiled model, and the list that its reports go to."""
    reports: list[Any] = []
    options |= {"plan": plan, "report": reports.append}
    return torch.compile(model, backend="skipstone", options=options, fullgraph=True, dynamic=dynamic), reports


def without(model: PreTrainedModel, attention: tuple[int, ...] = (), ffn: tuple[int, ...] = ()) -> PreTrainedModel:
    """A copy in which these sublayers add nothing."""
    model = copy.deepcopy(model)
    names = {"o_proj": attention, "attention.dense": attention, "attn.c_proj": attention}
    names |= {"down_proj": ffn, "dense_4h_to_h": ffn, "mlp.c_proj": ffn}
    found = 0
    for path, module in model.named_modules():
        for name, layers in names.items():
            if path.endswith(f".{name}") and any(f".{layer}." in path for layer in layers):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
                found += 1
    assert found == len(attention) + len(ffn)
    return model


def side_by_side(model: PreTrainedModel, start: int, stop: int) -> PreTrainedModel:
    """A copy whose layers from `start` to `stop` all read the state before the first of them."""
    model = copy.deepcopy(model)
    state: dict[str, Tensor] = {}

    def wrapped(layer: nn.Module, is_first: bool) -> Callable[..., Tensor]:
        original = layer.forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if is_first:
                state["before"] = hidden
            return hidden + original(state["before"], *args, **kwargs) - state["before"]

        return forward

    for number in range(start, stop):
        layer = model.model.layers[number]
        layer.forward = wrapped(layer, number == start)  # type: ignore[method-assign]
    return model


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.max() - expected.min())


def compare_steps(fast: Callable[..., Any], reference: PreTrainedModel, make: Callable[[], Any]) -> Any:
    """Compare a prompt and four steps, of one token and of two; the compiled model's cache."""
    prompt, cache, own = tokens(2, 7), make(), make()
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
        new = prompt[:, start:stop]
        out = fast(input_ids=new, past_key_values=cache, use_cache=True)
        expected = reference(input_ids=new, past_key_values=own, use_cache=True)
        close(out.logits, expected.logits)
        cache, own = out.past_key_values, expected.past_key_values
        assert int(cache.get_seq_length()) == int(own.get_seq_length()) == stop
    for mine, theirs in zip(cache.layers, own.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape and mine.values.shape == theirs.values.shape
        assert mine.keys.stride() == theirs.keys.stride()
        assert mine.keys.data_ptr() != mine.values.data_ptr()
    return cache, own


class Block(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.rise, self.fall, self.breaks = nn.Linear(8, 12), nn.Linear(12, 8), breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.fall(torch.tanh(self.rise(x)))


class Blocks(nn.Module):
    """Residual layers over [B, S, 8]; some cannot be traced."""

    def __init__(self, breaks: tuple[bool, ...] = (False,) * 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(each) for each in breaks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
