"""The architectures of the reference models, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    NanoChatConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.reference import tokenizer

HEAD = 32
"""The width of a head."""

UNMASKED = "unmasked_sdpa"
"""Attention that is told no more than that it is causal. With a mask function, as "sdpa" has one, transformers looks
for packed sequences: that waits for the device, and in the capture of a CUDA graph it makes a mask in any case."""

AttentionInterface.register(UNMASKED, sdpa_attention_forward)

TOKENS = {
    "vocab_size": tokenizer.VOCABULARY,
    "bos_token_id": tokenizer.BEGIN,
    "eos_token_id": tokenizer.END,
    "pad_token_id": tokenizer.PADDING,
    "max_position_embeddings": 512,
    "dtype": "float32",
}


def llama(layers: int = 12, width: int = 128, masked: bool = False) -> LlamaConfig:
    """Llama with grouped-query attention and tied embeddings.

    A model that fills in masks is the same with one token more, and every token sees all others.
    """
    own = {"is_causal": False, "mask_token_id": tokenizer.MASK} if masked else {}
    return LlamaConfig(
        **TOKENS | {"vocab_size": tokenizer.VOCABULARY + masked} | own,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=max(1, width // (2 * HEAD)),
        head_dim=HEAD,
        tie_word_embeddings=True,
    )


def nanochat(layers: int = 32, width: int = 96, masked: bool = False) -> NanoChatConfig:
    """nanochat: norms without gains, squared ReLU, normalized queries and keys, an own head.

    Raises ValueError for a model that fills in masks: its attention is causal.
    """
    if masked:
        raise ValueError("nanochat predicts next bytes: its attention is causal")
    return NanoChatConfig(
        **TOKENS,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        tie_word_embeddings=False,
    )


ARCHITECTURES: dict[str, Callable[[int, int, bool], PreTrainedConfig]] = {"llama": llama, "nanochat": nanochat}
"""The configuration of so many layers of that width, with or without masks to fill in."""


def build(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    """A model with new weights. As in the original, the branches of a nanochat begin at zero."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if isinstance(config, NanoChatConfig):
        for layer in model.model.layers:
            for last in (layer.self_attn.o_proj, layer.mlp.fc2):
                nn.init.zeros_(last.weight)
    return model
