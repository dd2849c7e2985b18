"""Heads whose bias falls so fast that far keys carry no weight need not look at them."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LONG = 2048
"""Below this many tokens looking everywhere costs no more."""
CHUNK = 256
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


def banded_attention(
    query: Tensor, key: Tensor, value: Tensor, reach: list[int], *, scaling: float, dropout: float
) -> Tensor:
    """Causal attention in which head h looks `reach[h]` tokens back or a little farther, `[batch, query, heads, head]`.

    Heads of equal reach share their kernel calls; those that reach over half the sequence take the plain causal one.
    """
    count, group = query.shape[2], query.shape[1] // key.shape[1]
    bands: dict[int, list[int]] = {}
    for head, far in enumerate(reach):
        width = CHUNK * max(1, math.ceil(far / CHUNK))
        bands.setdefault(width if 2 * width <= count else count, []).append(head)
    outputs, order = [], []
    for width, heads in bands.items():
        own = query[:, heads]
        shared = [head // group for head in heads]
        outputs.append(_band(own, key[:, shared], value[:, shared], width, scaling, dropout))
        order += heads
    back = torch.tensor(order, device=query.device).argsort()
    return torch.cat(outputs, 1)[:, back].transpose(1, 2).contiguous()


def _band(query: Tensor, key: Tensor, value: Tensor, width: int, scaling: float, dropout: float) -> Tensor:
    count = query.shape[2]
    attend = partial(scaled_dot_product_attention, scale=scaling, dropout_p=dropout)
    if width >= count:
        return attend(query, key, value, is_causal=True)
    # The causal mask of any chunk, as a view of one: zero but for a triangle over the chunk's own keys at the end.
    mask = query.new_zeros(CHUNK, width + CHUNK)
    mask[:, width:] = torch.full((CHUNK, CHUNK), -math.inf, device=query.device).triu(1)
    outputs = []
    for start in range(0, count, CHUNK):
        stop, first = min(start + CHUNK, count), max(0, start - width)
        chunk, keys, values = query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop]
        seen = mask[start - stop :, first - stop :]
        outputs.append(attend(chunk, keys, values, attn_mask=seen))
    return torch.cat(outputs, 2)
