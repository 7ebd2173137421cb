"""Linear layers of decode steps: which become one operator with what stands around them, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from skipstone import FuseParallel, LayerParallel, Segment
from skipstone.ir.capture.module import capture_module
from skipstone.ir.norms import rms_norm
from skipstone.ir.program import Program
from skipstone.passes.layer_parallel import Unit
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.triton import products
from skipstone.runtime.triton.lower import decode_graph, lower
from skipstone.runtime.triton.products import gather, linear, matmul, multiply
from tests import models
from tests.test_triton_target import rewritten

pytestmark = pytest.mark.usefixtures("one_thread")


def calls(graph: fx.Graph) -> list[dict[str, Any]]:
    """What each operator of a graph takes in."""
    names = (
        "x", "weights", "biases", "gain", "residual", "skip", "cos", "sin", "rotated", "eps", "offset", "activation",
        "is_gated",
    )  # fmt: skip
    return [dict(zip(names, node.args, strict=True)) for node in graph.nodes if node.target is multiply]


def summary(call: dict[str, Any]) -> str:
    """Such as "norm 2 silu gated residual"."""
    parts = ["norm"] * (call["eps"] is not None) + [str(len(call["weights"]))]
    parts += [call["activation"]] * (call["activation"] != "none") + ["gated"] * call["is_gated"]
    parts += ["rotated"] * (call["cos"] is not None)
    parts += ["may skip"] * (call["skip"] is not None)
    return " ".join([*parts, *["residual"] * (call["residual"] is not None)])


FOUND = {
    "llama": {"norm 3 rotated": 3, "1 residual": 6, "norm 2 silu gated": 3, "norm 1": 1},
    "gemma2": {
        "norm 3 rotated": 3,
        "1": 6,
        "norm 1": 1,
        "norm 2 gelu_tanh gated": 3,
    },  # what is added is a norm's result
    # LayerNorm; one layer of queries, keys and values; attention and FFN are summed first, and then added to the stream
    "gpt_neox": {"1": 7, "1 gelu": 3, "1 residual": 3},
}


@pytest.mark.parametrize("name", FOUND)
def test_layers_take_in_what_stands_around_them(name: str) -> None:
    graph = decode_graph(lower(rewritten(name)))
    assert Counter(map(summary, calls(graph))) == FOUND[name]
    assert not any(node.target in (linear, torch.ops.aten.linear.default) for node in graph.nodes)
    graph.lint()


def test_gains_that_are_more_by_a_number() -> None:
    found = calls(decode_graph(lower(rewritten("gemma2"))))
    assert {call["offset"] for call in found if call["eps"] is not None} == {1.0}


class Small(nn.Module):
    """Layers of one value, and what `forward` makes of them."""

    def __init__(self, forward: Callable[[Small, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16, dtype=dtype) for _ in range(3))
        self.both = nn.Linear(16, 32, dtype=dtype)
        self.gain = nn.Parameter(torch.rand(16, dtype=dtype) + 0.5)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)

    def norm(self, x: Tensor) -> Tensor:
        """As models write it."""
        wide = x.float()
        return self.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def captured(forward: Callable[[Small, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    return capture_module(Small(forward, dtype).eval(), {"x": torch.randn(2, 3, 16, dtype=dtype)})


FORMS: dict[str, tuple[Callable[[Small, Tensor], Tensor], dict[str, int]]] = {
    "sum": (lambda m, x: x + m.a(x), {"1 residual": 1}),
    "other order": (lambda m, x: m.a(x) + x, {"1 residual": 1}),
    "read twice": (lambda m, x: (y := m.a(x)) * y.sigmoid() + m.b(x), {"1": 1, "1 residual": 1}),
    "scaled sum": (lambda m, x: torch.add(x, m.a(x), alpha=2), {"1": 1}),
    "broadcast sum": (lambda m, x: m.a(x) + m.gain, {"1": 1}),
    "two sums": (lambda m, x: m.a(x) + m.b(x) + x, {"1": 1, "1 residual": 1}),
    "gate": (lambda m, x: F.silu(m.a(x)) * m.b(x) + x, {"2 silu gated residual": 1}),
    "gate behind": (lambda m, x: m.b(x) * F.relu(m.a(x)), {"2 relu gated": 1}),
    "gate of another value": (lambda m, x: F.silu(m.a(x)) * m.b(x + 1), {"1 silu": 1, "1": 1}),
    "gate of itself": (lambda m, x: F.silu(y := m.a(x)) * y, {"1": 1}),
    "gate read twice": (lambda m, x: (F.gelu(m.a(x)) * (y := m.b(x))) + y, {"1 gelu": 1, "1": 1}),
    "halves": (
        lambda m, x: F.silu((y := m.both(x))[..., :16]) * y[..., 16:] + x, {"1 silu gated residual": 1},
    ),
    "split": (lambda m, x: (y := m.both(x).chunk(2, -1))[1] * F.gelu(y[0]), {"1 gelu gated": 1}),
    "halves, second first": (lambda m, x: F.silu((y := m.both(x))[..., 16:]) * y[..., :16], {"1": 1}),
    "halves without a gate": (lambda m, x: (y := m.both(x))[..., :16] * y[..., 16:], {"1": 1}),
    "halves and the whole": (
        lambda m, x: F.silu((y := m.both(x))[..., :16]) * y[..., 16:] + y.sum(-1, keepdim=True), {"1": 1},
    ),
    "unequal parts": (lambda m, x: F.silu((y := m.both(x))[..., :8]) * y[..., 24:], {"1": 1}),
    "squares": (lambda m, x: m.b(F.relu(m.a(x)).square()), {"1 relu_squared": 1, "1": 1}),
    "norm": (lambda m, x: torch.cat([m.a(y := m.norm(x)), m.b(y), m.c(x)], -1), {"norm 2": 1, "1": 1}),
    "norm read elsewhere": (lambda m, x: m.a(y := m.norm(x)) * y, {"norm 1": 1}),
    "norm without a gain": (
        lambda m, x: m.a(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), {"norm 1": 1},
    ),
    "operator": (lambda m, x: m.a(F.rms_norm(x, (16,), m.gain, 1e-6)), {"norm 1": 1}),
    "gain of the moment": (
        lambda m, x: m.a(F.rms_norm(x, (16,), None, 1e-6) * x.mean((0, 1))), {"1": 1},
    ),
    "other norms": (
        lambda m, x: m.a(x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))
        + m.b(x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)),
        {"1 residual": 1, "1": 1},
    ),
    "rows of a norm": (
        lambda m, x: m.a(m.norm(x).gather(1, x[..., :1].argmax(1, keepdim=True).expand(-1, -1, 16))), {"norm 1": 1},
    ),
    "single channels of a norm": (lambda m, x: m.a(m.norm(x).gather(1, x.argmax(1, keepdim=True))), {"1": 1}),
    "channels in another order": (
        lambda m, x: m.a(m.norm(x).gather(2, x[:, :1].argsort(2).expand(-1, x.shape[1], -1))), {"1": 1},
    ),
    "a chain": (lambda m, x: (y := x + m.a(m.norm(x))) + m.b(m.norm(y)), {"norm 1 residual": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    forward, found = FORMS[name]
    program = captured(forward)
    graph = decode_graph(program)
    assert Counter(map(summary, calls(graph))) == found
    x = torch.randn(2, 1, 16)
    (wanted,) = program.run(**{program.inputs[0].name: x}).values()
    (given,) = fx.Interpreter(fx.GraphModule(program.tensors(), graph)).run(x)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As models write it."""
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), -1)
    return heads * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


