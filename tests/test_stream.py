"""The residual stream is found from the graph, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.errors import Unsupported
from skipstone.ir.stream import SublayerKind, find_stream
from skipstone.ir.surrogate import Coefficient
from tests import models
from tests.tiny_models import LAYERS, tiny_model

FORMS = ("pre", "sandwich", "scaled", "branch scaled", "post")
A, F, O = SublayerKind.ATTENTION, SublayerKind.FFN, SublayerKind.OTHER  # noqa: E741


@pytest.mark.parametrize("name", models.CAUSAL)
def test_two_sublayers_a_layer(name: str) -> None:
    stream = find_stream(models.program(name))
    assert stream.layers == 3
    assert sorted((s.layer, s.kind) for s in stream.sublayers) == [(layer, k) for layer in range(3) for k in (A, F)]
    assert all(s.parallel == (name == "gpt_neox") for s in stream.sublayers)


def test_paths_parameters_and_order() -> None:
    sublayers = find_stream(models.program("llama")).sublayers
    assert [s.path for s in sublayers[:2]] == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    assert sublayers[1].parameters == (
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    )


def test_experts_belong_to_one_ffn() -> None:
    kinds = [s.kind for s in find_stream(models.program("mixtral")).sublayers]
    assert kinds == [A, F] * 3


ARCHITECTURES = {
    "olmo2": {"parallel": False, "post_norm": False},  # norms behind the branches
    "phi": {"parallel": True, "post_norm": False},
    "gptj": {"parallel": True, "post_norm": False},
    "granitemoe": {"parallel": False, "post_norm": False},  # scaled branches, experts
    "bert:decoder": {"parallel": False, "post_norm": True},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "phi" else name for name in ARCHITECTURES]
)
def test_real_architectures(name: str) -> None:
    sublayers = find_stream(capture_huggingface(tiny_model(name))).sublayers
    assert sorted((s.layer, s.kind) for s in sublayers) == [(layer, k) for layer in range(LAYERS) for k in (A, F)]
    facts = ARCHITECTURES[name]
    assert {s.parallel for s in sublayers} == {facts["parallel"]}
    assert {s.post_norm for s in sublayers} == {facts["post_norm"]}
    assert all(s.skip.is_identity for s in sublayers)


class Drawn(nn.Module):
    """A residual program whose structure is known: sublayers of FFN or attention in one of the forms of `FORMS`."""

    def __init__(self, shape: list[tuple[str, SublayerKind]]) -> None:
        super().__init__()
        self.shape = shape
        self.inner = nn.ModuleList(nn.Linear(8, 24 if kind is A else 8) for _, kind in shape)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2 * len(shape)))
        self.entry, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for index, (form, kind) in enumerate(self.shape):
            y = self.inner[index](x if form == "post" else self.norms[2 * index](x))
            if kind is A:
                q, k, v = (part.unsqueeze(1) for part in y.chunk(3, -1))
                y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
            if form == "sandwich":
                y = self.norms[2 * index + 1](y)
            if form == "branch scaled":
                y = y * 0.5
            x = (0.5 * x if form == "scaled" else x) + y
            if form == "post":
                x = self.norms[2 * index + 1](x)
        return self.head(x)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(FORMS), st.sampled_from([A, F])), min_size=1, max_size=4))
def test_random_residual_programs(shape: list[tuple[str, SublayerKind]]) -> None:
    stream = find_stream(capture_module(Drawn(shape).eval(), {"x": torch.randn(2, 5, 8)}))
    assert [s.kind for s in stream.sublayers] == [kind for _, kind in shape]
    assert [s.skip.kind for s in stream.sublayers] == ["scale" if form == "scaled" else "identity" for form, _ in shape]
    last = len(shape) - 1  # behind the last sublayer a norm is that of the head
    assert [s.post_norm for s in stream.sublayers[:last]] == [form == "post" for form, _ in shape[:last]]


class TakenUp(nn.Module):
    """As in nanochat: every layer adds the first state once more, and the end takes back one from the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))
        self.entry, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.a, self.b = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = first = middle = self.entry(x)
        for index in range(4):
            x = self.a[index] * x + self.b[index] * first
            x = x + self.inner[index](self.norms[index](x))
            middle = x if index < 2 else middle
        return self.head(self.norms[4](x - 0.2 * middle))


