"""How many sequences fit in memory at once, before any of them is tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from .. import compat
from ..errors import PePatchError

USABLE = 0.8
"""Share of the free memory that is planned with; the rest is for what the estimate leaves out."""
TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 131072}
"""Tokens in a forward beyond which a larger batch makes nothing faster."""


@dataclass(frozen=True)
class CacheSize:
    """What a token leaves in a model's cache, all layers together."""

    numbers: int
    bytes: int
    layers: int

    @property
    def numbers_per_layer(self) -> float:
        return self.numbers / self.layers


def cache_size(model: Any) -> CacheSize:
    """Read off the cache that the model itself fills: what 16 tokens leave there beyond what 8 do.

    Raises:
        PePatchError: it fills none.
    """
    short, long = _cached(model, 8), _cached(model, 16)
    if not long:
        raise PePatchError(f"{type(model).__name__} returned no cache whose layers could be counted.")
    grown = [(after.numel() - before.numel(), after) for before, after in zip(short, long, strict=True)]
    return CacheSize(
        numbers=sum(count for count, _ in grown) // 8,
        bytes=sum(count * tensor.element_size() for count, tensor in grown) // 8,
        layers=len(long) // 2,
    )


def keeps_cache(model: Any) -> bool:
    """Whether the model fills a cache that what comes later is read against."""
    return bool(_cached(model, 8))


@torch.inference_mode()
def _cached(model: Any, length: int) -> list[torch.Tensor]:
    """What a pass over some tokens leaves in each layer's keys and values."""
    ids = torch.ones(1, length, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    layers = getattr(compat.cache_of(model(input_ids=ids, use_cache=True)), "layers", None) or ()
    found = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return [one for one in found if isinstance(one, torch.Tensor)]


def sequence_bytes(model: Any, length: int, cache_bytes: int, logits: int) -> int:
    """About what a forward over one sequence takes beyond the weights.

    The cache, the widest layer's activations (residual stream, projections, MLP), `logits` rows over the vocabulary in
    float32 and, where attention is eager, two score matrices of all heads.
    """
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", 1)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    item = next(model.parameters()).element_size()
    total = length * (cache_bytes + item * (8 * hidden + 3 * inner)) + 8 * logits * config.vocab_size
    if "eager" in str(getattr(config, "_attn_implementation", "")):
        total += 8 * getattr(config, "num_attention_heads", 1) * length * length
    return total


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor could take on the device."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return psutil.virtual_memory().available


def batch_size(model: Any, device: torch.device, length: int, *, cache_bytes: int = 0, logits: int = 1) -> int:
    """How many sequences of `length` tokens to take at once.

    Raises:
        PePatchError: one alone does not fit in the memory that is free.
    """
    needed, free = sequence_bytes(model, length, cache_bytes, logits), free_bytes(device)
    fitting = int(USABLE * free) // max(1, needed)
    if fitting < 1:
        raise PePatchError(
            f"A sequence of {length} tokens takes about {needed / 2**30:.1f} GiB beside the weights, and "
            f"{free / 2**30:.1f} GiB are free on {device}. Take a shorter length, a smaller dtype or a scheme with a "
            "smaller cache; batch_size=1 tries it all the same."
        )
    return max(1, min(fitting, TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"]) // length))
