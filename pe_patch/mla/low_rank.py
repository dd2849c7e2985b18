"""Low-rank decomposition of keys and values: second moments, spans and balancing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.projections import Projections, Statistics
from .rotary_keys import RotaryKeys
from .statistics import normalized


def full_ranks(projections: Projections, rows: int) -> tuple[int, int, int]:
    """Return the lossless ranks of the keys without position, of the values, and of both together.

    A linear function of the hidden state has at most as many directions as the hidden state. Normalized keys are not
    linear, so this bound does not apply to them.

    Args:
        projections: the weights of the attention.
        rows: number of key dimensions without position, over all heads.
    """
    hidden, values = projections.hidden, projections.kv_heads * projections.head_dim
    if projections.key_norm is not None:
        return rows, min(values, hidden), rows + min(values, hidden)
    return min(rows, hidden), min(values, hidden), min(rows + values, hidden)


def weights(projections: Projections) -> tuple[Tensor, Tensor]:
    """Return the weights of keys and values, each `[kv_heads * head_dim, hidden]`.

    If the family normalizes keys, their weights are scaled as the norm would scale them on average for a white hidden
    state: the rows of each head get a mean square norm of 1, times the norm's factor for each dimension.
    """
    of, dtype = projections, projections.work_dtype
    key, value = of.key.to(dtype), of.value.to(dtype)
    if of.key_norm is None:
        return key, value
    # Families name the weights of a norm differently, so measure them: apply it to a vector of mean 0, mean square 1.
    probe = torch.ones(of.kv_heads, of.head_dim, dtype=dtype, device=key.device)
    probe[:, 1::2] = -1
    with torch.no_grad():
        factors = (normalized(of.key_norm, probe) - normalized(of.key_norm, -probe)) / 2 * probe
    heads = key.unflatten(0, (of.kv_heads, of.head_dim))
    scale = of.head_dim**0.5 / heads.flatten(1).norm(dim=1).clamp(min=torch.finfo(dtype).tiny)
    return (heads * (factors * scale[:, None])[..., None]).flatten(0, 1), value


def balance_of(projections: Projections, keys: RotaryKeys, statistics: Statistics, ratio: float) -> float:
    """Return the divisor of the keys without position that makes their mean norm `ratio` times that of the values.

    Without it, the larger of the two would take all the rank.

    Source: TransMLA, Meng et al. 2025, arXiv 2502.07864.
    """
    if not keys.rest.shape[0]:
        return 1.0
    width = projections.kv_heads * projections.head_dim
    of_key = statistics.moment[:width, :width]
    key = ((keys.rest @ of_key) * keys.rest).sum(1).clamp(min=0).sqrt().mean()
    # Leave out as many values as the rotary key is wide, as the authors' code does, to reproduce its results.
    value = statistics.moment.diagonal()[width + keys.rope_key.shape[0] :].clamp(min=0).sqrt().mean()
    balance = float(key / (value * ratio))
    return balance if 0 < balance < float("inf") else 1.0


def second_moment(projections: Projections, rest: Tensor, statistics: Statistics | None) -> Tensor:
    """Return the second moment of [rest k | v] over the tokens of `statistics`; None assumes white hidden states."""
    if statistics is None:
        key, value = weights(projections)
        white = torch.cat((rest @ key, value))
        return white @ white.T
    width = rest.shape[1]
    of_key, cross = statistics.moment[:width].split(width, 1)
    of_value = statistics.moment[width:, width:]
    cross = rest @ cross
    return torch.cat((torch.cat((rest @ of_key @ rest.T, cross), 1), torch.cat((cross.T, of_value), 1)))


def spans(projections: Projections, rest: Tensor, svd: str) -> list[Tensor | None]:
    """Return orthonormal bases of the space of each latent's keys and values; None if it is the whole space.

    With fewer calibration tokens than dimensions, the principal axes are arbitrary beyond the rank of the tokens. The
    basis keeps these axes within directions that keys and values can take.
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
    """Return an orthonormal basis of the column space of a matrix; None if it may be the whole space."""
    return torch.linalg.qr(linear).Q if linear.shape[0] > linear.shape[1] else None
