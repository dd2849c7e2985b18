"""A bias by distance: every chunk of it is a view of one strip for each head, causal part included.

The strip holds the bias by falling distance, then -inf for what lies ahead. With the queries of a chunk in reversed
order, the slice of it that begins where the last query meets the first key, seen through `unfold`, is the whole mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .tiles import Tile, TileBias, materialised_gradients


def strip_of(table: Tensor, ahead: int = cpu.CHUNK) -> Tensor:
    """`[heads, count + ahead]` from a bias by distance `[heads, count]`."""
    return torch.cat((table.flip(1), table.new_full((table.shape[0], ahead), -math.inf)), 1)


def mask_of(strip: Tensor, total: int, rows: int, first: int, place: int) -> Tensor:
    """The additive mask `[heads, rows, place - first]` of the queries at `place - 1` and before, the last one first,
    over the keys from `first`, out of `total` keys; a view."""
    begin, keys = total - place + first, place - first
    return strip[:, begin : begin + keys + rows - 1].unfold(1, keys, 1)


class Toeplitz(torch.autograd.Function):
    """Causal attention with a bias by distance, `[batch, heads, query, head]`, laid out query before heads.

    The queries are the last of the keys. `table` is `[heads, keys]` by distance, float32; a query looks `width` keys
    back or a little farther.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float, width: int) -> Any:
        output, lse = cpu.empty_outputs(query)
        strip, total = strip_of(table.detach()), key.shape[2]
        for chunk in cpu.chunks(query.shape[2], total, width):
            mask = mask_of(strip, total, chunk.rows, chunk.first, chunk.place)[None]
            made, own = cpu.attention(
                query[:, :, chunk.queries].flip(2), key[:, :, chunk.keys], value[:, :, chunk.keys],
                mask.expand(query.shape[0], -1, -1, -1), scaling,
            )  # fmt: skip
            output[:, :, chunk.queries], lse[:, :, chunk.queries] = made.flip(2), own.flip(2)
        ctx.save_for_backward(query, key, value, table, output, lse)
        ctx.scaling, ctx.width = scaling, width
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, table, output, lse = ctx.saved_tensors
        grad, strip, total = grads[0], strip_of(table.detach()), key.shape[2]
        if ctx.needs_input_grad[3]:
            learned = _Learned(strip)
            found = materialised_gradients(grad, query, key, value, output, lse, ctx.scaling, learned)
            return *found, learned.grad[:, :total].flip(1), None, None
        into = cpu.Gradients(query, key, value)
        for chunk in cpu.chunks(query.shape[2], total, ctx.width):
            mask = mask_of(strip, total, chunk.rows, chunk.first, chunk.place)[None]
            into.add_reversed(
                chunk, grad, query, key, value, output, lse, mask.expand(query.shape[0], -1, -1, -1), ctx.scaling
            )
        return *into.finished(), None, None, None


class _Learned(TileBias):
    """The gradient of the strip: sums of the scores' gradient along its diagonals."""

    def __init__(self, strip: Tensor) -> None:
        self.strip, self.grad = strip, torch.zeros_like(strip)

    def add(self, scores: Tensor, tile: Tile) -> None:
        scores += self.strip[tile.head, tile.begin : tile.begin + tile.width].unfold(0, scores.shape[2], 1)

    def take(self, skewed: Tensor, slope: Tensor, tile: Tile) -> None:
        self.grad[tile.head, tile.begin : tile.begin + tile.width] += skewed.sum((0, 1))
