"""Small models with hyper-connections (arXiv 2409.19606, 2512.24880), and their update rule written out.

The state of a token is several streams, X [STREAMS, WIDTH]. A sublayer F reads a mixture of them and is added to all:
``X' = res X + post F(pre X)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.ir.capture.module import capture_module
from skipstone.ir.program import Program
from skipstone.passes.base import run_pass
from skipstone.passes.cleanup import Cleanup
from tests.newton_oracles import newton

STREAMS, WIDTH, VOCABULARY, LAYERS, POSITIONS = 3, 8, 29, 6, 32


def sinkhorn(logits: Tensor, iterations: int = 3, temperature: float = 0.05) -> Tensor:
    """A doubly stochastic matrix, by scaling rows and columns in turn; in logarithms."""
    logits = logits / temperature
    for _ in range(iterations):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits.exp()


class Static(nn.Module):
    """Matrices that are the same for all tokens, as in nanochat-snlp."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.post = nn.Parameter(torch.randn(STREAMS)), nn.Parameter(torch.randn(STREAMS))
        self.res = nn.Parameter(0.1 * torch.randn(STREAMS, STREAMS))

    def forward(self, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.pre.softmax(-1), self.post.softmax(-1), sinkhorn(self.res)


class Dynamic(nn.Module):
    """Matrices that each token makes for itself of its streams, in single precision or wider, as in DeepSeek-V4."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(STREAMS * WIDTH, STREAMS * (STREAMS + 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype, weights = torch.promote_types(x.dtype, torch.float32), self.project
        flat = functional.rms_norm(x.flatten(-2).to(dtype), (STREAMS * WIDTH,))
        logits = functional.linear(flat, 3 * weights.weight.to(dtype), weights.bias.to(dtype))
        pre, post, res = logits.split([STREAMS, STREAMS, STREAMS * STREAMS], dim=-1)
        res = res.unflatten(-1, (STREAMS, STREAMS)).softmax(-1) + 1e-6
        for _ in range(4):
            res = res / (res.sum(-2, keepdim=True) + 1e-6)
            res = res / (res.sum(-1, keepdim=True) + 1e-6)
        return pre.sigmoid().to(x.dtype), 2 * post.sigmoid().to(x.dtype), res.to(x.dtype)


def by_matmul(pre: Tensor, post: Tensor, res: Tensor, x: Tensor, branch: Callable) -> Tensor:
    return res @ x + post.unsqueeze(-1) * branch((pre.unsqueeze(-2) @ x).squeeze(-2)).unsqueeze(-2)


def by_transposed_matmul(pre: Tensor, post: Tensor, res: Tensor, x: Tensor, branch: Callable) -> Tensor:
    """As in DeepSeek-V4, whose matrices have a row for each stream that is read."""
    y, read = branch((pre.unsqueeze(-1) * x).sum(-2)), res.transpose(-1, -2).contiguous()
    return post.unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(read.transpose(-1, -2), x)


def by_einsum(pre: Tensor, post: Tensor, res: Tensor, x: Tensor, branch: Callable) -> Tensor:
    y = branch(torch.einsum("...j,...jd->...d", pre, x))
    return torch.einsum("...ij,...jd->...id", res, x) + torch.einsum("...i, ...d -> ...id", post, y)


def by_sums(pre: Tensor, post: Tensor, res: Tensor, x: Tensor, branch: Callable) -> Tensor:
    y = branch((pre.unsqueeze(-1) * x).sum(-2))
    return (res.unsqueeze(-1) * x.unsqueeze(-3)).sum(-2) + post.unsqueeze(-1) * y.unsqueeze(-2)


def by_rows(pre: Tensor, post: Tensor, res: Tensor, x: Tensor, branch: Callable) -> Tensor:
    """Streams in the rows of the batch, as in nanochat-snlp: x [B * STREAMS, S, WIDTH]."""
    apart = x.view(x.shape[0] // STREAMS, STREAMS, *x.shape[1:])
    mixed = torch.einsum("ij,bjkl->bikl", res, apart)
    y = branch(torch.einsum("j,bjkl->bkl", pre, apart))
    return (y.unsqueeze(1) * post[None, :, None, None] + mixed).reshape(x.shape)


FORMS = {each.__name__: each for each in (by_matmul, by_transposed_matmul, by_einsum, by_sums, by_rows)}


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        with torch.no_grad():
            self.down.weight *= 2

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.qkv.weight *= 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """Attention and FFN, or an FFN alone; a connection for each."""

    def __init__(self, kind: str, form: str, attention: bool) -> None:
        super().__init__()
        self.form, connection = form, Static if kind == "static" else Dynamic
        if attention:
            self.hyper_attention, self.attention = connection(), Attention()
        self.hyper_ffn, self.ffn = connection(), FFN()

    def sublayers(self) -> list[tuple[nn.Module, nn.Module]]:
        both = [(self.hyper_attention, self.attention)] if hasattr(self, "attention") else []
        return [*both, (self.hyper_ffn, self.ffn)]  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        for connection, branch in self.sublayers():
            x = FORMS[self.form](*connection(x), x, branch)
        return x

    def along(self, x: Tensor, change: Tensor) -> Tensor:
        """What a change of the streams becomes on its way past the branches, with the matrices at `x`."""
        for connection, branch in self.sublayers():
            pre, post, res = connection(x)
            if self.form == "by_rows":
                apart = change.view(-1, STREAMS, *change.shape[1:])
                change = torch.stack([(row.view(1, -1, 1, 1) * apart).sum(1) for row in res], dim=1).flatten(0, 1)
            else:
                change = (res.unsqueeze(-1) * change.unsqueeze(-3)).sum(-2)
            x = FORMS[self.form](pre, post, res, x, branch)
        return change


class Hyper(nn.Module):
    """Layers on several streams, which are copies at first and are summed up, weighted, at the end."""

    def __init__(self, kind: str, form: str, layers: int, attention: bool) -> None:
        super().__init__()
        self.rows = form == "by_rows"
        self.layers = nn.ModuleList(Layer(kind, form, attention) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.last = nn.Parameter(torch.randn(STREAMS, 1))

    def expand(self, x: Tensor) -> Tensor:
        if self.rows:
            return x.unsqueeze(1).expand(-1, STREAMS, -1, -1).reshape(-1, *x.shape[1:])
        return x.unsqueeze(-2).repeat(1, 1, STREAMS, 1)

    def collapse(self, x: Tensor) -> Tensor:
        x = x.view(-1, STREAMS, *x.shape[1:]).movedim(1, -2) if self.rows else x
        return self.head(self.norm((self.last * x).sum(-2)))


class Stack(Hyper):
    """FFNs on floating-point inputs [B, S, WIDTH]; returns all states."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, states = self.expand(x), {}
        for number, layer in enumerate(self.layers, 1):
            states[f"state_{number}"] = x = layer(x)
        return states | {"out": self.collapse(x)}


class Language(Hyper):
    """A causal language model."""

    def __init__(self, kind: str, form: str, layers: int, attention: bool) -> None:
        super().__init__(kind, form, layers, attention)
        self.embed, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)

    def start(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.expand(self.embed(input_ids) + self.places(position_ids))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        x = self.start(input_ids, position_ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.collapse(x)}


@cache
def stack(kind: str, form: str = "by_matmul", layers: int = LAYERS, dtype: torch.dtype = torch.float64) -> Stack:
    torch.manual_seed(0)
    return Stack(kind, form, layers, attention=False).to(dtype).eval()


@cache
def language(kind: str) -> Language:
    torch.manual_seed(1)
    form = {"static": "by_rows", "dynamic": "by_transposed_matmul"}[kind]
    return Language(kind, form, 3, attention=True).double().eval()


def example(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(2))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand(ids.shape)


@cache
def program_of(model: Hyper) -> Program:
    """The captured program of a model; its weights are those of the model, also when these change."""
    ids = tokens(2, 7)
    inputs = {"x": example(next(model.parameters()).dtype)}
    if isinstance(model, Language):
        inputs = {"input_ids": ids, "position_ids": positions(ids)}
    return run_pass(Cleanup(), capture_module(model, inputs))


@torch.no_grad()
def states(model: Hyper, start: Tensor, iterations: int, identity: bool = False) -> list[Tensor]:
    """The states behind all layers after so many Newton steps, from the state before them."""
    slopes: list[Any] = [1.0 if identity else layer.along for layer in model.layers]
    return newton(list(model.layers), start, iterations, slopes)
