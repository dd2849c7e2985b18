"""Causal attention with a bias by distance, whose mask is a view of one strip for each head.

The strip holds the bias by decreasing distance, then -inf for future keys. With the queries of a chunk in reversed
order, the mask of the chunk is `unfold` of the slice that begins at the distance of the last query and the first key.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .tiles import Tile, TileBias, materialized_gradients


def strip_of(table: Tensor, ahead: int = cpu.CHUNK) -> Tensor:
    """Return the strip `[heads, count + ahead]` of a bias by distance `[heads, count]`."""
    return torch.cat((table.flip(1), table.new_full((table.shape[0], ahead), -math.inf)), 1)


def mask_of(strip: Tensor, total: int, rows: int, first: int, end: int) -> Tensor:
    """Return the additive mask of a chunk as a view of the strip, the last query first.

    Args:
        strip: the strip of `total` distances.
        total: number of keys in the sequence.
        rows: number of queries, of which the last is at key `end - 1`.
        first: first key.
        end: end of the keys, exclusive.

    Returns:
        `[heads, rows, end - first]`.
    """
    begin, keys = total - end + first, end - first
    return strip[:, begin : begin + keys + rows - 1].unfold(1, keys, 1)


class Toeplitz(torch.autograd.Function):
    """Causal attention with a bias by distance.

    Args:
        query: `[batch, heads, query, head]`; the queries are the last of the keys.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        table: the bias by distance `[heads, keys]`, float32 or wider.
        scaling: factor on the dot products.
        width: how many keys back each query attends to at least.

    Returns:
        The output `[batch, heads, query, head]`, in the memory layout `[batch, query, heads, head]`.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float, width: int) -> Any:
        output, lse = cpu.empty_outputs(query)
        strip, total = strip_of(table.detach()), key.shape[2]
        for chunk in cpu.chunks(query.shape[2], total, width):
            mask = mask_of(strip, total, chunk.rows, chunk.first, chunk.end)[None]
            chunk_output, chunk_lse = cpu.attention(
                query[:, :, chunk.queries].flip(2), key[:, :, chunk.keys], value[:, :, chunk.keys],
                mask.expand(query.shape[0], -1, -1, -1), scaling,
            )  # fmt: skip
            output[:, :, chunk.queries], lse[:, :, chunk.queries] = chunk_output.flip(2), chunk_lse.flip(2)
        ctx.save_for_backward(query, key, value, table, output, lse)
        ctx.scaling, ctx.width = scaling, width
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, table, output, lse = ctx.saved_tensors
        grad, strip, total = grads[0], strip_of(table.detach()), key.shape[2]
        if ctx.needs_input_grad[3]:
            bias = _StripBias(strip)
            input_grads = materialized_gradients(grad, query, key, value, output, lse, ctx.scaling, bias)
            return *input_grads, bias.grad[:, :total].flip(1), None, None
        sums = cpu.Gradients(query, key, value)
        for chunk in cpu.chunks(query.shape[2], total, ctx.width):
            mask = mask_of(strip, total, chunk.rows, chunk.first, chunk.end)[None]
            sums.add_reversed(
                chunk, grad, query, key, value, output, lse, mask.expand(query.shape[0], -1, -1, -1), ctx.scaling
            )
        return *sums.finished(), None, None, None


class _StripBias(TileBias):
    """Add the strip, and accumulate its gradient: the sums of the scores' gradient along the diagonals."""

    def __init__(self, strip: Tensor) -> None:
        self.strip, self.grad = strip, torch.zeros_like(strip)

    def add(self, scores: Tensor, tile: Tile) -> None:
        scores += self.strip[tile.head, tile.begin : tile.begin + tile.width].unfold(0, scores.shape[2], 1)

    def accumulate(self, skewed: Tensor, score_grad: Tensor, tile: Tile) -> None:
        self.grad[tile.head, tile.begin : tile.begin + tile.width] += skewed.sum((0, 1))
