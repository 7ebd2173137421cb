"""The residual stream is found from the graph, whatever the architecture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.errors import Unsupported
from skipstone.ir.stream import SublayerKind, find_stream
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


@pytest.mark.parametrize("name", ARCHITECTURES)
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
    assert [s.skip.factor for s in stream.sublayers] == [0.5 if form == "scaled" else 1.0 for form, _ in shape]
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


def test_a_plain_chain_has_no_stream() -> None:
    chain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    with pytest.raises(Unsupported, match="residual stream"):
        find_stream(capture_module(chain, {"input": torch.randn(2, 3, 4)}))
