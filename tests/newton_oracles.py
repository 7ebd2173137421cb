"""What layers that run at the same time compute, written out over the models' own modules.

`newton` is the update rule. `by_hand` writes plain networks out with it, whose states are read in all the ways that
models do; `expected` does that to Hugging Face models, whose layers are called as the model itself calls them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from skipstone import LayerParallel, Plan, Segment
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.program import Program
from skipstone.optimize import rewrite
from skipstone.passes.base import run_pass
from skipstone.passes.cleanup import Cleanup
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import models

WIDTH, LAYERS = 8, 5
FLOAT64 = 1e-9
"""Largest difference of float64 results, over their range."""


def newton(functions: Sequence[Callable], start: Tensor, iterations: int, slopes: Sequence[Any]) -> list[Tensor]:
    """The states behind each function: every function in every iteration, with the bracket even where it is zero.

    Args:
        slopes: what stands for the functions' Jacobians: factors, or functions of an iterate and its change.
    """
    trace = [start] * (len(functions) + 1)
    for _ in range(iterations):
        new = [start]
        for number, (function, slope) in enumerate(zip(functions, slopes, strict=True)):
            change = new[number] - trace[number]
            change = slope(trace[number], change) if callable(slope) else slope * change
            new.append(function(trace[number]) + change)
        trace = new
    return trace[1:]


def assert_close(given: Tensor, wanted: Tensor, within: float = FLOAT64) -> None:
    assert given.shape == wanted.shape
    assert float((given - wanted).abs().max()) <= within * float(wanted.max() - wanted.min())


# Plain networks


class Layer(nn.Module):
    """One residual layer in one of several forms."""

    def __init__(self, form: str, number: int) -> None:
        super().__init__()
        self.form = form
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.a, self.b = (nn.Parameter(torch.tensor(each)) for each in (1.4 - 0.2 * number, 0.1 * (number + 1)))
        if form == "linear":
            self.down = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.down.weight *= 0 if form == "constant" else 2

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        if self.form in ("scaled", "constant"):  # nanochat
            x = self.a * x + self.b * x0
        if self.form == "roundabout":
            x = torch.sub(x0, x.flatten(0, 1).view(x.shape) / -self.a, alpha=0.6)
            x = x + 0.7 * x
        branch = self.down(x) if self.form == "linear" else self.down(torch.tanh(self.up(self.norm(x))))
        if self.form == "flat":  # OPT
            return (x.flatten(0, 1) + branch.flatten(0, 1)).view(x.shape)
        return x + branch


class Net(nn.Module):
    """Residual layers whose states are read in all the ways that models do: returned, probed, taken back at the end."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(Layer(form, number) for number in range(LAYERS))
        self.norm, self.probe = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x0 = self.entry(x)
        outputs = {}
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, x0)
            outputs |= {f"state_{number}": x, f"probe_{number}": self.probe(x)}
        return outputs | self.behind(x, outputs[f"state_{LAYERS // 2}"])

    def behind(self, x: Tensor, middle: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.norm(x - 0.3 * middle))}


FORMS = ("plain", "scaled", "roundabout")
SURROGATES = ("auto", "identity", "zero")


@cache
def net(form: str) -> Net:
    torch.manual_seed(0)
    return Net(form).double().eval()


@cache
def example() -> Tensor:
    return torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@cache
def net_program(form: str) -> Program:
    return run_pass(Cleanup(), capture_module(net(form), {"x": example()}))


def slopes(form: str, surrogate: str, layers: range) -> list[Any]:
    if surrogate != "auto" or form in ("plain", "flat"):
        return [float(surrogate != "zero")] * len(layers)
    slopes = [net(form).layers[n].a for n in layers]
    return [0.6 / a * 1.7 for a in slopes] if form == "roundabout" else slopes


