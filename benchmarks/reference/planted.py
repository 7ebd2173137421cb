"""Variants of the reference model with what makes keys and values hard to quantize, as large models have it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

KEY_BIAS_NORM = 600.0
"""Length of a layer's key bias, about that of the first layer of Qwen2.5-7B."""

OUTLIER = 16.0
"""How many times larger outlier channels are made: a power of two, so that nothing is rounded."""


@torch.no_grad()
def with_key_bias(model: LlamaForCausalLM, norm: float = KEY_BIAS_NORM, seed: int = 0) -> Qwen2ForCausalLM:
    """The model as a Qwen2 with a large key bias in every layer; norm 0 gives the same function.

    The bias lies in the two channels that rotate slowest, as in Qwen2 itself. There it is nearly the same vector at
    every position, so that it adds nearly the same to all logits of a query, and the model predicts as well as before.

    Args:
        model: without biases; it stays as it is.
        norm: Euclidean length of the bias of one layer, over all its key-value heads.
        seed: of the direction in each plane.
    """
    own = model.config.to_dict()
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    planted = Qwen2ForCausalLM(Qwen2Config(**{name: own[name] for name in names})).to(model.dtype).eval()
    biases = {name: torch.zeros_like(each) for name, each in planted.named_parameters() if name.endswith("_proj.bias")}
    planted.load_state_dict(model.state_dict() | biases)
    generator = torch.Generator().manual_seed(seed)
    for layer in planted.model.layers:
        attention = layer.self_attn
        bias = attention.k_proj.bias.view(-1, 2, attention.head_dim // 2)  # [KH, half, pair]: (d, d + D/2) rotate
        direction = torch.randn(len(bias), 2, generator=generator)
        bias[..., -1] = norm * direction / direction.norm()
    return planted


@torch.no_grad()
def with_outliers(
    model: LlamaForCausalLM, factor: float = OUTLIER, pairs: int = 1, channels: int = 2, seed: int = 0
) -> LlamaForCausalLM:
    """The model with outlier channels in its keys and values; the function is the same.

    In every head of every layer, `pairs` pairs of key channels that rotate together and `channels` value channels are
    multiplied by `factor`; the query channels and the columns of the output projection that meet them are divided.

    Args:
        model: it stays as it is.
        seed: of the choice of channels.
    """
    planted = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for layer in planted.model.layers:
        attention = layer.self_attn
        group, width = attention.num_key_value_groups, attention.head_dim
        heads = attention.k_proj.out_features // width
        keys, values = torch.ones(heads, width), torch.ones(heads, width)
        for head in range(heads):
            pair = torch.randperm(width // 2, generator=generator)[:pairs]
            keys[head, pair] = keys[head, pair + width // 2] = factor
            values[head, torch.randperm(width, generator=generator)[:channels]] = factor
        attention.k_proj.weight *= _column(keys)
        attention.q_proj.weight /= _column(keys.repeat_interleave(group, dim=0))
        attention.v_proj.weight *= _column(values)
        attention.o_proj.weight /= _column(values.repeat_interleave(group, dim=0)).T
    return planted


def _column(scales: Tensor) -> Tensor:
    return scales.reshape(-1, 1)
