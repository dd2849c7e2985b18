"""Describe every supported model family: one `Adapter` for each `model_type`, each with a passing adapter test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from .. import compat
from ..core.registry import Registry
from ..errors import OptionValueError, quoted
from .adapter import Adapter
from .bloom import bloom_attention, build_alibi_tensor, carry_positions, keep_positions
from .own_attention import (
    carry_to_attention,
    carry_with_mask,
    falcon_attention,
    falcon_refuses,
    mpt_attention,
    positions_as_bias,
    score,
    still_rotation,
    xglm_attention,
)
from .projections import Fused, ProjectionNames, Separate
from .vision import VisionEncoder


def exaone4_rotates(attention: Any) -> bool:
    """Return whether an attention of EXAONE 4 rotates: in sliding layers, or in all layers if none slides.

    This is a named function, since a lambda cannot be pickled.
    """
    return attention.sliding_window is None or attention.is_sliding


PLAIN = {
    "llama": "Llama 1 to 3, Code Llama, Vicuna, TinyLlama, DeepSeek-Coder",
    "mistral": "Mistral 7B, Zephyr",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "qwen2": "Qwen1.5, Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3_moe": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "olmoe": "OLMoE",
    "starcoder2": "StarCoder2",
    "arcee": "AFM-4.5B",
    "bitnet": "BitNet b1.58",
    "seed_oss": "Seed-OSS",
    "ministral": "Ministral",
    "persimmon": "Persimmon 8B",
    "apertus": "Apertus",
}

PROJECTIONS: dict[str, ProjectionNames] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma", "arcee", "ministral"), Separate()),
    **dict.fromkeys(("qwen3", "qwen3_moe", "apertus"), Separate(norms=("q_norm", "k_norm"))),
    **dict.fromkeys(("starcoder2", "seed_oss"), Separate(residual_dropout="residual_dropout")),
    "phi": Separate(output="dense", norms=("q_layernorm", "k_layernorm")),
}
"""Projection names of the families in `PLAIN` that can be converted to latents. Other families give theirs in their
row.

Their attention only projects, normalises each head, rotates, attends and projects.
"""

LATENT = {
    "deepseek_v3": "DeepSeek-V3, DeepSeek-R1",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "youtu": "Youtu-LLM 2B",
    "minicpm3": "MiniCPM3 4B",
    "axk1": "A.X K1",
}
"""Families whose attention caches latents. They multiply YaRN's `mscale_all_dim` factor into the softmax scale."""


def with_own_attention(adapter: Adapter, **replacing: Any) -> Adapter:
    """Return the adapter of a family whose own attention code only gives way to schemes that act at the scores.

    Args:
        adapter: the names of the family's modules.
        replacing: `forward` or `score_method` of the adapter for those schemes.
    """
    at_scores = replace(
        adapter, eager_only=True, pass_positions=carry_to_attention, wrap_base_forward=keep_positions, **replacing
    )
    return replace(adapter, forwards_kwargs=False, calls_interface=False, at_scores=at_scores)


SINES_AND_COSINES = (
    Adapter(
        layers="h", attention="attn", rotary=None, interleaved_pairs=True, eager_only=True,
        score_method=(compat.SCORE_METHOD, score), still_rotation=still_rotation, pass_positions=carry_to_attention,
        wrap_base_forward=keep_positions,
    )
    if compat.OWN_SCORES
    else Adapter(layers="h", attention="attn", layout="sin_first", interleaved_pairs=True)
)  # fmt: skip
"""GPT-J and CodeGen. Before Transformers 5.24 they computed scores in their own code, and each attention had a table of
sines and cosines."""

ADAPTERS: Registry[Adapter] = Registry("pe_patch.adapters")
"""The adapter of every supported model family, by its `model_type`."""

