"""Small models that several test files share; each is captured once in a test run."""

from __future__ import annotations

from functools import cache

import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.program import Program

VOCABULARY = 61
MASK = 60
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "deep": lambda: LlamaForCausalLM(LlamaConfig(**{**_SIZES, "num_hidden_layers": 6, "initializer_range": 0.2})),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=96, initializer_range=0.3)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SIZES, sliding_window=8, query_pre_attn_scalar=8)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{**_SIZES, "rotary_pct": 0.5})),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4, sliding_window=8)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_SIZES, num_local_experts=4, sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **_SIZES, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8, moe_layers=[1],
            no_rope_layers=[1, 1, 0], layer_types=["chunked_attention", "chunked_attention", "full_attention"],
        )
    ),
    "llada": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, is_causal=False, mask_token_id=MASK)),
    "bert": lambda: BertModel(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=96, initializer_range=0.3,
        ),
        add_pooling_layer=False,
    ),
}  # fmt: skip

CAUSAL = tuple(name for name in _BUILDERS if name not in ("deep", "llada", "bert"))


@cache
def model(name: str) -> PreTrainedModel:
    """The model of that name, with weights wide enough that mistakes show. Tests must not change it."""
    torch.manual_seed(0)
    return _BUILDERS[name]().eval()


@cache
def program(name: str) -> Program:
    """The captured program of that model. Tests work on copies."""
    return capture_huggingface(model(name))


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids other than the special ones, int64 [batch, length]."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
