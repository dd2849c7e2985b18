"""Sizes of the latent and the rotary key of a conversion."""

from __future__ import annotations

from ..errors import OptionError

FRESH = "init"
"""The method that starts from random weights instead of a conversion."""


def rope_heads(method: str, kv_heads: int) -> int:
    """Return the number of rotary keys cached for each token: one for all heads, or one for each key-value head."""
    return kv_heads if method == "mha2mla" else 1


def nope_dim(method: str, kv_heads: int, head_dim: int, rotary_dim: int, rope_dim: int) -> int:
    """Return the number of dimensions of a head's query and key that do not rotate after a conversion.

    With a shared rotary key this is `head_dim`, or less if fewer dimensions than that lost their rotation.
    """
    if method == FRESH:
        return head_dim
    if method == "mha2mla":
        return head_dim - rope_dim
    lost_rotation = kv_heads * rotary_dim - rope_dim
    return head_dim if lost_rotation >= rotary_dim else lost_rotation + head_dim - rotary_dim


def fit_ratio(
    kv_heads: int, head_dim: int, rotary_dim: int, method: str, latents: int, ratio: float, rope_dim: int | None
) -> tuple[int, int]:
    """Return the rank and the rotary dimensions for a cache of at most `ratio` times the size of keys and values.

    Args:
        kv_heads: number of key-value heads.
        head_dim: width of a head.
        rotary_dim: trained rotary dimensions of a head.
        method: method of the conversion.
        latents: number of latents for each token, 1 or 2.
        ratio: size of the new cache relative to the present one, in (0, 1).
        rope_dim: rotary dimensions; None for the trained width divided by the smallest power of two with which the
            rotary key takes at most half of the cache and at most 64 dimensions.

    Raises:
        OptionError: the rotary key leaves no room for a latent.
    """
    budget = int(2 * kv_heads * head_dim * ratio + 1e-9)
    keys = rope_heads(method, kv_heads)
    width = rope_dim
    if width is None:
        widths = [rotary_dim // 2**k for k in range(rotary_dim.bit_length()) if rotary_dim % 2 ** (k + 1) == 0]
        fitting = [each for each in widths if each <= 64 and 2 * keys * each <= budget]
        width = max(fitting, default=2)
    rank = (budget - keys * width) // latents
    if rank < 1:
        raise OptionError(
            f"'mla' got cache_ratio={ratio:g}, which leaves {budget} values for each token and layer, and the rotary "
            f"key takes {keys * width}. Use a larger cache_ratio or a smaller rope_dim."
        )
    return rank, width