FAMILIES: Mapping[str, Adapter] = MappingProxyType(
    {family: Adapter(projections=PROJECTIONS.get(family), summary=summary) for family, summary in PLAIN.items()}
    | {family: Adapter(scaling_includes_mscale=True, summary=summary) for family, summary in LATENT.items()}
    | {
        "deepseek_v2": Adapter(
            layout="complex", interleaved_pairs=True, scaling_includes_mscale=True,
            summary="DeepSeek-V2, DeepSeek-V2-Lite",
        ),
        "gpt_neox": Adapter(
            attention="attention", projections=Fused(module="query_key_value", per_head=True, output="dense"),
            summary="Pythia, GPT-NeoX-20B, Dolly",
        ),
        "bloom": Adapter(
            layers="h", attention="self_attention", rotary=None, alibi=True, forward=bloom_attention,
            pass_positions=carry_positions, wrap_base_forward=keep_positions,
            replace_bias_builder=("build_alibi_tensor", build_alibi_tensor), summary="BLOOM, BLOOMZ",
        ),
        "phi3": Adapter(drops_cache_at_window=True, projections=Fused(), summary="Phi-3, Phi-4"),
        "phimoe": Adapter(drops_cache_at_window=True, projections=Separate(), summary="Phi-3.5-MoE"),
        "cohere": Adapter(
            layout="interleaved", interleaved_pairs=True, full_precision_product=True, summary="Command R"
        ),
        "cohere2": Adapter(
            layout="interleaved", interleaved_pairs=True, full_precision_product=True, rotates="sliding_window",
            summary="Command R7B, Command A",
        ),
        "exaone4": Adapter(rotates=exaone4_rotates, summary="EXAONE 4.0"),
        "olmo": Adapter(full_precision=True, summary="OLMo 1"),
        "olmo2": Adapter(full_precision=True, summary="OLMo 2"),
        "olmo3": Adapter(full_precision=True, rotary_per_layer_type=True, summary="OLMo 3"),
        "gemma3_text": Adapter(rotary_per_layer_type=True, summary="Gemma 3"),
        "llama4_text": Adapter(
            layout="complex", interleaved_pairs=True, rotates="use_rope", norm_after_rotation="qk_norm",
            summary="Llama 4 Scout, Maverick",
        ),
        "granite": Adapter(
            embedding_multiplier="embedding_multiplier", projections=Separate(), summary="Granite 3"
        ),
        "granitemoe": Adapter(
            embedding_multiplier="embedding_multiplier", projections=Separate(), summary="Granite 3 MoE"
        ),
        "helium": Adapter(interleaved_pairs=True, projections=Separate(), summary="Helium 1"),
        "stablelm": Adapter(forwards_kwargs=False, summary="StableLM 2"),
        "nemotron": Adapter(forwards_kwargs=False, summary="Nemotron-4, Minitron"),
        "hunyuan_v1_dense": Adapter(weighted_norm_after_rotation=True, summary="Hunyuan dense"),
        "hunyuan_v1_moe": Adapter(weighted_norm_after_rotation=True, summary="Hunyuan-A13B"),
        "nanochat": Adapter(early_rotation="rotates by negative angles", summary="nanochat"),
        "glm": Adapter(interleaved_pairs=True, projections=Separate(), summary="GLM-4 9B"),
        "glm4": Adapter(interleaved_pairs=True, projections=Separate(), summary="GLM-4-0414"),
        "gpt_oss": Adapter(layout="single", summary="gpt-oss-20b, gpt-oss-120b"),
        "smollm3": Adapter(rotates="use_rope", summary="SmolLM3"),
        "gpt2": Adapter(layers="h", attention="attn", rotary=None, learned="wpe", summary="GPT-2, DistilGPT-2"),
        "gpt_bigcode": Adapter(layers="h", attention="attn", rotary=None, learned="wpe", summary="StarCoder 1"),
        "opt": Adapter(rotary=None, learned="embed_positions", learned_offset=2, summary="OPT, Galactica"),
        "biogpt": Adapter(rotary=None, learned="embed_positions", learned_offset=2, summary="BioGPT"),
        "gptj": replace(SINES_AND_COSINES, summary="GPT-J 6B"),
        # It rotates in float32.
        "codegen": replace(SINES_AND_COSINES, full_precision=not compat.OWN_SCORES, summary="CodeGen"),
        "gpt_neo": with_own_attention(
            Adapter(layers="h", attention="attn.attention", rotary=None, learned="wpe", summary="GPT-Neo"),
            score_method=(compat.NEO_SCORE_METHOD, score),
        ),
        "gpt_neox_japanese": with_own_attention(
            Adapter(attention="attention", summary="GPT NeoX Japanese 2.7B"),
            score_method=(compat.NEO_SCORE_METHOD, score),
        ),
        "xglm": with_own_attention(
            Adapter(rotary=None, learned="embed_positions", learned_offset=2, summary="XGLM"), forward=xglm_attention
        ),
        "falcon": with_own_attention(
            Adapter(layers="h", attention="self_attention", refuses=falcon_refuses, summary="Falcon 7B, 40B, 180B"),
            forward=falcon_attention,
        ),
        "mpnet": Adapter(
            layers="encoder.layer", attention="attention.attn", rotary=None, learned="embeddings.position_embeddings",
            learned_offset=2, first_position_id=2, forwards_kwargs=False, calls_interface=False, own_bias=True,
            summary="all-mpnet-base-v2 and other encoders of MPNet",
        ),
        "mpt": Adapter(
            layers="blocks", attention="attn", rotary=None, alibi=True, eager_only=True, forward=mpt_attention,
            pass_positions=carry_with_mask, wrap_base_forward=keep_positions,
            replace_bias_builder=("build_mpt_alibi_tensor", positions_as_bias), summary="MPT 7B, 30B",
        ),
        "clip_vision_model": Adapter(
            layers="encoder.layers", rotary=None, vision_encoder=VisionEncoder("position_embedding.weight"),
            summary="CLIP's vision encoder, also LLaVA's",
        ),
        "vit": Adapter(
            attention="attention", rotary=None, vision_encoder=VisionEncoder("position_embeddings"), summary="ViT"
        ),
    }
)  # fmt: skip

for _family, _adapter in FAMILIES.items():
    ADAPTERS.add(_family, _adapter)
ADAPTERS.seal()


def register_adapter(model_type: str, adapter: Adapter) -> Adapter:
    """Register a model family, so that every function that takes a model accepts it.

    The first patch of a model of this family checks the adapter against the model. A package can register a family at
    installation: an entry point of the group `pe_patch.adapters` names a module that calls this function.

    Args:
        model_type: `config.model_type` of the family.
        adapter: the description of the family.

    Returns:
        The adapter.

    Raises:
        OptionValueError: `model_type` is not a string or names a built-in family, or `adapter` is not an `Adapter`.
    """
    if not isinstance(model_type, str) or not model_type:
        raise OptionValueError(f"register_adapter takes config.model_type as a string first, got {quoted(model_type)}.")
    if not isinstance(adapter, Adapter):
        raise OptionValueError(
            f"register_adapter({model_type!r}, ...) takes a pe_patch.Adapter, got {quoted(adapter)}. Example: "
            "Adapter(attention='attention')."
        )
    if ADAPTERS.is_builtin(model_type):
        raise OptionValueError(
            f"pe_patch has an adapter for {model_type!r}; pass yours to patch_model(model, ..., adapter=...)."
        )
    ADAPTERS.add(model_type, adapter)
    return adapter
