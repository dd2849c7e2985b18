"""Build a tiny random model of any causal model type that Transformers registers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every model type of `AutoModelForCausalLM`."""
WINDOW = 64
VOCABULARY = 97
LARGEST = 30_000_000
"""Parameters of the largest model that counts as tiny."""

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size", "model_dim"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "rnn_hidden_size", "lru_width"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "input_vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("n_inner", "d_inner", "dff", "intermediate_size_mlp", "shared_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), WINDOW),
    **dict.fromkeys(("seq_length", "max_target_positions", "max_source_positions"), WINDOW),
    **dict.fromkeys(("sliding_window", "attention_window", "window_size", "attention_chunk_size"), 8),
    "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "global_head_dim": 16, "v_head_dim": 16,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "qk_head_dim": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Value of every size in a config that has it."""


def tiny(model_type: str, **settings: Any) -> PreTrainedModel:
    """Return a seeded model of a causal type in float32, with weights large enough for positions to matter.

    Args:
        model_type: a member of `TYPES`.
        settings: further values of the config.

    Raises:
        Exception: whatever the type raises if it cannot be built.
    """
    config = tiny_config(model_type, **settings)
    torch.manual_seed(0)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"a model of {size:,} parameters is not tiny")
    return with_random_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def with_random_weights(model: Any, std: float = 0.15) -> Any:
    """Return a model after giving it seeded weights that are large enough for positions to matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or not (parameter.any() or name.endswith("bias")):
                parameter.normal_(std=std)
    return model


def tiny_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """Return a config of a type with small sizes, also in the configs that it holds."""
    chosen = {**EXTRA.get(model_type, {}), **settings}
    return CONFIG_MAPPING[model_type](**_small(CONFIG_MAPPING[model_type], chosen))


def _small(kind: type[PreTrainedConfig], chosen: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a small config of a class.

    Args:
        kind: the class of the config.
        chosen: values that take precedence; a dict for a config inside the config.
    """
    full, found = kind(), {}
    inner = {name: type(value) for name, value in vars(full).items() if isinstance(value, PreTrainedConfig)}
    for name, value in full.to_dict().items():
        if name in chosen or name in inner:
            continue
        if isinstance(value, int) and not isinstance(value, bool) and name in SIZES:
            found[name] = SIZES[name]
        elif name == "is_decoder" and value is False and not full.is_encoder_decoder:
            found[name] = True
    layers = chosen.get("num_hidden_layers", found.get("num_hidden_layers"))
    kinds = getattr(full, "layer_types", None)
    stored = kind.attribute_map.get("layer_types", "layer_types")
    settable = not isinstance(getattr(kind, stored, None), property)
    if kinds and layers and settable and "layer_types" not in chosen:
        found["layer_types"] = _layer_types(list(kinds), layers)
    for name, each in inner.items():
        found[name] = _small(each, {**EXTRA.get(each.model_type, {}), **chosen.get(name, {})})
    return found | {name: value for name, value in chosen.items() if name not in inner}


def _layer_types(full: list[str], count: int) -> list[str]:
    """Return `count` layer types with each kind of the full model among them, the last one of another kind."""
    kinds = list(dict.fromkeys(full))
    return ([kinds[0]] * (count - len(kinds)) + kinds) if len(kinds) <= count else kinds[:count]


LATENT = {"num_key_value_heads": 4, "head_dim": 8, "v_head_dim": 16}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8, "mamba_d_ssm": 128,
}  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
         "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), LATENT,
    ),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron"), HEADS),
    "deepseek_v2": LATENT | {"topk_method": "greedy", "n_routed_experts": 4, "num_experts_per_tok": 2},
    "bailing_hybrid": LATENT | {
        "linear_head_dim": 16, "linear_num_heads": 4, "num_expert_group": 1, "num_experts_per_token": 2,
        "layer_group_size": 2,
    },
    "kimi_linear": LATENT | {
        "linear_head_dim": 16, "linear_num_heads": 4, "num_expert_group": 1, "num_experts_per_token": 2,
    },
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": MAMBA,
    "granitemoehybrid": MAMBA | {
        "layer_types": ["mamba", "attention"] * 2, "num_key_value_heads": 2, "position_embedding_type": "rope",
    },
    "zamba2": {
        "hybrid_layer_ids": [1, 3], "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_headdim": 16,
        "n_mamba_heads": 8, "mamba_d_state": 16, "chunk_size": 8, "attention_hidden_size": 128,
        "attention_head_dim": 32, "adapter_rank": 8, "use_mem_rope": True, "num_key_value_heads": 4,
    },
    "zamba": {
        "num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 128,
        "attention_head_dim": 32, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
        "num_key_value_heads": 4,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {
        "ffn_hidden_size": 96, "moe_num_experts": 4, "hidden_size": 64, "moe_top_k": 2}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "gemma3n_text": {
        "num_hidden_layers": 5, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
                        "full_attention"],
        "intermediate_size": 96, "activation_sparsity_pattern": [0.0] * 5,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "qwen3_5_text": {"linear_num_value_heads": 4, "linear_num_key_heads": 2},
    "qwen4_exp_text": {
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 100, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 2,
        "split_ngram_parts": 2,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 4, "block_types": ["recurrent", "attention"], "attention_window_size": 32,
    },
    "reformer": {
        "is_decoder": True, "attn_layers": ["local"] * 4, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32],
        "attention_head_size": 16, "local_attn_chunk_length": 8,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "cohere_compass_text": HEADS | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "dots3_note_text": LATENT | {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32,
        "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "swa_qk_rope_head_dim": 8,
        "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64, "shared_experts_intermediate_size": 32,
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "ministral3": HEADS | {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "max_position_embeddings": WINDOW, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    },
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "xlm": {"emb_dim": 64},
    "xlstm": {"embedding_dim": 64, "num_blocks": 4, "chunk_size": 8, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Values that a type needs beside the sizes, since its sizes depend on each other."""
