"""Heads whose bias falls so fast that far keys carry no weight need not look at them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import cpu
from .toeplitz import Toeplitz

LONG = 2048
"""Below this many tokens looking everywhere costs no more."""
NEGLIGIBLE = 25 * math.log(2)
"""All the weight left out of a row together stays below half a rounding step of float32, 2^-25."""


def reaches(query: Tensor, key: Tensor, scaling: float, slopes: Tensor) -> list[int]:
    """For each query head, how many tokens back a key can still carry weight under a bias of -slope x distance.

    Scores lie within +-b, b = max |q| max |k| scaling, and a token sees itself. So the keys beyond distance w weigh
    together at most e^(2b) e^(-slope w) / slope of it, which solves for w.
    """
    group = query.shape[1] // key.shape[1]
    longest_query = query.detach().float().norm(dim=-1).amax((0, 2))
    longest_key = key.detach().float().norm(dim=-1).amax((0, 2)).repeat_interleave(group)
    bound = longest_query * longest_key * scaling
    slopes = slopes.to(bound.device)
    return ((2 * bound + NEGLIGIBLE - slopes.log()) / slopes).ceil().clamp(max=2**30).long().tolist()


def attention_by_distance(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float, reach: list[int] | None = None
) -> Tensor:
    """Causal attention with a bias by distance, `[batch, query, heads, head]`; the queries are the last of the keys.

    `table` is `[heads, keys]`, float32. With `reach`, head h looks `reach[h]` tokens back or a little farther. Heads of
    equal reach share their kernel calls; those that reach over half the sequence look everywhere.
    """
    total, group = key.shape[2], query.shape[1] // key.shape[1]
    bands: dict[int, list[int]] = {}
    for head, far in enumerate(reach or []):
        width = cpu.CHUNK * max(1, math.ceil(far / cpu.CHUNK))
        bands.setdefault(width if 2 * width <= total else total, []).append(head)
    if set(bands) <= {total}:
        return _apply(query, key, value, table, scaling, total)
    outputs, order = [], []
    for width, heads in bands.items():
        shared = [head // group for head in heads]
        outputs.append(_apply(query[:, heads], key[:, shared], value[:, shared], table[heads], scaling, width))
        order += heads
    back = torch.tensor(order, device=query.device).argsort()
    return torch.cat(outputs, 2)[:, :, back]


def _apply(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float, width: int) -> Tensor:
    output = Toeplitz.apply(query, key, value, table, scaling, width)
    assert isinstance(output, Tensor)
    return output.transpose(1, 2)
