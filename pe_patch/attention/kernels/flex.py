"""FlexAttention: a bias as a change of each score, and ranges joined by their log-sum-exps.

On CUDA it is compiled, forward and backward. Uncompiled it serves on any device as the same formula, slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from ...core.positions import Positions
from ...core.ranges import Range
from .cpu import merge

compiled = torch.compile(flex_attention, dynamic=False)
"""Compiled on its first use, which takes seconds."""


def ranges(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Positions,
    parts: Sequence[Range],
    mask: BlockMask | None,
    scaling: float,
) -> Tensor:
    """Attention over ranges, `[batch, query, heads, head]`; what `mask` hides stays hidden."""
    kernel = compiled if query.is_cuda else flex_attention
    merged: tuple[Tensor, Tensor] | None = None
    for part in parts:
        turned_query, turned_key = part.turned(query, key)
        own: Any = kernel(
            turned_query, turned_key, value, block_mask=_block_mask(part, query, key, positions, mask), scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1], return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        output, lse = own[0], own[1].lse.clamp(min=-1e30)  # a row that sees nothing has -inf, which has no gradient
        merged = (output, lse) if merged is None else merge(merged, (output, lse))
    assert merged is not None
    return merged[0].transpose(1, 2).contiguous()


def _block_mask(part: Range, query: Tensor, key: Tensor, positions: Positions, mask: BlockMask | None) -> BlockMask:
    steps = part.steps(positions)
    shared = all(one.shape[0] == 1 for one in (*steps, positions.key)) and (mask is None or mask.shape[0] == 1)
    rows, count, total = 1 if shared else query.shape[0], query.shape[2], key.shape[2]
    step_query, step_key = (one.expand(rows, -1) for one in steps)
    at_key, offset = positions.key.expand(rows, -1), total - count

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        steps = step_query[batch, q] - step_key[batch, k]
        inside = k <= q + offset if mask is None else mask.mask_mod(batch, head, q, k)
        if part.low is not None:
            inside = inside & (steps >= part.low)
        if part.high is not None:
            inside = inside & (steps < part.high)
        if part.below is not None:
            inside = inside & (at_key[batch, k] < part.below)
        return inside

    batch = None if shared else rows
    # Compiled, it never holds all pairs.
    return create_block_mask(sees, batch, None, count, total, device=str(query.device), _compile=query.is_cuda)
