"""Plans that compress prompts, and what they mean, told by the user's model itself: its attention weights and masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.plan import Plan
from tests.compress_cases import HEADS, KV_HEADS, LAYERS, model, optimized

CASES = {
    "all": CompressPrompt(rows=12, observed=4, sinks=2, pool=3),
    "alike": CompressPrompt(rows=9, observed=3, sinks=0, pool=1, redundancy=0.5),
    "one layer": CompressPrompt(rows=7, observed=2, sinks=1, pool=5, layers=(1,)),
}


@cache
def _executable(heads: str, case: str, target: Any, dtype: torch.dtype) -> Any:
    return optimized(heads, Plan([CASES[case]]), target, dtype)


def executable(heads: str, case: str, target: Any = "eager", dtype: torch.dtype = torch.float32) -> Any:
    return _executable(heads, case, target, dtype)


@torch.no_grad()
def kept(heads: str, entry: CompressPrompt, prompt: Tensor) -> list[list[set[int]]]:
    """By layer and key-value head, the tokens [S] of a prompt that are kept; in float64, token by token."""
    own, length, group = model(heads, torch.float64), len(prompt), HEADS // KV_HEADS[heads]
    out = own(prompt[None], output_attentions=True, use_cache=True)
    everything = set(range(length))
    layers = []
    for layer in range(LAYERS):
        weights, keys = out.attentions[layer][0], out.past_key_values.layers[layer].keys[0]
        chosen = []
        for head in range(KV_HEADS[heads]):
            if length <= entry.rows or (entry.layers is not None and layer not in entry.layers):
                chosen.append(everything)
                continue
            asked = weights[head * group : (head + 1) * group, -entry.observed :].mean(dim=1).amax(dim=0)
            reach = entry.pool // 2
            score = [float(asked[max(0, j - reach) : j + reach + 1].max()) for j in range(length)]
            if entry.redundancy:
                unit = keys[head] / keys[head].norm(dim=-1, keepdim=True)
                alike = torch.stack([(unit[j] @ unit.T).sum() - 1 for j in range(length)]) / length
                shares = alike.softmax(0).tolist()
                score = [(1 - entry.redundancy) * a - entry.redundancy * b for a, b in zip(score, shares, strict=True)]
            always = {*range(entry.sinks), *range(length - entry.observed, length)}
            others = sorted(everything - always, key=lambda j: -score[j])
            chosen.append(always | set(others[: entry.rows - len(always)]))
        layers.append(chosen)
    return layers


@torch.no_grad()
def reference(
    heads: str,
    entry: CompressPrompt,
    prompt: Tensor,
    rest: Tensor,
    dtype: torch.dtype = torch.float32,
    layers: list[list[set[int]]] | None = None,
    without: Sequence[int] = (),
) -> Tensor:
    """Logits [S, V] of a prompt and what follows it, read at once and without a cache.

    Args:
        layers: what is seen of the prompt, by default what is `kept`.
        without: layers whose FFN is left out behind the prompt.
    """
    own, rows = model(heads, dtype), torch.cat([prompt, rest])
    group, length = HEADS // KV_HEADS[heads], len(prompt)
    i, j = torch.arange(len(rows))[:, None], torch.arange(len(rows))
    handles = []
    for layer, chosen in zip(own.model.layers, layers or kept(heads, entry, prompt), strict=True):
        seen = torch.stack([torch.isin(j, torch.tensor(sorted(chosen[head // group]))) for head in range(HEADS)])
        mask = (j <= i) & ((i < length) | (j >= length) | seen[:, None, :])

        def hide(_module: Any, args: Any, named: dict[str, Any], mask: Tensor = mask) -> Any:
            return args, {**named, "attention_mask": torch.where(mask, 0.0, -torch.inf).to(dtype)[None]}

        handles.append(layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True))

    def leave_out(_module: Any, _args: Any, out: Tensor) -> Tensor:
        return torch.where(torch.arange(len(rows))[:, None] < length, out, 0)

    handles += [own.model.layers[layer].mlp.register_forward_hook(leave_out) for layer in without]
    try:
        return own(rows[None]).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def turns(heads: str, prompt: Tensor) -> Tensor:
    """[2 * layers]: how far each sublayer turns the stream over a prompt [S], the mean of 1 - cosine."""
    own = model(heads)
    stream: list[Tensor] = []
    norms = [norm for layer in own.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]

    def note(_module: Any, args: Any) -> None:
        stream.append(args[0])

    handles = [norm.register_forward_pre_hook(note) for norm in (*norms, own.model.norm)]
    own(prompt[None])
    for handle in handles:
        handle.remove()
    return torch.stack([1 - torch.cosine_similarity(*pair, dim=-1).mean() for pair in pairwise(stream)])
