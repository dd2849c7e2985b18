"""Attention over ranges with FlexAttention: one kernel call for each range, merged by log-sum-exp (LSE).

FlexAttention is compiled on CUDA, forward and backward. Other devices run the same formula uncompiled and slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ... import compat
from ...core.positions import Positions
from ...core.ranges import Range
from .cpu import merge

compiled = torch.compile(flex_attention, dynamic=False)
"""FlexAttention compiled; the first call compiles, which takes seconds."""


def ranges(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Positions,
    ranges: Sequence[Range],
    mask: BlockMask | None,
    scaling: float,
) -> Tensor:
    """Compute attention over ranges, `[batch, query, heads, head]`.

    Args:
        query: `[batch, heads, query, head]`.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        positions: positions of the queries and keys.
        ranges: disjoint ranges of distance with their encodings.
        mask: the mask of the layer; None for a causal mask.
        scaling: factor on the dot products.
    """
    kernel = compiled if query.is_cuda else flex_attention
    merged: tuple[Tensor, Tensor] | None = None
    for each in ranges:
        encoded_query, encoded_key = each.rotate(query, key)
        result: Any = kernel(
            encoded_query, encoded_key, value, block_mask=_block_mask(each, query, key, positions, mask), scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1], return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        output, lse = result[0], result[1].lse.clamp(min=-1e30)  # a fully masked row has -inf, and no finite gradient
        merged = (output, lse) if merged is None else merge(merged, (output, lse))
    assert merged is not None
    return merged[0].transpose(1, 2).contiguous()


def _block_mask(each: Range, query: Tensor, key: Tensor, positions: Positions, mask: BlockMask | None) -> BlockMask:
    """Return the block mask of one range, combined with the mask of the layer."""
    steps = each.steps(positions)
    shared = all(tensor.shape[0] == 1 for tensor in (*steps, positions.key)) and (mask is None or mask.shape[0] == 1)
    rows, count, total = 1 if shared else query.shape[0], query.shape[2], key.shape[2]
    step_query, step_key = (tensor.expand(rows, -1) for tensor in steps)
    at_key, offset = positions.key.expand(rows, -1), total - count

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        steps = step_query[batch, q] - step_key[batch, k]
        inside = k <= q + offset if mask is None else mask.mask_mod(batch, head, q, k)
        if each.low is not None:
            inside = inside & (steps >= each.low)
        if each.high is not None:
            inside = inside & (steps < each.high)
        if each.below is not None:
            inside = inside & (at_key[batch, k] < each.below)
        return inside

    batch = None if shared else rows
    return compat.block_mask(sees, batch, None, count, total, device=str(query.device), compiled=query.is_cuda)
