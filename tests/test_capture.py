"""Captured programs equal their models, and capturing leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM

from skipstone.ir.capture import huggingface
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import ATTENTION
from skipstone.ir.errors import InvalidInput, Unsupported, UserError
from skipstone.ir.program import Role, module_path
from skipstone.ir.verify import verify
from skipstone.optimize import optimize
from tests import models

KINDS = {
    "llama": ["causal"] * 3,
    "gpt2": ["causal"] * 3,
    "gemma2": ["sliding", "causal", "sliding"],
    "gpt_neox": ["causal"] * 3,
    "mixtral": ["sliding"] * 3,
    "gpt_oss": ["sliding", "causal", "sliding"],
    "llama4": ["chunked", "chunked", "causal"],
}


@pytest.mark.parametrize("name", models.CAUSAL)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 31)])
def test_logits_equal_the_model(name: str, batch: int, length: int) -> None:
    tokens = models.tokens(batch, length)
    positions = torch.arange(length).repeat(batch, 1)
    with torch.no_grad():
        expected = models.model(name)(input_ids=tokens, use_cache=False).logits
        actual = models.program(name).run(input_ids=tokens, position_ids=positions)["logits"]
    assert relative_difference(actual, expected) < 1e-5


@pytest.mark.parametrize("name", models.CAUSAL)
def test_each_attention_is_one_node_of_its_kind_with_heads_unexpanded(name: str) -> None:
    program = models.program(name)
    nodes = list(program.nodes(ATTENTION))
    assert [node.kwargs["kind"] for node in nodes] == KINDS[name]
    assert [node.kwargs["slot"] for node in nodes] == [0, 1, 2]
    heads = 4 if name in ("gpt2", "gpt_neox") else 2
    assert {node.args[1].meta["val"].shape[1] for node in nodes} == {heads}  # type: ignore[union-attr]
    assert all(node.args[3:5] in ((), (None, None)) for node in nodes), "a causal program needs no mask"
    assert len({module_path(node) for node in nodes}) == 3


def test_an_encoder_keeps_its_padding_mask() -> None:
    program, model = models.program("bert"), models.model("bert")
    tokens = models.tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    assert program.input(Role.PADDING) is not None
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        actual = program.run(input_ids=tokens, attention_mask=mask)["last_hidden_state"]
    assert relative_difference(actual[0], expected[0]) < 1e-5
    assert relative_difference(actual[1, :6], expected[1, :6]) < 1e-5


def test_the_model_is_left_as_it_was() -> None:
    model = models.model("gemma2")
    before = (copy.deepcopy(model.config.to_dict()), model.config._attn_implementation, model.training)
    weights = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    capture_huggingface(model)
    assert (model.config.to_dict(), model.config._attn_implementation, model.training) == before
    assert {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()} == weights
    assert huggingface.NAME not in AttentionInterface._global_mapping
    assert huggingface.NAME not in AttentionMaskInterface._global_mapping


def test_the_model_is_left_as_it_was_when_capture_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.model("llama")
    implementation = model.config._attn_implementation

    def fail(*args: object) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr(huggingface, "export", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        capture_huggingface(model)
    assert model.config._attn_implementation == implementation
    assert huggingface.NAME not in AttentionInterface._global_mapping


def test_tensors_alias_the_model() -> None:
    model = models.model("llama")
    tensors = models.program("llama").tensors()
    for name, parameter in model.named_parameters():
        assert tensors[name].data_ptr() == parameter.data_ptr(), name


def test_a_program_copy_is_its_own() -> None:
    program = models.program("llama")
    copied = program.copy()
    before = len(list(program.nodes()))
    copied.output_node().args = ((),)
    copied.recompile()
    assert not list(copied.nodes())
    assert len(list(program.nodes())) == before


class Scaled(nn.Module):
    """Causal attention by `scaled_dot_product_attention`, two outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        return {"mixed": out.transpose(1, 2).flatten(2), "input": x}