def test_earlier_states_may_be_taken_up_again() -> None:
    program = capture_module(TakenUp().eval(), {"x": torch.randn(2, 5, 8)})
    stream = find_stream(program)
    assert [s.path for s in stream.sublayers] == [f"inner.{n}" for n in range(4)]
    assert [s.parameters for s in stream.sublayers] == [
        (f"inner.{n}.bias", f"inner.{n}.weight", f"norms.{n}.bias", f"norms.{n}.weight") for n in range(4)
    ]
    assert not any(s.post_norm or s.parallel for s in stream.sublayers)
    assert stream.entry is next(program.nodes(torch.ops.aten.linear.default))


class Own(nn.Module):
    """Two layers ``skip(x) + branch(x)`` on [B, S, 8] with a skip path of one's own."""

    def __init__(self, skip: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.skip = skip
        self.entry, self.inner = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.extra = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for layer in self.inner:
            x = self.skip(self, x) + torch.tanh(layer(x))
        return x


def test_a_gate_on_the_stream_depends_on_it() -> None:
    program = capture_module(Own(lambda m, x: m.extra(x).sigmoid() * x).eval(), {"x": torch.randn(2, 5, 8)})
    sublayers = find_stream(program).sublayers
    assert [each.path for each in sublayers] == ["inner.0", "inner.1"]
    assert all((each.skip.kind, each.skip.coefficient) == ("scale", Coefficient.DEPENDENT) for each in sublayers)


NO_SKIP: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "its square": lambda m, x: x * x,
    "a product over features": lambda m, x: x @ m.extra.weight,
    "a product over features of streams": lambda m, x: (x.unflatten(-1, (2, 4)) @ m.extra.weight[:4, :4]).flatten(-2),
    "features as a column": lambda m, x: (m.extra.weight @ x.unsqueeze(-1)).squeeze(-1),
    "features as rows": lambda m, x: (
        m.extra.weight[:2, :2] @ x.unflatten(-1, (4, 2)).transpose(-1, -2)
    ).transpose(-1, -2).flatten(-2),
    "features as rows by einsum": lambda m, x: torch.einsum(
        "bsdj->bsjd", m.extra.weight[:4, :4] @ torch.einsum("bsjd->bsdj", x.unflatten(-1, (2, 4)))
    ).flatten(-2),
    "a product over the sequence": lambda m, x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "a constant on top": lambda m, x: 0.5 * x + m.extra.bias,
}  # fmt: skip


@pytest.mark.parametrize("skip", NO_SKIP)
def test_what_is_no_multiple_of_the_stream_does_not_carry_it(skip: str) -> None:
    program = capture_module(Own(NO_SKIP[skip]).eval(), {"x": torch.randn(2, 5, 8)})
    with pytest.raises(Unsupported, match="residual stream"):
        find_stream(program)


class LookedUp(nn.Module):
    """Layers that look up more of the tokens themselves: embeddings, as in nanochat, or numbers of experts."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.embed, self.values = nn.Embedding(7, 8), nn.ModuleList(nn.Embedding(7, 8) for _ in range(3))
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("route", torch.arange(7) % 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        values = [each(input_ids) for each in self.values] if self.first else []
        x = self.embed(input_ids)
        for number, layer in enumerate(self.inner):
            value = values[number] if self.first else self.values[number](input_ids)
            x = x + layer(torch.where((self.route[input_ids] == 0).unsqueeze(-1), x, x.neg()) + value)
        return x


@pytest.mark.parametrize("first", [False, True])
def test_what_layers_look_up_is_no_way_past_the_stream(first: bool) -> None:
    program = capture_module(LookedUp(first).eval(), {"input_ids": torch.arange(10).reshape(2, 5) % 7})
    stream = find_stream(program)
    assert [each.path for each in stream.sublayers] == [f"inner.{number}" for number in range(3)]
    assert stream.entry.args[0].target == "embed.weight"  # type: ignore[union-attr]


class Beside(nn.Module):
    """Streams that are read together and written apart, but are not mixed, as in HunYuan V4."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.ffn = nn.Linear(24, 6), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        streams = torch.stack([x, -x, 2 * x], dim=-2)
        read, write = self.mix(streams.flatten(-2)).sigmoid().chunk(2, -1)
        y = self.ffn((read.unsqueeze(-1) * streams).sum(-2))
        return (streams + write.unsqueeze(-1) * y.unsqueeze(-2)).sum(-2)


def test_the_weights_of_streams_are_no_place_of_a_sublayer() -> None:
    (sublayer,) = find_stream(capture_module(Beside().eval(), {"x": torch.randn(2, 5, 8)})).sublayers
    assert sublayer.skip.is_identity
    assert sublayer.path == "ffn"


def test_a_plain_chain_has_no_stream() -> None:
    chain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    with pytest.raises(Unsupported, match="residual stream"):
        find_stream(capture_module(chain, {"input": torch.randn(2, 3, 4)}))