@torch.no_grad()
def by_hand(form: str, segments: Sequence[Segment]) -> dict[str, Tensor]:
    model = net(form)
    x = x0 = model.entry(example())
    states, number = [], 0
    while number < LAYERS:
        segment = next((each for each in segments if each.start == number), Segment(number, number + 1))
        own = range(segment.start, segment.stop)
        functions = [lambda h, layer=model.layers[n]: layer(h, x0) for n in own]
        states += newton(functions, x, segment.iterations, slopes(form, segment.surrogate, own))
        x, number = states[-1], segment.stop
    outputs = {f"state_{n}": state for n, state in enumerate(states, 1)}
    outputs |= {f"probe_{n}": model.probe(state) for n, state in enumerate(states, 1)}
    return outputs | model.behind(x, states[LAYERS // 2 - 1])


@torch.no_grad()
def in_graph(form: str, *segments: Segment) -> dict[str, Tensor]:
    return run_pass(LayerParallel(segments), net_program(form), strict=False).run(x=example())


# Hugging Face models, under hooks

SINGLE = {"gemma2": torch.float32}
"""The dtype that a model is tested in, where it does not compute in float64 throughout."""
LENGTH = 20
"""Tokens of a sequence: more than the window of gemma2 and mixtral, 8."""


@cache
def hugging_face(name: str) -> Any:
    model = copy.deepcopy(models.model(name)).to(SINGLE.get(name, torch.float64))
    model.set_experts_implementation("eager")  # transformers' faster form has no float64
    return model


@cache
def captured(name: str) -> Program:
    return capture_huggingface(hugging_face(name))


@cache
def parallel(name: str, *segments: Segment) -> Program:
    return run_pass(LayerParallel(segments), captured(name), strict=False)


def stack(model: Any) -> nn.ModuleList:
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


def attention(layer: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
    """What the attention of a Llama or Gemma 2 layer adds to the stream."""
    result = layer.self_attn(hidden_states=layer.input_layernorm(x), **options)[0]
    return layer.post_attention_layernorm(result) if hasattr(layer, "pre_feedforward_layernorm") else result


def ffn(layer: Any, x: Tensor) -> Tensor:
    """What the FFN of such a layer adds."""
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    return layer.mlp(layer.post_attention_layernorm(x))


def solved(layers: Sequence[Any], calls: Sequence[Any], segment: Segment) -> Tensor:
    """The state behind a segment, by the formulas of its unit."""
    start = calls[0][0][0]
    pairs = [(layer, args, options) for layer, (args, options) in zip(layers, calls, strict=True)]
    if segment.unit == "two_stage":
        middle = start + sum(attention(layer, start, options) for layer, _, options in pairs)
        return middle + sum(ffn(layer, middle) for layer, *_ in pairs)
    if segment.unit == "sublayer" and segment.iterations == 1:
        return start + sum(attention(layer, start, options) + ffn(layer, start) for layer, _, options in pairs)
    functions: list[Callable] = []
    for layer, args, options in pairs:
        if segment.unit == "sublayer":
            functions.append(lambda h, layer=layer, options=options: h + attention(layer, h, options))
            functions.append(lambda h, layer=layer: h + ffn(layer, h))
        else:
            functions.append(
                lambda h, layer=layer, args=args, options=options: first(layer.forward(h, *args[1:], **options))
            )
    slope = [float(segment.surrogate != "zero")] * len(functions)
    return newton(functions, start, segment.iterations, slope)[-1]


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def at_once(model: Any, segments: Sequence[Segment]) -> Iterator[None]:
    """The model with the states behind its segments replaced. Each layer is called as the model itself calls it."""
    calls: dict[int, Any] = {}
    handles = []
    for number, layer in enumerate(stack(model)):

        def note(_: nn.Module, args: Any, options: Any, number: int = number) -> None:
            calls[number] = (args, options)

        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    for segment in segments:

        def replace(_module: nn.Module, _args: Any, out: Any, segment: Segment = segment) -> Any:
            start = calls[segment.start]
            own = [(start[0] if n == segment.start else args, options) for n, (args, options) in sorted(calls.items())]
            state = solved(
                stack(model)[segment.start : segment.stop], own[segment.start : segment.stop], segment
            )  # only the first layer's input is the stream's: the others are asked for how they are called
            return (state, *out[1:]) if isinstance(out, tuple) else state

        handles.append(stack(model)[segment.stop - 1].register_forward_hook(replace))
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def expected(name: str, ids: Tensor, *segments: Segment) -> Tensor:
    """Logits [B, S, V], each row on its own."""
    model = hugging_face(name)
    with at_once(model, segments):
        return torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])


@torch.no_grad()
def whole(program: Program, ids: Tensor) -> Tensor:
    """Logits of a program without a cache."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return program.run(input_ids=ids, position_ids=positions)["logits"]


def within(name: str) -> float:
    return 1e-5 if name in SINGLE else FLOAT64


@cache
def executable(name: str, *segments: Segment) -> Executable:
    program, refusal = rewrite(captured(name), Plan([LayerParallel(segments)]), target="eager", strict=False)
    assert refusal is None
    return Executable(EagerSession(program))
