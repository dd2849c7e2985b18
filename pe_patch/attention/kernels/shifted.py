"""Shifted sparse attention (S2-Attn): attention within groups of tokens, shifted by half a group in half the heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""A function that computes attention, `[batch, length, heads, head]`, from query, key and value
`[batch, heads, length, head]` and a mask `[batch | 1, 1, length, length]`, or None for causal attention."""


def shifted(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, groups: int
) -> Tensor:
    """Compute attention within groups of tokens, which begin half a group later in the second half of the heads.

    The shift does not wrap around, since the first tokens would then share a group with the last ones. The two ends
    are groups of half the size, as in the authors' code for variable lengths.

    Args:
        attention: computes attention within one group.
        query: `[batch, heads, length, head]`.
        key: `[batch, key_heads, length, head]`.
        value: `[batch, key_heads, length, head]`.
        mask: `[batch | 1, 1, length, length]`; None for causal attention.
        groups: number of groups, which divides the length.

    Returns:
        The output `[batch, length, heads, head]`.

    Source: Chen et al. 2023, LongLoRA, arXiv 2309.12307, section 3.2.
    """
    length, heads, size = query.shape[2], query.shape[1], query.shape[2] // groups
    queries_per_key, half = heads // key.shape[1], heads // 2
    assert half % queries_per_key == 0  # no key head may serve both halves
    first, last = size // 2, length - size // 2
    halves = [
        (0, half, [(0, length, size)]),
        (half, heads, [(0, first, size // 2), (first, last, size), (last, length, size // 2)]),
    ]
    outputs = []
    for start, stop, spans in halves:
        keys = slice(start // queries_per_key, stop // queries_per_key)
        tensors = query[:, start:stop], key[:, keys], value[:, keys]
        outputs.append(torch.cat([_within(attention, *tensors, mask, *span) for span in spans], 1))
    return torch.cat(outputs, 2)


def _within(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    start: int,
    stop: int,
    size: int,
) -> Tensor:
    """Compute attention of the tokens from `start` to `stop` within groups of `size` tokens."""
    batch, count = query.shape[0], (stop - start) // size

    def grouped(tensor: Tensor) -> Tensor:
        """Move the groups into the batch dimension."""
        return tensor[:, :, start:stop].unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)

    if mask is not None:
        blocks = mask[:, :, start:stop, start:stop].unflatten(3, (count, size)).unflatten(2, (count, size))
        mask = blocks.diagonal(0, 2, 4).movedim(-1, 1).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    output = attention(grouped(query), grouped(key), grouped(value), mask)
    return output.unflatten(0, (batch, count)).flatten(1, 2)
