"""Decomposition of keys into a part that keeps its rotation and a part without position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.projections import Projections, Statistics


@dataclass(frozen=True)
class RotaryKeys:
    """A decomposition of the keys k `[kv_heads * head_dim]` into a rotary part and a part without position.

    Scores equal those of the trained attention, except that the second part does not rotate.
    """

    query: Tensor
    """Matrix from a query of each group to its two parts, as in `Latents`, `[kv_heads, nope + rope, head_dim]`."""
    rope_key: Tensor
    """Matrix from k to the rotary part, `[rope_heads * rope, kv_heads * head_dim]`."""
    frequency: Tensor
    """Index of the trained frequency of each rotary pair, `[rope_heads, rope / 2]`."""
    rest: Tensor
    """Matrix from k to the part without position, `[rows, kv_heads * head_dim]`, with orthonormal rows."""
    expand: Tensor
    """Matrix from `rest k` to the part of each head's key without position, `[kv_heads, nope, rows]`."""


def select_rotary_dims(
    projections: Projections, statistics: Statistics | None, rope_dim: int, select: str
) -> RotaryKeys:
    """Select `rope_dim` dimensions of each key-value head that keep their rotation.

    Source: MHA2MLA, Ji et al. 2025, arXiv 2502.14837.
    """
    kept = rope_dim // 2
    width, device = projections.kv_heads * projections.head_dim, projections.key.device
    order = SELECTIONS[select](projections.rotary_dim // 2, kept, projections, statistics)
    frequency = order.sort(-1).values.expand(projections.kv_heads, kept)
    # [kv_heads, rope_dim]: the first dimensions of all pairs, then the second ones.
    rotary = projections.pairs[frequency].transpose(1, 2).flatten(1)
    has_no_position = torch.ones(projections.kv_heads, projections.head_dim, dtype=torch.bool, device="cpu").scatter_(
        1, rotary, False
    )
    nope = has_no_position.nonzero()[:, 1].view(projections.kv_heads, projections.head_dim - rope_dim)
    rotary, nope = rotary.to(device), nope.to(device)
    first = torch.arange(projections.kv_heads, device=device)[:, None] * projections.head_dim
    head_eye, eye = torch.eye(projections.head_dim, **_like(projections)), torch.eye(width, **_like(projections))
    rows = nope.numel()
    return RotaryKeys(
        query=head_eye[torch.cat((nope, rotary), 1)],
        rope_key=eye[(first + rotary).flatten()],
        frequency=frequency.contiguous().to(device),
        rest=eye[(first + nope).flatten()],
        expand=torch.eye(rows, **_like(projections)).view(projections.kv_heads, projections.head_dim - rope_dim, rows),
    )


def _by_norms(count: int, kept: int, projections: Projections, statistics: Statistics | None) -> Tensor:
    """Select the pairs with the largest product of mean query norm and mean key norm, summed over a query group."""
    assert statistics is not None
    query, key = statistics.pair_norms / statistics.tokens
    score = (query * key).view(projections.kv_heads, projections.group, count).sum(1)
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :kept].to("cpu")


