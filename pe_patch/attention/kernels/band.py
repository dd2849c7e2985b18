"""Causal attention with a bias by distance, in which heads with a steep bias skip keys of negligible weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import cpu
from .toeplitz import Toeplitz

LONG = 2048
"""Minimum number of tokens; skipping keys saves no time in shorter sequences."""
NEGLIGIBLE = 25 * math.log(2)
"""Minus the log of the weight that a row may lose: 2^-25, half a unit of rounding in float32."""


def reaches(query: Tensor, key: Tensor, scaling: float, slopes: Tensor) -> list[int]:
    """Return the distance in tokens at which keys stop carrying weight, for each head with bias -slope x distance.

    Scores lie within +-b, with b = max |q| max |k| scaling, and each token attends to itself. The keys beyond distance
    w therefore have at most e^(2b) e^(-slope w) / slope times the weight of the token itself; this is solved for w.

    Args:
        query: `[batch, heads, query, head]`.
        key: `[batch, key_heads, key, head]`.
        scaling: factor on the dot products.
        slopes: `[heads]`, a lower bound of the slope of each head's bias.
    """
    group = query.shape[1] // key.shape[1]
    max_query_norm = query.detach().float().norm(dim=-1).amax((0, 2))
    max_key_norm = key.detach().float().norm(dim=-1).amax((0, 2)).repeat_interleave(group)
    bound = max_query_norm * max_key_norm * scaling
    slopes = slopes.to(bound.device)
    return ((2 * bound + NEGLIGIBLE - slopes.log()) / slopes).ceil().clamp(max=2**30).long().tolist()


def attention_by_distance(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float, reach: list[int] | None = None
) -> Tensor:
    """Compute causal attention with a bias by distance, `[batch, query, heads, head]`.

    Heads whose reach rounds to the same band share their kernel calls. A head that reaches over half of the sequence
    attends to all of it.

    Args:
        query: `[batch, heads, query, head]`; the queries are the last of the keys.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        table: the bias by distance `[heads, keys]`, float32 or wider.
        scaling: factor on the dot products.
        reach: distance in tokens that each head must cover at least; None for all keys.
    """
    total, group = key.shape[2], query.shape[1] // key.shape[1]
    bands: dict[int, list[int]] = {}
    for head, distance in enumerate(reach or []):
        width = cpu.CHUNK * max(1, math.ceil(distance / cpu.CHUNK))
        bands.setdefault(width if 2 * width <= total else total, []).append(head)
    if set(bands) <= {total}:
        return _apply(query, key, value, table, scaling, total)
    outputs, order = [], []
    for width, heads in bands.items():
        shared = [head // group for head in heads]
        outputs.append(_apply(query[:, heads], key[:, shared], value[:, shared], table[heads], scaling, width))
        order += heads
    inverse = torch.tensor(order, device=query.device).argsort()
    return torch.cat(outputs, 2)[:, :, inverse]


def _apply(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float, width: int) -> Tensor:
    """Call the kernel, and return `[batch, query, heads, head]`."""
    output = Toeplitz.apply(query, key, value, table, scaling, width)
    assert isinstance(output, Tensor)
    return output.transpose(1, 2)
