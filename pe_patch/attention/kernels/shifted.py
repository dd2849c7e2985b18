"""Attention within groups of a sequence, in half of the heads shifted by half a group (S2-Attn)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Of query, key, value `[batch, heads, length, head]` and a mask `[batch | 1, 1, length, length]` or, for causal
attention, None; gives `[batch, length, heads, head]`."""


def shifted(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, groups: int
) -> Tensor:
    """`attention` in the first half of the heads within `groups` equal groups, in the second within groups that begin
    half a group later: `[batch, length, heads, head]` (Chen et al. 2023, LongLoRA, arXiv 2309.12307, section 3.2).

    The shift does not wrap around. Rolled over, the first tokens would stand in one group with the last and see them;
    here the two ends are half groups of their own, as in the authors' code for variable lengths.
    """
    length, heads, size = query.shape[2], query.shape[1], query.shape[2] // groups
    times, half = heads // key.shape[1], heads // 2
    assert half % times == 0  # no key head serves both halves
    first, last = size // 2, length - size // 2
    parts = [
        (0, half, [(0, length, size)]),
        (half, heads, [(0, first, size // 2), (first, last, size), (last, length, size // 2)]),
    ]
    outputs = []
    for start, stop, cuts in parts:
        keys = slice(start // times, stop // times)
        own = query[:, start:stop], key[:, keys], value[:, keys]
        outputs.append(torch.cat([_within(attention, *own, mask, *cut) for cut in cuts], 1))
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
    """Attention of the tokens from `start` to `stop`, every `size` of them by themselves."""
    batch, count = query.shape[0], (stop - start) // size

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:, :, start:stop].unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)

    if mask is not None:
        blocks = mask[:, :, start:stop, start:stop].unflatten(3, (count, size)).unflatten(2, (count, size))
        mask = blocks.diagonal(0, 2, 4).movedim(-1, 1).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    output = attention(cut(query), cut(key), cut(value), mask)
    return output.unflatten(0, (batch, count)).flatten(1, 2)
