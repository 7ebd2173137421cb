"""Gates: what is computed for a token depends on the token.

`skip_predicate` decides, for each token on its own, and `gate` obeys: it gives zeros in the rows that skip. A program
stays one flat graph; what only a gate needs is what it *spares* (`spared`). That follows from the graph, is never
marked, and changes no value: a lowering may compute all of it, or none of it where every row skips.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_SMALLEST = 1e-30
"""Product of norms below which two vectors count as orthogonal."""


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosine similarity [...] of vectors [..., H], in [-1, 1] and in the wider of float32 and their dtype.

    A vector of zeros has the cosine 0 with every other.
    """
    exact = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(exact), after.to(exact)
    norms = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
    return ((before * after).sum(dim=-1) / norms.clamp(min=_SMALLEST)).clamp(-1, 1)


def decoding(rows: int, start: Tensor, decode_start: Tensor, warmup_tokens: int) -> Tensor:
    """bool [B, S]: whether each of `rows` new tokens comes after the prompt and the warm-up; see `skip_predicate`."""
    positions = start.unsqueeze(1) + torch.arange(rows, device=start.device)
    return positions >= (decode_start + warmup_tokens).unsqueeze(1)


def skip_predicate_reference(
    before: Tensor,
    after: Tensor,
    start: Tensor,
    decode_start: Tensor,
    met: Tensor | None = None,
    *,
    threshold: float,
    warmup_tokens: int,
) -> Tensor:
    """Whether each token has met a sublayer that hardly changed it: FFN-SkipLLM's condition (arXiv 2404.03865).

    A token meets the condition where the cosine of the stream before and after the sublayer reaches `threshold`. The
    token of row i of sequence b stands at position ``start[b] + i``; up to ``decode_start[b] + warmup_tokens`` it never
    does. Nothing depends on how many tokens a step has.

    Args:
        before, after: the stream [B, S, H] before the sublayer, and after its result was added.
        start: int64 [B], tokens of each sequence that were read before this step.
        decode_start: int64 [B], the position of the first token behind each prompt.
        met: bool [B, S], whether the token met the condition at an earlier sublayer.
        threshold: in [-1, 1]; above, no token ever meets the condition.
        warmup_tokens: tokens behind the prompt that never do.
    Returns:
        bool [B, S].
    """
    decoded = decoding(before.shape[1], start, decode_start, warmup_tokens)
    reached = decoded & (cosine(before, after) >= threshold)
    return reached if met is None else met | reached


skip_predicate = torch.library.custom_op("skipstone::skip_predicate", skip_predicate_reference, mutates_args=())


@skip_predicate.register_fake
def _(before, after, start, decode_start, met=None, **_options):  # type: ignore[no-untyped-def]
    torch._check(before.shape == after.shape, lambda: "the stream before and after differ in size")
    return before.new_empty(before.shape[:2], dtype=torch.bool)


def gate_reference(x: Tensor, skip: Tensor) -> Tensor:
    """`gate` in plain PyTorch operators."""
    return x.masked_fill(skip.unsqueeze(-1), 0)


@torch.library.custom_op("skipstone::gate", mutates_args=())
def gate(x: Tensor, skip: Tensor) -> Tensor:
    """Rows of `x`, and zeros in those that skip.

    Args:
        x: [B, S, H].
        skip: bool [B, S].
    Returns:
        [B, S, H].
    """
    return gate_reference(x, skip).contiguous()


@gate.register_fake
def _(x, skip):  # type: ignore[no-untyped-def]
    torch._check(x.shape[:2] == skip.shape, lambda: "a gate needs one decision a row")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


SKIP_PREDICATE = torch.ops.skipstone.skip_predicate.default
GATE = torch.ops.skipstone.gate.default


def spared(node: fx.Node) -> list[fx.Node]:
    """The calls that only the value of this gate needs, in graph order: where every row skips, none is needed."""
    inside: dict[Any, None] = {node: None}
    skip = node.args[1]
    before = node.prev
    while before.op != "root":
        needed_here = before.op == "call_function" and before is not skip
        if needed_here and before.users and all(user in inside for user in before.users):
            inside[before] = None
        before = before.prev
    return list(inside)[:0:-1]