class Rotary(nn.Module):
    """Queries and keys, heads of four channels, and values; `body` makes something of what they are read as."""

    def __init__(self, body: Callable[..., Tensor], is_one: bool) -> None:
        super().__init__()
        parts = [nn.Linear(16, 24)] if is_one else [nn.Linear(16, size) for size in (8, 8, 8)]
        self.parts, self.body = nn.ModuleList(parts), body

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        results = [part(x) for part in self.parts]
        parts = results[0].split(8, -1) if len(results) == 1 else results
        heads = [part.reshape(*x.shape[:2], 2, 4).transpose(1, 2) for part in parts]
        return self.body(*heads, cos, sin)


ROTARY: dict[str, tuple[Callable[..., Tensor], list[int]]] = {
    "queries and keys": (lambda q, k, v, c, s: rotated(q, c, s) + rotated(k, c, s) + v, [8, 8, 0]),
    "keys alone": (lambda q, k, v, c, s: q + rotated(k, c, s) + v, [0, 8, 0]),
    "other angles": (lambda q, k, v, c, s: rotated(q, c, s) + rotated(k, s, c) + v, [8, 0, 0]),
    "read elsewhere": (lambda q, k, v, c, s: rotated(q, c, s) * q + rotated(k, c, s) + v, [0, 8, 0]),
    "angles that come later": (lambda q, k, v, c, s: rotated(q, c, t := s + v[:, 0]) + rotated(k, c, t) + v, [0, 0, 0]),
    "angles of heads": (lambda q, k, v, c, s: q * c[:, None] - k * s[:, None] + v, [0, 0, 0]),
    "without a sign": (
        lambda q, k, v, c, s: q * c[:, None] + torch.cat((q[..., 2:], q[..., :2]), -1) * s[:, None] + k + v, [0, 0, 0],
    ),
    "halves in order": (
        lambda q, k, v, c, s: q * c[:, None] + torch.cat((-q[..., :2], q[..., 2:]), -1) * s[:, None] + k + v, [0, 0, 0],
    ),
    "uneven halves": (
        lambda q, k, v, c, s: q * c[:, None] + torch.cat((-q[..., 1:], q[..., :1]), -1) * s[:, None] + k + v, [0, 0, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("is_one", [False, True])
@pytest.mark.parametrize("name", ROTARY)
def test_rotary_embeddings(name: str, is_one: bool) -> None:
    """Of one layer for queries, keys and values, those of its first columns."""
    body, found = ROTARY[name]
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 16), "cos": torch.randn(2, 3, 4), "sin": torch.randn(2, 3, 4)}
    program = capture_module(Rotary(body, is_one).eval(), inputs)
    graph = decode_graph(program)
    (call,) = calls(graph)
    first = next((place for place, count in enumerate(found) if count == 0), 3)
    assert call["rotated"] == ([sum(found[:first])] if is_one else found)
    given = [torch.randn(2, 1, size) for size in (16, 4, 4)]
    (wanted,) = program.run(**{port.name: each for port, each in zip(program.inputs, given, strict=True)}).values()
    (result,) = fx.Interpreter(fx.GraphModule(program.tensors(), graph)).run(*given)
    torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


def test_norms_in_half_precision_are_taken_in() -> None:
    program = captured(lambda m, x: x + m.a(m.norm(x)), torch.bfloat16)
    graph = decode_graph(program)
    assert [summary(call) for call in calls(graph)] == ["norm 1 residual"]
    x = torch.randn(1, 1, 16, dtype=torch.bfloat16)
    (wanted,) = program.run(**{program.inputs[0].name: x}).values()
    (given,) = fx.Interpreter(fx.GraphModule(program.tensors(), graph)).run(x)
    torch.testing.assert_close(given, wanted, rtol=2e-2, atol=2e-2)


def test_norms_that_change_the_dtype_stay_apart() -> None:
    def forward(m: Small, x: Tensor) -> Tensor:
        return m.a(F.rms_norm(x.double(), (16,), m.gain.double(), 1e-6).float())

    program = captured(forward)
    (call,) = calls(decode_graph(program))
    assert summary(call) in ("1", "norm 1")
    if call["eps"] is not None:
        assert call["x"].meta["val"].dtype == torch.float32


@pytest.mark.parametrize(("rows", "chosen"), [(1, 1), (1, 3), (4, 1), (4, 4)])
def test_rows_are_gathered_where_there_are_others(rows: int, chosen: int) -> None:
    x = torch.randn(2, rows, 5)
    index = torch.randint(rows, (2, chosen, 1)).expand(-1, -1, 5)
    assert torch.equal(gather(x, 1, index), torch.gather(x, 1, index))


@pytest.mark.parametrize(
    ("left", "right"), [((2, 8, 1), (2, 1, 3)), ((1, 8, 1), (2, 1, 1)), ((3, 1, 6), (3, 6, 4)), ((3, 2, 6), (6, 4))]
)
def test_products_are_those_of_matrices(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    x, y = torch.randn(left, dtype=torch.float64), torch.randn(right, dtype=torch.float64)
    torch.testing.assert_close(matmul(x, y), torch.matmul(x, y), rtol=1e-12, atol=1e-12)


AT_ONCE: dict[str, tuple[Unit, dict[str, int], int]] = {
    "layer": ("layer", {"norm 1": 2, "norm 1 silu gated": 1, "1": 1, "1 residual": 1}, 2),
    "two_stage": ("two_stage", {"norm 1": 3, "1 residual": 2}, 0),
}
"""Fused layers in float32, and how many products have lanes: those that read the same rows are one wide layer."""


def at_once(unit: Unit) -> Program:
    plan = Plan([LayerParallel((Segment(0, 3, unit=unit),)), FuseParallel()])
    program, refusal = rewrite(models.program("llama"), plan, target="triton")
    assert refusal is None
    return program


@pytest.mark.parametrize("unit", AT_ONCE)
def test_layers_at_the_same_time_are_lanes(unit: str) -> None:
    graph = decode_graph(lower(at_once(AT_ONCE[unit][0])))
    found = calls(graph)
    assert Counter(map(summary, found)) == AT_ONCE[unit][1]
    stacks = [call for call in found if call["weights"][0].meta["val"].ndim == 3]
    assert all(call["gain"].meta["val"].shape == (3, 32) for call in stacks if call["eps"] is not None)
    assert len(stacks) == AT_ONCE[unit][2]
    assert all(isinstance(node.meta["val"].shape[0], torch.SymInt) for node in graph.find_nodes(op="placeholder"))


def test_layers_that_tokens_may_skip() -> None:
    found = Counter(map(summary, calls(decode_graph(lower(rewritten("llama", "adaptive"))))))
    first = {"norm 2 silu gated": 1}  # which has no FFN before to be compared with
    others = {"norm 2 silu gated may skip": 2, "1 may skip residual": 2}
    assert found == {"norm 3 rotated": 3, "1 residual": 4, "norm 1": 1} | first | others


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("plan", ["plain", "adaptive", *AT_ONCE])
def test_the_operator_computes_what_the_plain_form_does(plan: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, with the operator's reference in the place of its kernel."""
    lowered = lower(at_once(AT_ONCE[plan][0]) if plan in AT_ONCE else rewritten("llama", plan))
    graph = decode_graph(lowered)
    generator = torch.Generator().manual_seed(0)
    known = {
        "start": torch.tensor([5, 7]),
        "decode_start": torch.tensor([2, 3]),
        "position_ids": torch.tensor([[5], [7]]),
    }
    inputs = []
    for port, node in zip(lowered.inputs, graph.find_nodes(op="placeholder"), strict=True):
        value = node.meta["val"]
        if value.ndim == 4:
            inputs.append(torch.randn(batch, value.shape[1], 16, value.shape[3], generator=generator))
        else:
            inputs.append(known.get(port.name, torch.zeros(2, 1, dtype=torch.int64))[:batch])
    module = fx.GraphModule(lowered.tensors(), graph)
    (wanted,) = module(*(value.clone() for value in inputs))
    taken = []

    def has_kernel(x: Tensor, count: int) -> bool:
        taken.append(count)
        return True

    monkeypatch.setattr(products, "has_kernel", has_kernel)
    (given,) = module(*(value.clone() for value in inputs))
    assert taken == [batch] * len(calls(graph))
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


def test_what_is_an_rms_norm() -> None:
    program = captured(lambda m, x: m.a(m.norm(x)))
    found = [norm for node in program.nodes() if (norm := rms_norm(node)) is not None and norm.gain is not None]
    assert len(found) == 1 and found[0].eps == 1e-6 and found[0].gain is not None
    assert found[0].gain.op == "get_attr" and found[0].x.op == "placeholder"


def test_numbers_are_no_norms() -> None:
    program = captured(lambda m, x: x * (m.a.weight.sum() * m.a.bias.sum()) * x.shape[1] ** 0.5)
    assert not any(rms_norm(node) for node in program.nodes() if node.target is torch.ops.aten.mul.Tensor)
