"""The few directions that keys and values are cached in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.projections import Projections, Statistics
from .rotary_keys import RotaryKeys
from .statistics import normalised


def full_ranks(projections: Projections, rows: int) -> tuple[int, int, int]:
    """Ranks that lose nothing of `rows` key rows without position, of the values, and of both together.

    What is linear in the hidden state has no more directions than that; keys under a norm are not linear.
    """
    hidden, values = projections.hidden, projections.kv_heads * projections.head_dim
    if projections.key_norm is not None:
        return rows, min(values, hidden), rows + min(values, hidden)
    return min(rows, hidden), min(values, hidden), min(rows + values, hidden)


def weights(projections: Projections) -> tuple[Tensor, Tensor]:
    """What makes keys and values of hidden states, each `[kv_heads * head_dim, hidden]`.

    Keys under a norm are taken as this norm would make them on average if the hidden state was white: each head's rows
    as a whole have norm 1 for each dim, times what the norm multiplies the dim with.
    """
    of, dtype = projections, projections.work_dtype
    key, value = of.key.to(dtype), of.value.to(dtype)
    if of.key_norm is None:
        return key, value
    # A norm's factors whatever it calls them: what it makes of a vector with mean 0 and mean square 1.
    probe = torch.ones(of.kv_heads, of.head_dim, dtype=dtype, device=key.device)
    probe[:, 1::2] = -1
    with torch.no_grad():
        factors = (normalised(of.key_norm, probe) - normalised(of.key_norm, -probe)) / 2 * probe
    heads = key.unflatten(0, (of.kv_heads, of.head_dim))
    scale = of.head_dim**0.5 / heads.flatten(1).norm(dim=1).clamp(min=torch.finfo(dtype).tiny)
    return (heads * (factors * scale[:, None])[..., None]).flatten(0, 1), value


def balance_of(projections: Projections, keys: RotaryKeys, statistics: Statistics, ratio: float) -> float:
    """By what to divide the keys without position, that their mean norm is `ratio` times that of values (TransMLA).

    Left alone, the larger of the two would take all the rank.
    """
    if not keys.rest.shape[0]:
        return 1.0
    width = projections.kv_heads * projections.head_dim
    of_key = statistics.moment[:width, :width]
    key = ((keys.rest @ of_key) * keys.rest).sum(1).clamp(min=0).sqrt().mean()
    # Values from the width of the rotary key on, as in the authors' code, whose numbers this reproduces.
    value = statistics.moment.diagonal()[width + keys.rope_key.shape[0] :].clamp(min=0).sqrt().mean()
    balance = float(key / (value * ratio))
    return balance if 0 < balance < float("inf") else 1.0


def second_moment(projections: Projections, rest: Tensor, statistics: Statistics | None) -> Tensor:
    """Second moment of [rest k | v]: over the tokens of `statistics`, or without those for white hidden states."""
    if statistics is None:
        key, value = weights(projections)
        white = torch.cat((rest @ key, value))
        return white @ white.T
    width = rest.shape[1]
    of_key, both = statistics.moment[:width].split(width, 1)
    of_value = statistics.moment[width:, width:]
    both = rest @ both
    return torch.cat((torch.cat((rest @ of_key @ rest.T, both), 1), torch.cat((both.T, of_value), 1)))


def spans(projections: Projections, rest: Tensor, svd: str) -> list[Tensor | None]:
    """Orthonormal columns that hold all that a latent's keys and values can be, None where that is everything.

    Calibration tokens may be fewer than these directions, and directions that no text can take are not worth a rank.
    """
    value = projections.value.to(rest.dtype)
    key = None if projections.key_norm is not None else rest @ projections.key.to(rest.dtype)
    if svd == "split":
        return [None if key is None else _span(key), _span(value)]
    if key is not None:
        return [_span(torch.cat((key, value)))]
    of_value = _span(value)
    eye = torch.eye(rest.shape[0], dtype=rest.dtype, device=rest.device)
    return [None if of_value is None else torch.block_diag(eye, of_value)]


def _span(linear: Tensor) -> Tensor | None:
    return torch.linalg.qr(linear).Q if linear.shape[0] > linear.shape[1] else None
