"""How a small cache is divided between the latent and the rotary key."""

from __future__ import annotations

from ..errors import OptionError

FRESH = "init"
"""The method that converts nothing."""


def rope_heads(method: str, kv_heads: int) -> int:
    """How many rotary keys are cached for a token: one that all heads share, or one of each key-value head."""
    return kv_heads if method == "mha2mla" else 1


def nope_dim(method: str, kv_heads: int, head_dim: int, rotary_dim: int, rope_dim: int) -> int:
    """Numbers of a head's query and key that do not rotate after a conversion: those of the head, or where fewer have
    lost their rotation, these."""
    if method == FRESH:
        return head_dim
    if method == "mha2mla":
        return head_dim - rope_dim
    stopped = kv_heads * rotary_dim - rope_dim
    return head_dim if stopped >= rotary_dim else stopped + head_dim - rotary_dim


def fit_ratio(
    kv_heads: int, head_dim: int, rotary_dim: int, method: str, latents: int, ratio: float, rope_dim: int | None
) -> tuple[int, int]:
    """Rank and rotary dimensions for a cache that holds at most `ratio` of what keys and values take.

    Where nothing is said, the rotary key gets the largest power-of-two share of the trained rotary width that leaves
    the latent at least as much as it takes itself, up to 64.

    Args:
        latents: how many latents a token leaves, one or two.
    """
    budget = int(2 * kv_heads * head_dim * ratio + 1e-9)
    keys = rope_heads(method, kv_heads)
    width = rope_dim
    if width is None:
        widths = [rotary_dim // 2**k for k in range(rotary_dim.bit_length()) if rotary_dim % 2 ** (k + 1) == 0]
        fitting = [one for one in widths if one <= 64 and 2 * keys * one <= budget]
        width = max(fitting, default=2)
    rank = (budget - keys * width) // latents
    if rank < 1:
        raise OptionError(
            f"'mla' got cache_ratio={ratio:g}, which leaves {budget} numbers for each token and layer, and the rotary "
            f"key takes {keys * width} of them: give a larger ratio or a smaller rope_dim."
        )
    return rank, width
