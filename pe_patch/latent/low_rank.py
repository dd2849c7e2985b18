"""The few directions that keys and values are cached in."""

from __future__ import annotations

import torch
from torch import Tensor

from .projections import Projections, Statistics
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


def parts(projections: Projections, keys: RotaryKeys, balance: float) -> tuple[Tensor, Tensor]:
    """What makes the keys to decompose, over `balance`, and the values of z: each `[rows, 2 * kv_heads * head_dim]`."""
    width = projections.kv_heads * projections.head_dim
    rest = keys.rest / balance
    eye = torch.eye(width, dtype=rest.dtype, device=rest.device)
    return torch.cat((rest, torch.zeros_like(rest)), 1), torch.cat((torch.zeros_like(eye), eye), 1)


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


def second_moment(made: Tensor, statistics: Statistics | None, by_weight: tuple[Tensor, Tensor]) -> Tensor:
    """Second moment of `made z`: over the tokens of `statistics`, or without those for white hidden states."""
    if statistics is not None:
        return made @ statistics.moment @ made.T
    white = made @ torch.cat(by_weight)
    return white @ white.T


def reach(projections: Projections, *made: Tensor) -> Tensor | None:
    """Orthonormal columns that hold all that `made z` can be, `[rows, full rank]`; None where that is everything.

    Calibration tokens may be fewer than these directions, and directions that no text can take are not worth a rank.
    """
    stacked, width = torch.cat(made), projections.kv_heads * projections.head_dim
    key, value = (weight.to(projections.work_dtype) for weight in (projections.key, projections.value))
    if projections.key_norm is None:
        linear = stacked @ torch.cat((key, value))
        return torch.linalg.qr(linear).Q if linear.shape[0] > linear.shape[1] else None
    only_values = stacked[stacked[:, width:].any(1)][:, width:] @ value
    if only_values.shape[0] <= projections.hidden:
        return None
    keys = stacked.shape[0] - only_values.shape[0]
    return torch.block_diag(torch.eye(keys, dtype=value.dtype, device=value.device), torch.linalg.qr(only_values).Q)
