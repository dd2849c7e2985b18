"""vLLM's model classes with the positions of a patch: each layer's rotation and attention are replaced after building.

vLLM imports this module only to build a patched checkpoint.
"""

# pyright: reportMissingImports=false
# vLLM runs in a separate environment: it requires other versions than development does.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from ...errors import UnsupportedError
from .positions import LayerPositions, ServedPositions
from .vllm_plugin import SERVED_KEY, check_version

ALIBI_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""vLLM's attention backends that add ALiBi's slopes. Tested: CPU_ATTN."""


class FixedRotary(RotaryEmbedding):
    """vLLM's rotation of the halves of a head, by given frequencies.

    Args:
        native: the rotation that it replaces; gives the head size.
        positions: the frequencies and their factor.
        length: number of positions in the table, in tokens.
    """

    def __init__(self, native: Any, positions: LayerPositions, length: int) -> None:
        inv_freq = torch.tensor(positions.inv_freq, dtype=torch.float32)
        width, dtype = 2 * len(inv_freq), torch.get_default_dtype()
        super().__init__(native.head_size, width, length, native.base, True, dtype, init_cache=False)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * positions.factor
        self.register_buffer("cos_sin_cache", table.to(dtype), persistent=False)


class NoRotation(nn.Module):
    """Return queries and keys as they are, in the place of a rotation."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return query, key


def install(model: Any, vllm_config: Any) -> None:
    """Give the layers of a vLLM model the positions in its config.

    Raises:
        UnsupportedError: the served length, --hf-overrides or the attention backend does not allow them.
    """
    check_version()
    config = vllm_config.model_config.hf_config
    served = ServedPositions.from_dict(getattr(config, SERVED_KEY))
    _check_overrides(config)
    length = vllm_config.model_config.max_model_len
    if served.longest is not None and length > served.longest:
        raise UnsupportedError(
            f"{served.scheme!r} has fixed frequencies only up to {served.longest} tokens, and "
            f"--max-model-len is {length}. Use --max-model-len {served.longest}, or patch with expected_length={length}"
            " and save the model again."
        )
    rotations: dict[tuple[int, int], nn.Module] = {}
    stack = model.model
    for layer in range(stack.start_layer, stack.end_layer):
        if (index := served.by_layer.get(layer)) is None:
            _check_table(layer, stack.layers[layer].self_attn.rotary_emb, length)
            continue
        attention, positions = stack.layers[layer].self_attn, served.distinct[index]
        native = attention.rotary_emb
        key = (index, native.head_size)
        if key not in rotations:
            table = max(length, config.max_position_embeddings)
            rotations[key] = NoRotation() if positions.inv_freq is None else FixedRotary(native, positions, table)
        attention.rotary_emb = rotations[key]
        if positions.slopes is not None or positions.score_scale != 1:
            attention.attn = _with_bias(attention.attn, positions, vllm_config, served.scheme)


def _check_overrides(config: Any) -> None:
    """Raise `UnsupportedError` if --hf-overrides changed the rotary parameters."""
    stored = getattr(config, SERVED_KEY)["rope_parameters"] or {}
    current = config.rope_parameters or {}
    changed = [key for key, value in stored.items() if current.get(key) != value]
    share = "partial_rotary_factor"
    if share not in stored and any(
        each not in (None, 1.0) for each in (current.get(share), getattr(config, share, 1.0))
    ):
        changed.append(share)
    if changed:
        raise UnsupportedError(
            f"--hf-overrides changes rope_parameters ({changed[0]} is {current.get(changed[0])!r}, not "
            f"{stored.get(changed[0])!r}), but a patched checkpoint has the positions of its patch record. Leave "
            "rope_parameters out, or patch the model with other options and save it again."
        )


def _check_table(layer: int, native: Any, length: int) -> None:
    """Raise `UnsupportedError` if a layer that keeps its rotation has a table of cos and sin that is too short."""
    if (table := len(native.cos_sin_cache)) < length:
        raise UnsupportedError(
            f"--max-model-len is {length}, but layer {layer} keeps its family's rotation, whose table has {table} "
            f"positions. Add --hf-overrides '{{\"max_position_embeddings\": {length}}}', or use --max-model-len "
            f"{table}."
        )


def _with_bias(native: Any, positions: LayerPositions, vllm_config: Any, scheme: str) -> nn.Module:
    """Return vLLM's attention of a layer, built again with the slopes of this rank's heads and the softmax scale."""
    backend = native.attn_backend.get_name()
    slopes = positions.slopes
    if slopes is not None:
        if backend not in ALIBI_BACKENDS:
            raise UnsupportedError(
                f"vLLM's attention backend {backend} does not add the slopes of {scheme!r}. Choose one of "
                f"{', '.join(ALIBI_BACKENDS)} with --attention-backend."
            )
        first = get_tensor_model_parallel_rank() * native.num_heads
        slopes = slopes[first : first + native.num_heads]
    del vllm_config.compilation_config.static_forward_context[native.layer_name]  # the new one takes its name
    return type(native)(
        native.num_heads,
        native.head_size,
        native.impl.scale * positions.score_scale,
        num_kv_heads=native.num_kv_heads,
        alibi_slopes=slopes,
        cache_config=vllm_config.cache_config,
        quant_config=native.quant_config,
        logits_soft_cap=getattr(native.impl, "logits_soft_cap", None) or None,
        per_layer_sliding_window=native.sliding_window,
        attn_type=native.attn_type,
        prefix=native.layer_name,
    )


class _Installs:
    """A mixin that installs the positions after vLLM has built the model."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        install(self, vllm_config)


class PePatchLlamaForCausalLM(_Installs, LlamaForCausalLM):
    """vLLM's Llama with the positions of a patch."""


class PePatchMistralForCausalLM(_Installs, MistralForCausalLM):
    """vLLM's Mistral with the positions of a patch."""


class PePatchQwen2ForCausalLM(_Installs, Qwen2ForCausalLM):
    """vLLM's Qwen2 with the positions of a patch."""


class PePatchQwen3ForCausalLM(_Installs, Qwen3ForCausalLM):
    """vLLM's Qwen3 with the positions of a patch."""


class PePatchGemma3ForCausalLM(_Installs, Gemma3ForCausalLM):
    """vLLM's Gemma 3 with the positions of a patch."""
