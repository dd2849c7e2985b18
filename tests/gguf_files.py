"""Write tiny GGUF files as llama.cpp's converter does, from Transformers models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names of the modules of a block."""
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def name_of(parameter: str) -> str:
    module, _, kind = parameter.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{BLOCK[inner]}.{kind}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows in the order of llama.cpp's Llama, which rotates neighbours instead of halves."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    facts: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    *,
    quantise: bool = True,
) -> Path:
    """Write a Llama or Qwen3 model.

    Args:
        path: the file.
        model: the model.
        tokenizer: a byte-level BPE tokenizer.
        facts: more keys of the architecture, such as `rope.scaling.type`; None leaves a key out. `architecture` renames
            the architecture itself.
        tensors: more tensors by name; None leaves one out.
        quantise: store matrices as Q8_0 blocks, else as float32.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    config, facts = model.config, dict(facts or {})
    family = config.model_type
    architecture = facts.pop("architecture", family)
    writer = GGUFWriter(str(path), architecture)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
        **facts,
    }
    for key, value in values.items():
        full = key if key.startswith("split.") else f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    weights = {}
    for name, weight in model.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        weights[name_of(name)] = interleaved(weight.data, heads) if heads and family == "llama" else weight.data
    for name, weight in {**weights, **(tensors or {})}.items():
        if weight is None:
            continue
        array = torch.as_tensor(weight).float().numpy().astype(np.float32)
        if quantise and array.ndim == 2 and array.shape[1] % 32 == 0:  # as blocks hold 32 weights
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
