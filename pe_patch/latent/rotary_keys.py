"""Which part of the keys keeps its rotation, and what becomes of the part that loses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .projections import Projections, Statistics


@dataclass(frozen=True)
class RotaryKeys:
    """Keys k `[kv_heads * head_dim]` in two parts: scores are those of the trained attention, without the rotation of
    the second part."""

    query: Tensor
    """`[kv_heads, nope + rope, head_dim]`: what makes a query of the group meet the two parts, as in `Latents`"""
    rope_key: Tensor
    """`[rope_heads * rope, kv_heads * head_dim]`: the first part, which rotates"""
    frequency: Tensor
    """`[rope_heads, rope / 2]`"""
    rest: Tensor
    """`[rows, kv_heads * head_dim]`: the second part, orthonormal rows"""
    expand: Tensor
    """`[kv_heads, nope, rows]`: the part of each head's key that does not rotate, from `rest k`"""


def selected(projections: Projections, statistics: Statistics | None, rope_dim: int, select: str) -> RotaryKeys:
    """Each key-value head keeps `rope_dim` of its own dims (MHA2MLA, Ji et al. 2025, arXiv 2502.14837)."""
    of, kept = projections, rope_dim // 2
    count = of.rotary_dim // 2
    order = SELECTIONS[select](count, kept, of, statistics)
    frequency = order.sort(-1).values.expand(of.kv_heads, kept)
    turning = of.pairs[frequency].transpose(1, 2).flatten(1)  # [kv_heads, rope_dim]: first dims of the pairs, second
    still = torch.ones(of.kv_heads, of.head_dim, dtype=torch.bool, device="cpu").scatter_(1, turning, False)
    resting = still.nonzero()[:, 1].view(of.kv_heads, -1)
    eye = torch.eye(of.head_dim, **_like(of))
    every = torch.eye(of.kv_heads * of.head_dim, **_like(of))
    first = torch.arange(of.kv_heads, device="cpu")[:, None] * of.head_dim
    rows = resting.numel()
    device = of.key.device
    return RotaryKeys(
        query=eye[torch.cat((resting, turning), 1).to(device)],
        rope_key=every[(first + turning).flatten().to(device)],
        frequency=frequency.contiguous().to(device),
        rest=every[(first + resting).flatten().to(device)],
        expand=torch.eye(rows, **_like(of)).view(of.kv_heads, resting.shape[1], rows),
    )


def _by_norms(count: int, kept: int, of: Projections, statistics: Statistics | None) -> Tensor:
    """The pairs that score most: mean norm of a query's pair times that of the key's, summed over a group."""
    assert statistics is not None
    query, key = statistics.pair_norms / statistics.tokens
    score = (query * key).view(of.kv_heads, of.group, count).sum(1)
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :kept].to("cpu")


Selection = Callable[[int, int, Projections, "Statistics | None"], Tensor]
SELECTIONS: dict[str, Selection] = {  # (pairs, how many to keep, ...) -> which, [kv_heads | 1, kept], on the processor
    "2-norm": _by_norms,
    "high": lambda count, kept, *_: torch.arange(kept, device="cpu")[None],
    "low": lambda count, kept, *_: torch.arange(count - kept, count, device="cpu")[None],
    "uniform": lambda count, kept, *_: (torch.arange(kept, device="cpu") * count // kept)[None],
}


def shared(projections: Projections, statistics: Statistics, rope_dim: int, freqfold: int) -> RotaryKeys:
    """One rotary key for all heads (RoRoPE, FreqFold and collapse of TransMLA, Meng et al. 2025, arXiv 2502.07864).

    For every frequency the pairs of all heads are numbers on one circle: turning heads into one another by the same
    orthogonal matrix for both dims of a pair commutes with rotation. By the principal axes of the keys the first slots
    then hold most of a frequency. `freqfold` takes so many neighbouring frequencies for one, which is not exact, and
    keeps every (rotary_dim / rope_dim)-th of their frequencies for its first slots.
    """
    of, device = projections, projections.key.device
    width, groups = of.kv_heads * of.head_dim, of.rotary_dim // 2 // freqfold
    slots, kept = of.kv_heads * freqfold, rope_dim // (2 * groups)
    first = torch.arange(of.kv_heads, device="cpu")[:, None, None] * of.head_dim
    dims = (first + of.pairs).view(of.kv_heads, groups, freqfold, 2).permute(1, 3, 0, 2).flatten(2).to(device)
    # dims: [groups, 2, slots], where in k the two dims of a group's pairs are
    moment = statistics.key_moment[dims[..., None], dims[:, :, None]].sum(1)
    axes = principal(moment).mT  # [groups, slots, slots]
    turned = torch.zeros(groups, slots, 2, width, **_like(of))
    turned.scatter_(-1, dims[:, None].expand(-1, slots, -1, -1), axes[:, :, None].expand(-1, -1, 2, -1))

    rope_key = turned[:, :kept].permute(2, 0, 1, 3).reshape(rope_dim, width)
    left = turned[:, kept:].reshape(-1, width)
    resting = torch.arange(of.rotary_dim, of.head_dim, device="cpu")
    rest = torch.cat((left, torch.eye(width, **_like(of))[(first[:, 0] + resting).flatten().to(device)]))
    by_head = rest.view(rest.shape[0], of.kv_heads, of.head_dim).transpose(0, 1)  # [kv_heads, rows, head_dim]
    eye = torch.eye(of.head_dim, **_like(of))
    if left.shape[0] >= of.rotary_dim:  # the head's own dims are the fewer
        query, expand = eye.expand(of.kv_heads, -1, -1), by_head.mT
    else:
        query = torch.cat((by_head[:, : left.shape[0]], eye[of.rotary_dim :].expand(of.kv_heads, -1, -1)), 1)
        every = torch.eye(rest.shape[0], **_like(of))
        own = every[left.shape[0] :].view(of.kv_heads, of.head_dim - of.rotary_dim, rest.shape[0])
        expand = torch.cat((every[: left.shape[0]].expand(of.kv_heads, -1, -1), own), 1)
    step = max(1, of.rotary_dim // rope_dim)
    frequency = torch.arange(groups, device=device)[:, None] * freqfold
    frequency = frequency + torch.arange(kept, device=device) * step % freqfold
    return RotaryKeys(
        query=torch.cat((query, rope_key.view(rope_dim, of.kv_heads, of.head_dim).transpose(0, 1)), 1),
        rope_key=rope_key,
        frequency=frequency.view(1, -1),
        rest=rest,
        expand=expand,
    )


def principal(moment: Tensor, within: Tensor | None = None) -> Tensor:
    """Principal axes of `moment` `[..., n, n]`, most first; the largest entry of each is positive.

    With `within`, orthonormal columns `[n, m]`, the m axes in their span.
    """
    inside = moment if within is None else within.T @ moment @ within
    axes = torch.linalg.eigh((inside + inside.mT) / 2).eigenvectors.flip(-1)
    axes = axes if within is None else within @ axes
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0).to(axes.dtype)


def _like(projections: Projections) -> dict:
    return {"dtype": projections.work_dtype, "device": projections.key.device}
