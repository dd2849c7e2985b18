"""Models that hold latents by themselves (DeepSeek-V2, V3 and their kin)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .folding import Folding


class NativeHeads(nn.Module):
    """What attention over latents needs to know of a layer that was built with them; it has no weights of its own.

    `attention` carries DeepSeek's names: `kv_b_proj` makes for each head `qk_nope_head_dim` numbers of the key and
    `v_head_dim` of the value out of `kv_lora_rank`, and `expand_kv` makes keys and values of what is cached.
    """

    rope_heads = 1
    split = False

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.__dict__["attention"] = attention  # which holds this module in turn
        self.nope, self.rope = attention.qk_nope_head_dim, attention.qk_rope_head_dim
        self.value_dim, self.rank = attention.v_head_dim, attention.kv_lora_rank
        self.folding = Folding()

    def folded(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        weight, bias = self.folding.weight("key and value", self.__dict__["attention"].kv_b_proj, self.rank, like)
        key, value = weight.view(-1, self.nope + self.value_dim, self.rank).split((self.nope, self.value_dim), 1)
        return key, value, None if bias is None else bias.view(len(value), -1)[:, self.nope :]

    def expand(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.__dict__["attention"]
        return type(attention).expand_kv(attention, latent, shared)

    def drop(self) -> None:
        self.folding.drop()


def keep_latents(attention: nn.Module, inner: Callable[..., Any], latent: Tensor, shared: Tensor) -> Any:
    """Stands where a layer expands what is cached, and hands it to the attention function as it is."""
    return latent, shared
