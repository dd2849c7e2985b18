"""Which part of the keys keeps its rotation, and what becomes of the part that loses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.projections import Projections, Statistics


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
    width, device = of.kv_heads * of.head_dim, projections.key.device
    order = SELECTIONS[select](of.rotary_dim // 2, kept, of, statistics)
    frequency = order.sort(-1).values.expand(of.kv_heads, kept)
    turning = of.pairs[frequency].transpose(1, 2).flatten(1)  # [kv_heads, rope_dim]: first dims of the pairs, second
    still = torch.ones(of.kv_heads, of.head_dim, dtype=torch.bool, device="cpu").scatter_(1, turning, False)
    resting = still.nonzero()[:, 1].view(of.kv_heads, of.head_dim - rope_dim)
    turning, resting = turning.to(device), resting.to(device)
    first = torch.arange(of.kv_heads, device=device)[:, None] * of.head_dim
    own, every = torch.eye(of.head_dim, **_like(of)), torch.eye(width, **_like(of))
    rows = resting.numel()
    return RotaryKeys(
        query=own[torch.cat((resting, turning), 1)],
        rope_key=every[(first + turning).flatten()],
        frequency=frequency.contiguous().to(device),
        rest=every[(first + resting).flatten()],
        expand=torch.eye(rows, **_like(of)).view(of.kv_heads, of.head_dim - rope_dim, rows),
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
    then hold most of a frequency. `freqfold` takes so many neighbouring frequencies for one, which is not exact; with a
    rope_dim below the trained width every (rotary_dim / rope_dim)-th of these stays, for as many slots.
    """
    of, width = projections, projections.kv_heads * projections.head_dim
    slots = _slots(of, statistics.key_moment, freqfold)
    groups = slots.shape[0]
    kept = rope_dim // (2 * groups)
    rope_key = slots[:, :kept].permute(2, 0, 1, 3).reshape(rope_dim, width)
    query, rest, expand = _without_position(of, slots[:, kept:].reshape(-1, width))
    step = max(1, of.rotary_dim // rope_dim)
    number = torch.arange(groups, device=rest.device)[:, None] * freqfold
    number = number + torch.arange(kept, device=rest.device) * step % freqfold
    return RotaryKeys(
        query=torch.cat((query, rope_key.view(rope_dim, of.kv_heads, of.head_dim).transpose(0, 1)), 1),
        rope_key=rope_key,
        frequency=number.view(1, -1),
        rest=rest,
        expand=expand,
    )


def _slots(of: Projections, key_moment: Tensor, freqfold: int) -> Tensor:
    """All rotating key dims along their principal axes, `[groups, kv_heads * freqfold, 2, kv_heads * head_dim]`."""
    width, groups = of.kv_heads * of.head_dim, of.rotary_dim // 2 // freqfold
    first = torch.arange(of.kv_heads, device="cpu")[:, None, None] * of.head_dim
    dims = (first + of.pairs).view(of.kv_heads, groups, freqfold, 2).permute(1, 3, 0, 2).flatten(2)
    dims = dims.to(key_moment.device)  # [groups, 2, kv_heads * freqfold]: where in k both dims of a group's pairs are
    axes = principal(key_moment[dims[..., None], dims[:, :, None]].sum(1)).mT
    count = axes.shape[1]
    slots = torch.zeros(groups, count, 2, width, **_like(of))
    where, what = dims[:, None].expand(-1, count, -1, -1), axes[:, :, None].expand(-1, -1, 2, -1)
    return slots.scatter_(-1, where, what)


def _without_position(of: Projections, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`query` of `nope` rows, `rest` and `expand` for the slots `left` `[slots, kv_heads * head_dim]` and the dims that
    have never rotated.

    A head's query meets its key in the head's own dims, or in slots where these are fewer.
    """
    width, count, never = of.kv_heads * of.head_dim, left.shape[0], of.head_dim - of.rotary_dim
    eye = torch.eye(width, **_like(of))
    rest = torch.cat((left, eye.view(of.kv_heads, of.head_dim, width)[:, of.rotary_dim :].flatten(0, 1)))
    by_head = rest.view(rest.shape[0], of.kv_heads, of.head_dim).transpose(0, 1)
    own = eye[: of.head_dim, : of.head_dim].expand(of.kv_heads, -1, -1)
    if count >= of.rotary_dim:
        return own, rest, by_head.mT
    every = torch.eye(rest.shape[0], **_like(of))
    unturned = every[count:].view(of.kv_heads, never, rest.shape[0])
    expand = torch.cat((every[:count].expand(of.kv_heads, -1, -1), unturned), 1)
    return torch.cat((by_head[:, :count], own[:, of.rotary_dim :]), 1), rest, expand


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
