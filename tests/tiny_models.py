"""Tiny random-weight causal language models of every architecture that transformers knows.

Sizes come from one table of config field names, so that a new architecture usually builds without being mentioned here;
`OVERRIDES` holds what single architectures need on top. Windows and chunks are shorter than the prompts of the tests,
and no bias, gate, norm or sink keeps its neutral initial value: a mistake in any of them must change the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)

VOCABULARY, POSITIONS, LAYERS, HIDDEN, WINDOW = 99, 128, 4, 64, 8
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
EXPERTS, TOP = 4, 2
PAD, BOS, EOS = 0, 1, 2
FIRST_WORD = 3
"""Token ids from here on are ordinary words."""

INITIAL_GAIN = 1.25
"""Weights get this over the square root of their row length: softmaxes stay soft, yet no layer is negligible."""


def _named(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: Mapping[str, Any] = {
    **_named(VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    **_named(PAD, "pad_token_id"),
    **_named(BOS, "bos_token_id decoder_start_token_id"),
    **_named(EOS, "eos_token_id"),
    **_named(LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    # Bare decoders of encoder-decoder types size their default cache by the layers of the encoder.
    **_named(LAYERS, "encoder_layers num_encoder_layers"),
    **_named(HIDDEN, "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim"),
    **_named(HIDDEN, "attention_hidden_size input_embedding_size output_embedding_size lru_width attention_dim"),
    **_named(
        96, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff d_inner n_inner"
    ),
    **_named(96, "feed_forward_size dense_intermediate_size shared_intermediate_size intermediate_size_mlp"),
    **_named(32, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    **_named(32, "expert_ffn_hidden_size moe_shared_expert_intermediate_size hidden_size_per_layer_input"),
    **_named(HEADS, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    **_named(HEADS, "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads"),
    **_named(HEADS, "num_encoder_attention_heads linear_num_heads linear_num_value_heads"),
    **_named(
        KV_HEADS, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups linear_num_key_heads"
    ),
    **_named(HEAD_DIM, "head_dim swa_head_dim dim_head d_head kv_channels v_head_dim attention_head_size"),
    **_named(HEAD_DIM, "linear_head_dim linear_key_head_dim linear_value_head_dim query_pre_attn_scalar"),
    **_named(HEAD_DIM, "qk_rope_head_dim qk_nope_head_dim attention_head_dim index_head_dim"),
    **_named(32, "kv_lora_rank q_lora_rank o_lora_rank qk_head_dim router_hidden_size"),
    **_named(8, "rotary_dim laurel_rank gated_norm_rank adapter_rank d_rel"),
    **_named(POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length"),
    **_named(POSITIONS, "max_target_positions max_source_positions original_max_position_embeddings rel_extent"),
    **_named(WINDOW, "sliding_window sliding_window_size local_attention attention_window_size window_size"),
    **_named(WINDOW, "attention_chunk_size chunk_size mamba_chunk_size keep_window_size local_attention_window_len"),
    **_named(WINDOW, "index_topk log_scaling_n_floor floor_scale block_size"),
    **_named(EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_named(TOP, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    **_named(1, "n_shared_experts num_shared_experts topk_group first_k_dense_replace zero_expert_num"),
    **_named(2, "n_group num_expert_group n_groups"),
    **_named(HEADS, "mamba_n_heads index_n_heads mamba_num_heads n_mamba_heads"),
    **_named(HEAD_DIM, "mamba_d_state state_size ssm_state_size"),
    **_named(32, "mamba_d_head mamba_head_dim mamba_headdim"),
    **_named(8, "time_step_rank mamba_dt_rank hc_lowrank"),
    # Factors and soft caps whose defaults are neutral or far outside the values of a tiny model.
    **_named(1.5, "embedding_multiplier logits_scaling lm_head_multiplier route_scale routed_scaling_factor"),
    **_named(0.75, "residual_multiplier attention_in_multiplier attention_out_multiplier key_multiplier"),
    **_named(0.75, "ssm_in_multiplier ssm_out_multiplier moe_routed_scaling_factor time_step_scale"),
    **_named(0.3, "attention_multiplier logit_scale"),
    **_named(3.0, "attn_logit_softcapping moe_router_logit_softcapping"),
    **_named(6.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
}
"""Config field -> tiny value, applied wherever the default of the field is a number."""

SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * (LAYERS // 2)
LINEAR_AND_FULL = ["linear_attention", "full_attention"] * (LAYERS // 2)
CONVOLUTION_AND_FULL = ["conv", "full_attention"] * (LAYERS // 2)
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL}
SMALL_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "use_cache": False},  # the config lacks what a default cache needs
    "blt_local_encoder": {"hidden_size_global": HIDDEN},
    "blt_local_decoder": {"hidden_size_global": HIDDEN},
    "cohere_compass_text": {
        "layer_types": SLIDING_AND_FULL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
            for kind in SLIDING_AND_FULL
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 1.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": TOP},
    },
    "deepseek_v2": {"num_experts_per_tok": TOP},
    "dots1": {
        "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP, "n_shared_experts": 1, "layer_types": SLIDING_AND_FULL,
    },
    "dots3_note_audio_encoder": {
        **SMALL_VISION, "adapter_input_size": 32, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 8,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32, "swa_head_dim": 2 * HEAD_DIM, "swa_qk_nope_head_dim": HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
    },
    "dots3_note_vision_encoder": {
        **SMALL_VISION, "adapter_in_dim": 32, "adapter_out_dim": HIDDEN, "mlp_layer_types": ["dense"],
    },
    "encodec": {"hidden_size": 32, "num_filters": 4, "codebook_size": 16, "codebook_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 128, "mlp_multipliers": [0.75, 1.5], "ssm_multipliers": [0.5, 0.75, 1.25, 1.5, 0.8]},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "got_ocr2_vision": {**SMALL_VISION, "output_channels": 16, "mlp_dim": 32, "image_size": 64},
    "granitemoehybrid": {"layer_types": LINEAR_AND_FULL, "position_embedding_type": "rope"},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": SLIDING_AND_FULL},
    "lfm2": {"layer_types": CONVOLUTION_AND_FULL},
    "lfm2_moe": {"layer_types": CONVOLUTION_AND_FULL},
    "mamba2": {"head_dim": 32},
    "mellum": {"layer_types": SLIDING_AND_FULL},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"] * 2, "index_block_size": 4, "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": HEAD_DIM, "layer_types": SLIDING_AND_FULL},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "phi3": {"sliding_window": WINDOW},
    "phi4_multimodal_audio": {
        "hidden_size": 32, "num_blocks": 1, "num_attention_heads": 2, "intermediate_size": 32, "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
    },
    "phi4_multimodal_vision": {**SMALL_VISION, "image_size": 56, "crop_size": 56},
    "phimoe": {"sliding_window": WINDOW},
    "qwen2": WINDOWED,
    "qwen2_moe": WINDOWED,
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": WINDOW},
    "qwen4_exp_text": {
        "indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM, "indexer_budget": WINDOW,
        "indexer_compress_ratio": 2, "ple_embed_dim": HIDDEN, "ngram_vocab_size_base": 50, "split_ngram_parts": 2,
    },
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh", "local", "lsh"], "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [24, 40], "local_attn_chunk_length": WINDOW, "lsh_attn_chunk_length": WINDOW,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY, "pronunciation_embed_dim": 32,
        "shape_embed_dim": 32,
    },
    "smollm3": WINDOWED,
    "starcoder2": {"sliding_window": WINDOW},
    "t5": {"d_kv": HEAD_DIM, "d_ff": 32},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32, "num_key_value_heads": HEADS, "n_mamba_heads": 2,
    },
    "zamba2": {
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32, "num_key_value_heads": HEADS,
        "num_query_groups": HEADS, "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": WINDOW},
}  # fmt: skip
"""Model type (of a model or of a nested config) -> what its config needs besides `SIZES`."""


def _rope(**scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **scaling}}


DECODER = {"is_decoder": True}
LONG_ROPE = {"short_factor": [1.0, 1.1] * 4, "long_factor": [2.0, 3.0] * 4, "original_max_position_embeddings": 16}

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **{
        f"{model_type}:decoder": DECODER
        for model_type in (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
            "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
            "xmod",
        )
    },
    "bloom:post": {"apply_residual_connection_post_layernorm": True},
    "falcon:alibi": {"alibi": True, "parallel_attn": False},
    "falcon:new": {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
    "gemma3_text:bidirectional": {"use_bidirectional_attention": True},
    "gemma4_text:experts": {
        "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": TOP, "moe_intermediate_size": 32,
        "attention_k_eq_v": True,
    },
    "gpt2:scaled": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neox:sequential": {"use_parallel_residual": False},
    "llama:biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama:dynamic": _rope(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": 16},
    "llama:linear": _rope(rope_type="linear", factor=4.0),
    "llama:llama3": _rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16,
    ),
    "llama:yarn": _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    "mixtral:sliding": {"sliding_window": WINDOW},
    "mpt:clipped": {"attn_config": {"clip_qkv": 1.0, "qk_ln": True}},
    "olmo:clipped": {"clip_qkv": 1.0},
    "opt:post": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "phi:normed": {"qk_layernorm": True},
    "phi3:long": _rope(rope_type="longrope", **LONG_ROPE) | {"original_max_position_embeddings": 16},
    "qwen3:sliding": WINDOWED,
    "stablelm:parallel": {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True},
    "xlm:causal": {"causal": True},
}  # fmt: skip
"""``model type:word`` -> a configuration that checkpoints have, and that computes something else than the default."""


def tiny_config(name: str) -> PretrainedConfig:
    """The config of a tiny model: `SIZES`, every kind of layer of the default stack, `OVERRIDES`, then `VARIANTS`."""
    return _shrunk(CONFIG_MAPPING[name.partition(":")[0]], VARIANTS.get(name, {}))


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny causal LM in evaluation mode with random fp32 weights, the same for the same seed.

    Args:
        name: a key of transformers' causal-LM mapping, or of `VARIANTS`.
        seed: of every weight.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32).eval()
    # Without an end and without forced tokens, generated texts have a fixed length.
    model.generation_config = GenerationConfig(bos_token_id=BOS, pad_token_id=PAD)
    return randomize(model, seed)


def randomize(model: Model, seed: int = 0) -> Model:
    """Move every trained tensor away from its initial value, keeping the structure that the architecture gave it."""
    generator = torch.Generator().manual_seed(seed)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, tensor in model.state_dict().items():
        if name not in frozen and tensor.is_floating_point():
            scale = 0.1 if tensor.dim() < 2 else INITIAL_GAIN * tensor.shape[-1] ** -0.5
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ordinary words [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCABULARY, (batch, length), generator=generator)


def _shrunk(config_class: type[PretrainedConfig], variant: Mapping[str, Any] | None = None) -> PretrainedConfig:
    default = config_class()
    fields: dict[str, Any] = {}
    depth = next((getattr(default, n) for n in ("num_hidden_layers", "num_layers") if hasattr(default, n)), None)
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            fields[name] = _shrunk(type(value)).to_dict()
        elif name in SIZES and isinstance(value, int | float | list) and not isinstance(value, bool):
            fields[name] = SIZES[name]
        elif isinstance(value, list) and len(value) == depth:
            kinds = list(dict.fromkeys(value))
            fields[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    if "kv_lora_rank" in fields:  # latent attention has as many key heads as query heads
        fields["num_key_value_heads"] = HEADS
    return config_class(**{**fields, **OVERRIDES.get(config_class.model_type, {}), **(variant or {})})
