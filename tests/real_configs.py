"""Positional configs of released models as their cards have them, and what each must mean, written out by hand."""

from __future__ import annotations

from typing import Any

from pe_patch.schemes.config_formats import Specification

# Phi-3's and Phi-4-mini's lists have 48 entries; these are cut to the pairs of a head of 8 of which all rotate.
LONG, SHORT = [1.08, 1.11, 34.83, 64.9], [1.05, 1.05, 1.1, 2.35]

YARN_64K = {
    "model_type": "llama",
    "hidden_size": 4096,
    "max_position_embeddings": 65536,
    "rope_scaling": {
        "factor": 16.0,
        "finetuned": True,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}
PHI3 = {
    "model_type": "phi3",
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "su"},
}
LLAMA31 = {
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}
VICUNA = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "max_sequence_length": 16384,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
}
R1_QWEN3 = {
    "model_type": "qwen3",
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "rope_scaling": {
        "attn_factor": 0.8782488562869419,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_type": "yarn",
    },
}
YARN_MISTRAL = {
    "model_type": "mistral",
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "factor": 16.0,
        "finetuned": True,
        "original_max_position_embeddings": 8192,
        "type": "yarn",
    },
}
GEMMA3_READ = {
    "full_attention": Specification("linear", {"factor": 8.0, "theta": 1000000.0}),
    "sliding_attention": Specification("rope", {"theta": 10000.0}),
}

REAL: dict[str, tuple[dict[str, Any], Any]] = {
    "Qwen2.5-7B-Instruct with YaRN, as its card says": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
        Specification("yarn", {"factor": 4.0, "theta": 1000000.0, "original_max_position_embeddings": 32768}),
    ),
    "Phi-3-mini-128k (v4, su; factor from the two windows)": (
        PHI3,
        Specification(
            "longrope",
            {
                "long_factor": LONG,
                "short_factor": SHORT,
                "factor": 32.0,
                "theta": 10000.0,
                "original_max_position_embeddings": 4096,
            },
        ),
    ),
    "Phi-4-mini (partial rotary and longrope)": (
        {**PHI3, "partial_rotary_factor": 0.75, "rope_scaling": {**PHI3["rope_scaling"], "type": "longrope"}},
        Specification(
            "longrope",
            {
                "long_factor": LONG,
                "short_factor": SHORT,
                "factor": 32.0,
                "theta": 10000.0,
                "original_max_position_embeddings": 4096,
            },
            0.75,
        ),
    ),
    "Llama-3.1-8B (factor 8, windows 16 apart)": (
        LLAMA31,
        Specification(
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "theta": 500000.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ),
    "Llama-3.2-1B (v5)": (
        {
            "model_type": "llama",
            "max_position_embeddings": 131072,
            "rope_parameters": {**LLAMA31["rope_scaling"], "factor": 32.0, "rope_theta": 500000.0},
        },
        Specification(
            "llama3",
            {
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "theta": 500000.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ),
    "Gemma-3 (v5, nested)": (GEMMA3, GEMMA3_READ),
    "Gemma-3 (v5, the nested dict alone)": (GEMMA3["rope_parameters"], GEMMA3_READ),
    "Gemma-3 (v4, a base of its own for the sliding layers)": (
        {
            "model_type": "gemma3_text",
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        GEMMA3_READ,
    ),
    "DeepSeek-V3": (
        DEEPSEEK_V3,
        Specification(
            "yarn",
            {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "theta": 10000,
                "original_max_position_embeddings": 4096,
            },
        ),
    ),
    "gpt-oss-20b": (
        {
            "model_type": "gpt_oss",
            "max_position_embeddings": 131072,
            "initial_context_length": 4096,
            "rope_theta": 150000,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
        },
        Specification(
            "yarn",
            {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "truncate": False,
                "theta": 150000,
                "original_max_position_embeddings": 4096,
            },
        ),
    ),
    "CodeLlama-7b": (
        {"model_type": "llama", "max_position_embeddings": 16384, "rope_scaling": None, "rope_theta": 1000000},
        Specification("rope", {"theta": 1000000}),
    ),
    "Pythia-1b": (
        {"model_type": "gpt_neox", "max_position_embeddings": 2048, "rotary_emb_base": 10000, "rotary_pct": 0.25},
        Specification("rope", {"theta": 10000}, 0.25),
    ),
    "Yarn-Llama-2-7b-64k (v4)": (
        YARN_64K,
        Specification("yarn", {"factor": 16.0, "original_max_position_embeddings": 4096}),
    ),
    "vicuna-7b-v1.5-16k (v4 linear)": (
        VICUNA,
        Specification("linear", {"factor": 4.0}),
    ),
    "Yarn-Mistral-7b-128k (the window before YaRN beside it)": (
        YARN_MISTRAL,
        Specification("yarn", {"factor": 16.0, "theta": 10000.0, "original_max_position_embeddings": 8192}),
    ),
    "Qwen3-8B with YaRN, as its card says": (
        {
            "model_type": "qwen3",
            "max_position_embeddings": 40960,
            "rope_theta": 1000000,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        Specification("yarn", {"factor": 4.0, "theta": 1000000, "original_max_position_embeddings": 32768}),
    ),
    "DeepSeek-R1-0528-Qwen3-8B (attn_factor)": (
        R1_QWEN3,
        Specification(
            "yarn",
            {
                "attention_factor": 1.0,
                "factor": 4.0,
                "theta": 1000000,
                "original_max_position_embeddings": 32768,
            },
        ),
    ),
    "internlm2-chat-7b (v4 dynamic)": (
        {
            "model_type": "internlm2",
            "max_position_embeddings": 32768,
            "rope_theta": 1000000,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        Specification("dynamic_ntk", {"factor": 2.0, "theta": 1000000, "original_max_position_embeddings": 32768}),
    ),
    "Llama-2-7b (no scaling, no theta)": (
        {"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": None},
        Specification("rope"),
    ),
    "Mistral-7B-v0.3": (
        {"model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None},
        Specification("rope", {"theta": 1000000.0}),
    ),
    "Gemma-4's full attention (p-RoPE)": (
        {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        Specification("proportional", {"partial_rotary_factor": 0.25, "theta": 1000000.0}),
    ),
    "Phi-3.5-MoE (longrope with its factor for either list)": (
        {
            "model_type": "phimoe",
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "long_factor": LONG,
                "short_factor": SHORT,
                "long_mscale": 1.243163121016122,
                "short_mscale": 1.243163121016122,
                "original_max_position_embeddings": 4096,
                "type": "longrope",
            },
        },
        Specification(
            "longrope",
            {
                "long_factor": LONG,
                "short_factor": SHORT,
                "attention_factor": 1.243163121016122,
                "factor": 32.0,
                "theta": 10000.0,
                "original_max_position_embeddings": 4096,
            },
        ),
    ),
}
