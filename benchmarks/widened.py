"""A small trained model in the shape of a large one: what it computes stays, what it costs does not."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

Sizes = dict[str, int]


@torch.no_grad()
def widened(model: LlamaForCausalLM, *, hidden: int, intermediate: int, heads: int, head_dim: int) -> LlamaForCausalLM:
    """A Llama that gives the logits of `model`, but for rounding, with wider layers; the new weights are zeros.

    Norms divide by the mean over all channels, and products of queries and keys by the root of the head's width: their
    weights make up for the zeros among these. A pair of channels that turn together stays one with the same frequency.
    Each query head gets a key-value head of its own, a copy of the one that it shared.

    Args:
        model: a Llama without biases.
        hidden, intermediate, heads, head_dim: sizes, of which each is a multiple of the model's, or no less.
    """
    old = model.config
    config = copy.deepcopy(old)
    config.hidden_size, config.intermediate_size, config.head_dim = hidden, intermediate, head_dim
    config.num_attention_heads = config.num_key_value_heads = heads
    config.rms_norm_eps = old.rms_norm_eps * old.hidden_size / hidden
    wide = LlamaForCausalLM(config).to(next(model.parameters()).dtype).eval()
    wide.generation_config = copy.deepcopy(model.generation_config)
    turned = _turned(old.head_dim, head_dim)
    group = old.num_attention_heads // old.num_key_value_heads
    rows = torch.cat([head * head_dim + turned for head in range(old.num_attention_heads)])
    shared = torch.arange(old.num_attention_heads) // group
    sources = (shared.unsqueeze(1) * old.head_dim + torch.arange(old.head_dim)).flatten()
    for own, other in zip(wide.model.layers, model.model.layers, strict=True):
        mine, theirs = own.self_attn, other.self_attn
        root = math.sqrt(head_dim / old.head_dim)
        _put(mine.q_proj, theirs.q_proj.weight * root, rows)
        _put(mine.k_proj, theirs.k_proj.weight[sources], rows)
        _put(mine.v_proj, theirs.v_proj.weight[sources], rows)
        mine.o_proj.weight.zero_()
        mine.o_proj.weight[: old.hidden_size, rows] = theirs.o_proj.weight
        for name in ("gate_proj", "up_proj", "down_proj"):
            _put(getattr(own.mlp, name), getattr(other.mlp, name).weight)
        for name in ("input_layernorm", "post_attention_layernorm"):
            _scale(getattr(own, name), getattr(other, name))
    _scale(wide.model.norm, model.model.norm)
    for layer, other in ((wide.model.embed_tokens, model.model.embed_tokens), (wide.lm_head, model.lm_head)):
        _put(layer, other.weight)
    return wide


def _turned(narrow: int, wide: int) -> Tensor:
    """Where the channels of a head stand in a wider one, so that the rotary embedding turns them as before."""
    pairs = torch.arange(narrow // 2) * (wide // narrow)  # the frequencies of which there are more in between now
    return torch.cat([pairs, pairs + wide // 2])


def _put(layer: nn.Linear | nn.Embedding, weight: Tensor, rows: Tensor | None = None) -> None:
    """Zeros, but for a weight [rows, columns] in these rows (by default the first) and the first columns."""
    rows = torch.arange(len(weight)) if rows is None else rows
    layer.weight.zero_()
    layer.weight[rows, : weight.shape[1]] = weight


def _scale(norm: nn.Module, other: nn.Module) -> None:
    narrow, wide = len(other.weight), len(norm.weight)  # type: ignore[arg-type]
    norm.weight.zero_()  # type: ignore[operator]
    norm.weight[:narrow] = other.weight * math.sqrt(narrow / wide)  # type: ignore[index,operator]
