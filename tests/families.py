"""A tiny model of every supported family."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pe_patch import ADAPTERS

LANGUAGE_MODELS = sorted(set(ADAPTERS) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Families with a row that `build` builds: not encoders, not those for images."""
WINDOW = 64
VOCABULARY = 97

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": WINDOW, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
UNSCALED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "num_experts_per_tok": 2,
    "n_routed_experts": 4, "moe_intermediate_size": 32,
}  # fmt: skip
HEADS = {"num_key_value_heads": 2}
FOUR = GROUPED | {"num_hidden_layers": 4}
"""For families whose every fourth layer is of another kind; a window shorter than the sequences of the tests."""

SIZES: dict[str, dict[str, Any]] = {
    "bloom": {}, "gpt_neox": {}, "gpt2": {}, "gpt_bigcode": {}, "biogpt": {}, "persimmon": {},
    "gptj": {"rotary_dim": 8}, "codegen": {"rotary_dim": 8}, "mpt": {"max_seq_len": WINDOW},
    "falcon": {}, "gpt_neox_japanese": {}, "xglm": {"ffn_dim": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "minicpm3", "axk1"), LATENT),
    "phi": HEADS, "stablelm": HEADS, "cohere": HEADS, "starcoder2": HEADS,
    "gemma3_text": FOUR | {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "olmo3": FOUR | {"sliding_window": 8}, "cohere2": FOUR | {"sliding_window": 8},
    "exaone4": FOUR | {"sliding_window": 8, "sliding_window_pattern": 4},
    "smollm3": FOUR, "llama4_text": FOUR | EXPERTS | {"intermediate_size_mlp": 128, "attention_chunk_size": 8},
    "apertus": GROUPED | UNSCALED, "gpt_oss": GROUPED | EXPERTS | UNSCALED,
    **{family: GROUPED | EXPERTS for family in
       ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe")},
}  # fmt: skip


def build(
    family: str,
    attention: str | None = None,
    std: float = 0.15,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    """A seeded model of two layers whose weights are large enough for positions to matter."""
    settings = {**COMMON, **SIZES.get(family, GROUPED), **settings}
    config = transformers.CONFIG_MAPPING[family](**settings)
    torch.manual_seed(0)
    chosen = {"attn_implementation": attention} if attention else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    return model
