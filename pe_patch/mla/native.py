"""Models with native latent attention (DeepSeek-V2, DeepSeek-V3 and relatives)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .folding import EffectiveWeightCache


class NativeHeads(nn.Module):
    """The `LatentHeads` of a layer with native latent attention, a view without parameters.

    The layer has DeepSeek's names: `kv_b_proj` projects `kv_lora_rank` latent dimensions to `qk_nope_head_dim` key and
    `v_head_dim` value dimensions for each head, and `expand_kv` computes keys and values from the cached tensors.
    """

    rope_heads = 1
    split = False

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.__dict__["attention"] = attention  # not a submodule: the layer contains this module
        self.nope, self.rope = attention.qk_nope_head_dim, attention.qk_rope_head_dim
        self.value_dim, self.rank = attention.v_head_dim, attention.kv_lora_rank
        self.weight_cache = EffectiveWeightCache()

    def effective_weights(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        weight, bias = self.weight_cache.weight("key and value", self.__dict__["attention"].kv_b_proj, self.rank, like)
        key, value = weight.view(-1, self.nope + self.value_dim, self.rank).split((self.nope, self.value_dim), 1)
        return key, value, None if bias is None else bias.view(len(value), -1)[:, self.nope :]

    def expand(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.__dict__["attention"]
        return type(attention).expand_kv(attention, latent, shared)

    def clear(self) -> None:
        self.weight_cache.clear()


def keep_latents(attention: nn.Module, inner: Callable[..., Any], latent: Tensor, shared: Tensor) -> Any:
    """Return the cached tensors unchanged, in place of the layer's `expand_kv`."""
    return latent, shared