Selection = Callable[[int, int, Projections, "Statistics | None"], Tensor]
SELECTIONS: dict[str, Selection] = {
    "2-norm": _by_norms,
    "high": lambda count, kept, *_: torch.arange(kept, device="cpu")[None],
    "low": lambda count, kept, *_: torch.arange(count - kept, count, device="cpu")[None],
    "uniform": lambda count, kept, *_: (torch.arange(kept, device="cpu") * count // kept)[None],
}
"""Functions of (number of pairs, number to keep, projections, statistics) that return the indices of the pairs to keep,
`[kv_heads | 1, kept]`, on the CPU."""


def shared_rotary_key(projections: Projections, statistics: Statistics, rope_dim: int, freqfold: int) -> RotaryKeys:
    """Concentrate the rotary part of all heads in one shared rotary key.

    Rotating the heads into the principal axes of the keys commutes with RoPE if both dimensions of a pair use the same
    matrix. The first axes hold most of the energy.
    `freqfold` treats that many neighboring frequencies as one, which is an approximation. With a `rope_dim` below the
    trained width, every (rotary_dim / rope_dim)-th frequency of a group remains, each with one slot.

    Args:
        projections: the weights of the attention.
        statistics: the statistics of calibration tokens.
        rope_dim: width of the shared rotary key.
        freqfold: number of neighboring frequencies in a group.

    Source: RoRoPE, FreqFold and collapse of TransMLA, Meng et al. 2025, arXiv 2502.07864.
    """
    width = projections.kv_heads * projections.head_dim
    slots = _slots(projections, statistics.key_moment, freqfold)
    groups = slots.shape[0]
    kept = rope_dim // (2 * groups)
    rope_key = slots[:, :kept].permute(2, 0, 1, 3).reshape(rope_dim, width)
    query, rest, expand = _without_position(projections, slots[:, kept:].reshape(-1, width))
    step = max(1, projections.rotary_dim // rope_dim)
    number = torch.arange(groups, device=rest.device)[:, None] * freqfold
    number = number + torch.arange(kept, device=rest.device) * step % freqfold
    return RotaryKeys(
        query=torch.cat(
            (query, rope_key.view(rope_dim, projections.kv_heads, projections.head_dim).transpose(0, 1)), 1
        ),
        rope_key=rope_key,
        frequency=number.view(1, -1),
        rest=rest,
        expand=expand,
    )


def _slots(projections: Projections, key_moment: Tensor, freqfold: int) -> Tensor:
    """Return the principal axes of the rotary key dimensions, `[groups, kv_heads * freqfold, 2, kv_heads * head_dim]`.

    Both dimensions of a pair have the same axes.
    """
    width, groups = projections.kv_heads * projections.head_dim, projections.rotary_dim // 2 // freqfold
    first = torch.arange(projections.kv_heads, device="cpu")[:, None, None] * projections.head_dim
    dims = (first + projections.pairs).view(projections.kv_heads, groups, freqfold, 2).permute(1, 3, 0, 2).flatten(2)
    dims = dims.to(key_moment.device)  # [groups, 2, kv_heads * freqfold]: indices in k of both dimensions of the pairs
    axes = principal(key_moment[dims[..., None], dims[:, :, None]].sum(1)).mT
    count = axes.shape[1]
    slots = torch.zeros(groups, count, 2, width, **_like(projections))
    index, values = dims[:, None].expand(-1, count, -1, -1), axes[:, :, None].expand(-1, -1, 2, -1)
    return slots.scatter_(-1, index, values)


def _without_position(projections: Projections, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `query` (its `nope` rows), `rest` and `expand` of the part of the keys without position.

    The part consists of the slots that lose their rotation, `[slots, kv_heads * head_dim]`, and the dimensions that
    never rotated. Scores are computed in the head's own dimensions, or in the slots if these are fewer.
    """
    width, count, never_rotated = (
        projections.kv_heads * projections.head_dim,
        slots.shape[0],
        projections.head_dim - projections.rotary_dim,
    )
    eye = torch.eye(width, **_like(projections))
    rest = torch.cat(
        (slots, eye.view(projections.kv_heads, projections.head_dim, width)[:, projections.rotary_dim :].flatten(0, 1))
    )
    by_head = rest.view(rest.shape[0], projections.kv_heads, projections.head_dim).transpose(0, 1)
    head_eye = eye[: projections.head_dim, : projections.head_dim].expand(projections.kv_heads, -1, -1)
    if count >= projections.rotary_dim:
        return head_eye, rest, by_head.mT
    rest_eye = torch.eye(rest.shape[0], **_like(projections))
    tail = rest_eye[count:].view(projections.kv_heads, never_rotated, rest.shape[0])
    expand = torch.cat((rest_eye[:count].expand(projections.kv_heads, -1, -1), tail), 1)
    return torch.cat((by_head[:, :count], head_eye[:, projections.rotary_dim :]), 1), rest, expand


def principal(moment: Tensor, within: Tensor | None = None) -> Tensor:
    """Return the principal axes of `moment` `[..., n, n]` as columns, sorted by decreasing variance.

    The sign of each axis makes its largest entry positive.

    Args:
        moment: second moment, `[..., n, n]`.
        within: orthonormal columns `[n, m]`, to whose span the m axes are restricted; None for no restriction.
    """
    inside = moment if within is None else within.T @ moment @ within
    axes = torch.linalg.eigh((inside + inside.mT) / 2).eigenvectors.flip(-1)
    axes = axes if within is None else within @ axes
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0).to(axes.dtype)


def _like(projections: Projections) -> dict:
    """Return the dtype and device of a conversion, as keyword arguments."""
    return {"dtype": projections.work_dtype, "device": projections.key.device}