def test_scaled_dot_product_attention_becomes_the_dialect_operator() -> None:
    module = Scaled().eval()
    program = capture_module(module, {"x": torch.randn(2, 5, 16)})
    (node,) = program.nodes(ATTENTION)
    assert (node.kwargs["kind"], node.kwargs["scale"]) == ("causal", 0.3)
    x = torch.randn(3, 11, 16)
    torch.testing.assert_close(program.run(x=x)["mixed"], module(x)["mixed"])
    assert [port.name for port in program.outputs] == ["mixed", "input"]


class Branching(nn.Module):
    """Control flow on a tensor's value."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Counting(nn.Module):
    """State written during the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Returning(nn.Module):
    """A linear layer, and something made of its result."""

    def __init__(self, result: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner, self.result = nn.Linear(3, 3), result

    def forward(self, x: Tensor) -> object:
        return self.result(self.inner(x))


class Written(nn.Module):
    """Attention as research code writes it: scores, then `weigh` (mask and softmax), over repeated keys and values."""

    def __init__(self, weigh: Callable[[Tensor], Tensor], repeat: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.inner, self.weigh, self.repeat = nn.Linear(8, 16), weigh, repeat or (lambda x: x.repeat_interleave(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.inner(x).split((8, 4, 4), -1))
        return self.weigh(q @ self.repeat(k).transpose(2, 3) * 0.5) @ self.repeat(v)


def index(scores: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(scores.shape[-1])
    return positions[:, None], positions[None, :]


def banded(scores: Tensor, reach: int) -> Tensor:
    i, j = index(scores)
    return scores.masked_fill((j > i) | (i - j >= reach), -torch.inf).softmax(-1)


def additive(scores: Tensor) -> Tensor:
    return (scores + torch.full(scores.shape[-2:], torch.finfo(torch.float32).min).triu(1)).softmax(-1)


def capped(scores: Tensor) -> Tensor:
    i, j = index(scores)
    return torch.where(j // 3 <= i // 3, 4.0 * torch.tanh(scores / 4.0), -1e9).softmax(-1)


def distances(scores: Tensor) -> Tensor:
    i, j = index(scores)
    return (scores + (i - j).abs() * -0.1).softmax(-1)


WRITTEN = {
    "no mask": (lambda s: s.softmax(-1), "bidirectional", 0, 0.0),
    "causal, added": (additive, "causal", 0, 0.0),
    "a small window": (lambda s: banded(s, 3), "sliding", 3, 0.0),
    "a window longer than the example": (lambda s: banded(s, 200), "sliding", 200, 0.0),
    "a window too long to tell": (lambda s: banded(s, 5000), "explicit", 0, 0.0),
    "blocks, under a soft cap": (capped, "block_causal", 3, 4.0),
    "a bias": (distances, "explicit", 0, 0.0),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_masks_that_follow_from_sizes_become_kinds(name: str) -> None:
    weigh, kind, window, softcap = WRITTEN[name]
    program = capture_module(Written(weigh).eval(), {"x": torch.randn(2, 7, 8)})
    (node,) = program.nodes(ATTENTION)
    assert (node.kwargs["kind"], node.kwargs["window"], node.kwargs["softcap"]) == (kind, window, softcap)
    assert node.args[1].meta["val"].shape[1] == 1, "keys are taken before they are repeated"
    assert all(argument is None for argument in node.args[3:5]) == (kind != "explicit")


def test_expanded_keys_are_taken_before_they_are_expanded() -> None:
    def expand(x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        return x[:, :, None].expand(batch, heads, 2, length, width).reshape(batch, 2 * heads, length, width)

    program = capture_module(Written(additive, expand).eval(), {"x": torch.randn(2, 7, 8)})
    (node,) = program.nodes(ATTENTION)
    assert node.args[1].meta["val"].shape[1] == 1


def test_what_cannot_be_traced_is_refused_with_a_reason() -> None:
    with pytest.raises(Unsupported, match="control flow"):
        capture_module(Branching().eval(), {"x": torch.ones(2, 3)})
    with pytest.raises(Unsupported, match="writes to calls"):
        capture_module(Counting().eval(), {"x": torch.ones(2, 3)})


REFUSED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "noise": (lambda x: x + 1e-8 * torch.rand(3), "draws random numbers"),
    "functional dropout": (lambda x: nn.functional.dropout(x, 0.1), "draws random numbers"),
    "control flow": (lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), r"torch\.cond\)\."),
    "no tensor": (lambda x: (x, None), "not tensors.*1 is NoneType"),
    "nothing": (lambda x: {}, "without outputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_program_is_refused(name: str) -> None:
    result, message = REFUSED[name]
    with pytest.raises(Unsupported, match=message):
        capture_module(Returning(result).eval(), {"x": torch.ones(2, 3)})


@pytest.mark.parametrize("dropout", [lambda x: nn.functional.dropout(x, 0.0), nn.Dropout(0.5).eval()])
def test_dropout_that_drops_nothing_is_captured(dropout: Callable[[Tensor], object]) -> None:
    module, x = Returning(dropout).eval(), torch.randn(2, 3)
    torch.testing.assert_close(capture_module(module, {"x": x}).run(x=x)["output"], module(x))


def test_outputs_have_names_of_their_own() -> None:
    module = Returning(lambda x: {"x": x, "a": {"b": x + 1}, "a.b": x + 2, 0: x + 3}).eval()
    x = torch.randn(2, 3)
    program = capture_module(module, {"x": x})
    assert [port.name for port in program.outputs] == ["output_x", "a.b", "output_a.b", "output_0"]
    for added, value in enumerate(program.run(x=x).values()):
        torch.testing.assert_close(value, module.inner(x) + added)


class Coordinates(nn.Module):
    """Inputs and outputs with the names of a language model's, and other types."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.classes = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classes(tokens + self.inner(positions))}


def test_a_name_means_something_only_with_its_type() -> None:
    module = Coordinates().eval()
    program = capture_module(module, {"tokens": torch.randn(2, 7, 8), "positions": torch.randn(2, 7, 3)})
    verify(program)
    assert [port.role for port in program.inputs] == [Role.TENSOR, Role.TENSOR]
    tokens, positions = torch.randn(3, 4, 8), torch.randn(3, 4, 3)
    outputs = program.run(tokens=tokens, positions=positions)
    torch.testing.assert_close(outputs["logits"], module(tokens, positions)["logits"])


class Detector(nn.Module):
    """Logits of three queries, whatever the number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.queries, self.classes = nn.Embedding(9, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        embedded = self.table(input_ids)
        return {"logits": self.classes(self.queries(embedded).softmax(1).transpose(1, 2) @ embedded)}


def test_logits_of_something_else_than_tokens_are_no_language_model() -> None:
    module, tokens = Detector().eval(), torch.arange(8).reshape(2, 4)
    opt = optimize(module, example_inputs={"input_ids": tokens}, target="eager", progress=False)
    assert [port.role for port in opt.program.outputs] == [Role.TENSOR]
    torch.testing.assert_close(opt(tokens)["logits"], module(tokens)["logits"])


def test_compiled_torch_script_is_refused() -> None:
    scripted = torch.jit.trace(nn.Linear(3, 3), torch.ones(2, 3))
    for module in (scripted, nn.Sequential(scripted).eval()):
        with pytest.raises(Unsupported, match="TorchScript"):
            capture_module(module, {"input": torch.ones(2, 3)})


def test_bad_models_and_examples_are_user_errors() -> None:
    llama = models.model("llama")
    with pytest.raises(UserError, match="training mode"):
        capture_huggingface(LlamaForCausalLM(llama.config).train())
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama.config).eval()
    with pytest.raises(UserError, match="meta device"):
        capture_huggingface(empty)
    with pytest.raises(UserError, match=r"torch\.nn\.Module"):
        capture_huggingface("llama")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="do not fit"):
        capture_module(Scaled().eval(), {"y": torch.ones(2, 3, 16)})
    with pytest.raises(InvalidInput, match="fails on the example"):
        capture_module(Scaled().eval(), {"x": torch.ones(2, 3, 5)})


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": -1}, None),  # XLNet has no end
        ({"max_position_embeddings": None, "n_positions": 32}, 32),
        ({}, None),
    ],
)
def test_a_configuration_without_an_end_limits_nothing(settings: dict[str, int | None], positions: int | None) -> None:
    assert huggingface._positions(SimpleNamespace(**settings)) == positions
