"""Models with residual layers, and the regularizer for layers at the same time written out over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedModel,
)

from skipstone import Segment
from skipstone.training import LayerParallelLoss

WIDTH, LAYERS = 8, 5

# Plain networks


class Layer(nn.Module):
    """``a h + b h0 + branch(norm(h))``, as nanochat has it; tokens are mixed over a window."""

    def __init__(self, number: int, scaled: bool) -> None:
        super().__init__()
        self.scaled, self.norm = scaled, nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.a, self.b = (nn.Parameter(torch.tensor(each)) for each in (1.4 - 0.2 * number, 0.1 * (number + 1)))
        with torch.no_grad():
            self.down.weight *= 2

    def forward(self, state: Tensor, first: Tensor, *, window: int) -> Tensor:
        if self.scaled:
            state = self.a * state + self.b * first
        read = self.norm(state)
        mixed = sum(torch.roll(read, shift, dims=-2) for shift in range(window))
        return state + self.down(torch.tanh(self.up(mixed)))


class Net(nn.Module):
    """Layers that are told of the first state and of a window of their own."""

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(Layer(number, scaled) for number in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(x)[-1])

    def states(self, x: Tensor) -> list[Tensor]:
        """The states before and behind all layers."""
        states = [self.entry(x)]
        for number, layer in enumerate(self.layers):
            states.append(layer(states[-1], states[0], window=number % 3 + 1))
        return states


def net(scaled: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(scaled).double()


def example(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def scales(model: Net) -> list[Tensor] | None:
    return [layer.a for layer in model.layers] if model.layers[0].scaled else None


def by_hand(model: Net, x: Tensor, segment: Segment, numbers: Sequence[int], detach: bool = False) -> Tensor:
    """The loss of one segment, with every layer in every iteration, and the bracket even where it is zero."""
    states = model.states(x)
    trace = [states[segment.start]] * (segment.stop - segment.start + 1)
    for _ in range(segment.iterations):
        new = [trace[0]]
        for number, index in enumerate(range(segment.start, segment.stop)):
            layer = model.layers[index]
            slope = {"auto": layer.a if layer.scaled else 1.0, "identity": 1.0, "zero": 0.0}[segment.surrogate]
            result = layer(trace[number], states[0], window=index % 3 + 1)
            new.append(result + slope * (new[number] - trace[number]))
        trace = new
    total = torch.zeros((), dtype=x.dtype)
    for number in numbers:
        exact = states[segment.start + number].detach() if detach else states[segment.start + number]
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                distance = (trace[number][b, t] - exact[b, t]).square().sum().sqrt()
                total = total + distance / exact[b, t].square().sum().sqrt() / (x.shape[0] * x.shape[1])
    return total


def loss_of(model: Net, x: Tensor, *segments: Segment, **options: Any) -> Tensor:
    regularizer = LayerParallelLoss(model.layers, segments, scales=scales(model), **options)
    with regularizer.record():
        model(x)
    return regularizer.loss()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """Of all parameters; zeros where there are none."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_equal(given: Sequence[Tensor], wanted: Sequence[Tensor], within: float = 1e-12) -> None:
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=within, atol=within)


# Hugging Face models

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=4)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=4, sliding_window=4)),
    "nanochat": lambda: NanoChatForCausalLM(NanoChatConfig(**SIZES, num_hidden_layers=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ),
}  # fmt: skip


def hugging_face(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return BUILDERS[name]().double().train()


def layers_of(model: Any) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(2))


@cache
def example_ids() -> Tensor:
    return tokens(2, 11)


def regularized(model: PreTrainedModel, ids: Tensor, *segments: Segment, **options: Any) -> Tensor:
    regularizer = LayerParallelLoss(layers_of(model), segments, **options)
    with regularizer.record():
        model(input_ids=ids, use_cache=False)
    return regularizer.loss()
