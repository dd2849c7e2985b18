"""Export a converted model as DeepSeek's class, for tools that load DeepSeek-V3."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from ...errors import UnsupportedError
from ...patching.patch import Patch
from ...patching.record import RECORD_KEY

FAMILIES = ("llama", "mistral", "qwen2")
"""Families whose layers match DeepSeek's dense layers apart from the attention; `_check` looks for differences."""
COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
DENSE = {
    "n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
"""Expert settings. No layer has experts, but the config needs numbers."""


def deepseek_writer(model: Any, patch: Patch) -> Callable[[Path], None]:
    """Return a function that writes a converted model as `DeepseekV3ForCausalLM`.

    Raises:
        UnsupportedError: DeepSeek's class cannot express the model.
    """
    _check(patch)
    config = _config(patch)
    with torch.device("meta"):
        empty: Any = DeepseekV3ForCausalLM(config)
    _check_rotation(patch, config)
    weights = _weights(model, patch, config, empty.model.layers[0].self_attn.scaling)
    expected = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    actual = {name: tensor.shape for name, tensor in weights.items()}
    if actual != expected:
        unmatched = sorted(set(actual.items()) ^ set(expected.items()))[0][0]
        _refuse(patch, f"its weight {unmatched!r} does not exist there")

    def write(folder: Path) -> None:
        empty.load_state_dict(weights, assign=True)
        empty.generation_config = copy.deepcopy(model.generation_config)
        empty.to(model.dtype).save_pretrained(folder)

    return write


def _refuse(patch: Patch, why: str) -> None:
    raise UnsupportedError(
        f"{type(patch.model).__name__} with {patch.scheme.name!r} cannot be exported as DeepseekV3ForCausalLM: {why}. "
        "save_pretrained keeps the patch for pe_patch.load_patched; nothing was written."
    )


def _check(patch: Patch) -> None:
    """Raise unless DeepSeek's class has the same layers."""
    scheme: Any = patch.scheme
    config = patch.base.config
    if scheme.name != "mla" or not scheme.converting:
        _refuse(
            patch, "it has no converted latents; call patch_model(model, 'mla', kv_rank=..., latent_norm=True) first"
        )
    reasons = (
        (config.model_type not in FAMILIES, f"its family is {config.model_type}; supported are {', '.join(FAMILIES)}"),
        (patch.model is patch.base, "it has no language-model head"),
        (len(patch.layers) < patch.shape.num_layers, "only some of its layers are converted"),
        (scheme.method == "mha2mla", "'mha2mla' keeps a rotary key for each head, but DeepSeek shares one"),
        (not scheme.latent_norm, "DeepSeek's class always normalises the latent: convert with latent_norm=True"),
        (getattr(config, "sliding_window", None) and _has_sliding_window(config), "it has a sliding window"),
        (getattr(config, "mlp_bias", False), "its feed-forward layers have biases"),
    )
    for applies, why in reasons:
        if applies:
            _refuse(patch, why)
    attentions: dict[int, Any] = dict(patch.adapter.attentions(patch.base))
    for attention in attentions.values():
        latent = attention.mla
        if latent.features is not None:
            _refuse(patch, "it normalises the query and key of each head")
        linear = (latent.q_proj, latent.kv_a_proj_with_mqa, attention.o_proj)
        if latent.value_bias is not None or any(layer.bias is not None for layer in linear):
            _refuse(patch, "its projections have biases, which DeepSeek's query projection lacks")
        if any(type(layer) is not torch.nn.Linear for layer in (*linear, latent.v_b_proj)):
            _refuse(patch, "its projections are wrapped (PEFT): merge_and_unload() first")


def _has_sliding_window(config: Any) -> bool:
    layer_types = getattr(config, "layer_types", None)
    return layer_types is None or "sliding_attention" in layer_types


def _config(patch: Patch) -> DeepseekV3Config:
    """Return DeepSeek's config of the model."""
    first: Any = patch.adapter.attentions(patch.base)[0]
    scheme: Any = patch.scheme
    config, sizes = patch.base.config, first.mla.sizes
    inner = scheme.inner
    settings: dict[str, Any] = {name: getattr(config, name) for name in COPIED} | DENSE
    rotation = getattr(patch.model.config, RECORD_KEY)["native"]["rope_parameters"] if inner is None else inner.native()
    if inner is not None and rotation is None:
        _refuse(patch, f"its rotation is {inner.name!r}, which Transformers' config cannot express")
    return DeepseekV3Config(
        **settings, num_key_value_heads=sizes.heads,
        first_k_dense_replace=config.num_hidden_layers, moe_intermediate_size=config.intermediate_size,
        kv_lora_rank=sizes.rank, q_lora_rank=None, qk_nope_head_dim=sizes.nope, qk_rope_head_dim=sizes.rope,
        v_head_dim=sizes.head_dim, attention_bias=False, attention_dropout=config.attention_dropout,
        rope_interleave=True, rope_parameters=rotation, dtype=patch.model.dtype,
    )  # fmt: skip


def _check_rotation(patch: Patch, config: DeepseekV3Config) -> None:
    """Raise unless DeepSeek's frequencies, which follow from its config, equal the model's."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    rotary: Any = patch.adapter.rotary_module(patch.base)
    built = DeepseekV3RotaryEmbedding(config)
    for attention in patch.adapter.attentions(patch.base).values():
        latent: Any = attention.mla
        frequencies = rotary.inv_freq.cpu()[latent.frequency[0].cpu()]
        expected = built.inv_freq.cpu().to(frequencies.dtype)  # a cast of the whole model may have rounded ours
        same = frequencies.shape == expected.shape and torch.allclose(
            frequencies.float(), expected.float(), rtol=1e-5, atol=0
        )
        if built.attention_scaling != 1:
            _refuse(patch, "its config's scaling multiplies cos and sin, but DeepSeek's multiplies the whole head")
        if not same:
            _refuse(
                patch,
                f"its frequencies differ from those of DeepSeek at rotary width {latent.rope}. rope_dim must divide "
                "the trained rotary width, and equal it under YaRN, whose ramp depends on the width",
            )


def _weights(model: Any, patch: Patch, config: DeepseekV3Config, scaling: float) -> dict[str, Tensor]:
    """Return all weights by DeepSeek's names. The class fixes its softmax scale, so the queries absorb the
    difference."""
    prefix = f"{patch.path}." if patch.path else ""
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".mla." not in name and not name.startswith(f"{prefix}position_schemes.")
    }
    rope, nope = config.qk_rope_head_dim, config.qk_nope_head_dim
    pairs = torch.arange(rope, device=model.device).view(2, -1).T.flatten()  # from halves to neighbours
    attentions: dict[int, Any] = dict(patch.adapter.attentions(patch.base))
    for index, attention in attentions.items():
        latent = attention.mla
        layer = f"{prefix}layers.{index}.self_attn."
        query = latent.q_proj.weight.unflatten(0, (latent.sizes.heads, -1))
        query = torch.cat((query[:, :nope], query[:, nope + pairs]), 1)
        factor = attention.scaling * patch.scheme.softmax_rescale / scaling
        down = latent.kv_a_proj_with_mqa.weight
        key, value = (heads.repeat_interleave(latent.groups, 0) for heads in latent.up(latent.v_b_proj.weight))
        weights |= {
            layer + "q_proj.weight": (query.flatten(0, 1).double() * factor).to(query.dtype),
            layer + "kv_a_proj_with_mqa.weight": torch.cat((down[: latent.rank], down[latent.rank + pairs])),
            layer + "kv_a_layernorm.weight": latent.kv_a_layernorm.weight,
            layer + "kv_b_proj.weight": torch.cat((key, value), 1).flatten(0, 1),
        }
    return {name: tensor.detach() for name, tensor in weights.items()}
