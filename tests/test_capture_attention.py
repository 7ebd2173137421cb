"""Attention that is written by hand or broadcast is taken for one operator only where that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from skipstone.ir.capture.module import capture_module
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.dialect import ATTENTION
from skipstone.optimize import Target, optimize
from skipstone.runtime.executable import Executable

HEADS, WIDTH = 3, 12
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attending(nn.Module):
    """One attention of tokens [B, S, 12] under a mask [B, S]."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(WIDTH, 3 * WIDTH), form
        nn.init.normal_(self.inner.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.inner(x).chunk(3, -1))
        return self.form(q, k, v, mask[:, None, None, :] != 0)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.5


def causal(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


def lowest(mask: Tensor, value: float) -> Tensor:
    return (~mask).float() * value


MASKED: dict[str, Form] = {
    "filled with a low number": lambda q, k, v, m: scores(q, k).masked_fill(~m, -1e9).softmax(-1) @ v,
    "filled with a number that is hardly low": lambda q, k, v, m: scores(q, k).masked_fill(~m, -1e4).softmax(-1) @ v,
    "chosen": lambda q, k, v, m: torch.where(m, scores(q, k), torch.finfo(torch.float32).min).softmax(-1) @ v,
    "with a causal one": lambda q, k, v, m: scores(q, k).masked_fill(~(m & causal(q @ k.mT)), -1e9).softmax(-1) @ v,
    "over a bias": lambda q, k, v, m: (
        (scores(q, k) + 3.0 * q.mT.sum(2)[:, :, None]).masked_fill(~m, -1e4).softmax(-1) @ v
    ),
    "under a bias": lambda q, k, v, m: (torch.where(m, scores(q, k), -1e4) + q.sum(-1)[:, :, None]).softmax(-1) @ v,
    "twice": lambda q, k, v, m: scores(q, k).masked_fill(~causal(q @ k.mT), -1e4).masked_fill(~m, -1e9).softmax(-1) @ v,
    "added": lambda q, k, v, m: (scores(q, k) + lowest(m, -1e9)).softmax(-1) @ v,
    "of the operator": lambda q, k, v, m: scaled_dot_product_attention(q, k, v, m),
}
"""Masks that may leave a query without any key. None of these models returns NaN then."""

NOT_RECOGNISED = ("under a bias", "twice")


def twice_causal(q: Tensor, k: Tensor, v: Tensor, _mask: Tensor) -> Tensor:
    """As GPT-Neo has it: filled where a query may not look, and the same hidden once more by a bias."""
    seen, low = causal(q @ k.mT), torch.finfo(torch.float32).min
    return (torch.where(seen, scores(q, k), low) + torch.where(seen, 0.0, low)).softmax(-1) @ v


BROADCAST: dict[str, Form] = {
    "one head of keys and values": lambda q, k, v, m: scores(q, k[:, :1]).softmax(-1) @ v[:, :1],
    "one head of keys": lambda q, k, v, m: scores(q, k[:, :1]).softmax(-1) @ v,
    "one head of values": lambda q, k, v, m: scaled_dot_product_attention(q, k, v[:, :1]),
    "one head of queries": lambda q, k, v, m: scaled_dot_product_attention(q[:, :1], k, v),
    "queries for all sequences": lambda q, k, v, m: scaled_dot_product_attention(torch.eye(4)[None, None, :2], k, v),
    "keys for all sequences": lambda q, k, v, m: scores(q, torch.eye(4)[None, None]).softmax(-1) @ torch.eye(4),
    "three dimensions": lambda q, k, v, m: scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v))),
    "keys and values for all": lambda q, k, v, m: scaled_dot_product_attention(q, *2 * [torch.eye(4)[None, None]]),
}


SLOW = (
    "filled with a number that is hardly low", "chosen", "with a causal one", "one head of keys",
    "queries for all sequences", "keys for all sequences",
)  # fmt: skip
"""Forms of which another one is much like them."""


def with_slow(forms: Iterable[str]) -> list[Any]:
    """Parameters: the names of forms."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in forms]


def optimized(form: Form, target: Target = "eager") -> tuple[nn.Module, Executable]:
    module = Attending(form).eval()
    example = {"x": torch.randn(2, 5, WIDTH), "mask": torch.ones(2, 5, dtype=torch.int64)}
    return module, optimize(module, example_inputs=example, target=target, progress=False)


def assert_equal(module: nn.Module, opt: Executable) -> None:
    """Compare with masks that hide the first tokens, the last, and all."""
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[1, :4] = mask[2, 4:] = mask[3] = 0
    x = torch.randn(4, 9, WIDTH)
    with torch.no_grad():
        assert relative_difference(opt(x=x, mask=mask), module(x, mask)) < 1e-6


@pytest.mark.parametrize("name", with_slow(MASKED))
def test_queries_without_keys(name: str) -> None:
    module, opt = optimized(MASKED[name])
    assert len(list(opt.program.nodes(ATTENTION))) == (name not in NOT_RECOGNISED)
    assert_equal(module, opt)


def test_a_bias_behind_a_number_is_causal_where_both_hide_what_comes_later() -> None:
    module, opt = optimized(twice_causal)
    (node,) = opt.program.nodes(ATTENTION)
    assert node.kwargs["kind"] == "causal" and node.args[3:5] == (None, None)
    assert_equal(module, opt)


@pytest.mark.parametrize("name", with_slow(BROADCAST))
def test_what_is_broadcast(name: str) -> None:
    module, opt = optimized(BROADCAST[name])
    assert_equal(module, opt)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(MASKED["with a causal one"], marks=pytest.mark.slow),
        BROADCAST["queries for all sequences"],
    ],
)
def test_lowered_to_onnx(form: Form) -> None:
    assert_equal(*optimized(form, "onnxruntime"))


def test_another_sequence_of_the_same_length_is_another_sequence() -> None:
    class Cross(nn.Module):
        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            q, k = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (x, memory))
            return scaled_dot_product_attention(q, k, k)

    program = capture_module(Cross().eval(), {"x": torch.randn(2, 5, WIDTH), "memory": torch.randn(2, 5, WIDTH)})
    (node,) = program.nodes(ATTENTION)
    assert node.kwargs["slot"] == -1
    x, memory = torch.randn(3, 4, WIDTH), torch.randn(3, 8, WIDTH)
    torch.testing.assert_close(program.run(x=x, memory=memory)["output"], Cross()(x, memory))
