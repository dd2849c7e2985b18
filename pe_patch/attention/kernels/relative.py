"""A term of the query with a vector for each distance: one more product for every chunk, read along its diagonals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .tiles import Tile, TileBias, diagonals, materialised_gradients

HEADS = 2
"""Heads at a time, which bounds the memory for their products."""


def distances(total: int) -> Tensor:
    """What the strip of vectors is by: falling distances of `total` keys, then 0 for what lies ahead."""
    return torch.arange(total - 1, -cpu.CHUNK - 1, -1).clamp(min=0)


class Relative(torch.autograd.Function):
    """Causal attention of which the scores are `scaling ((q_i + u) k_j + (q_i + v) r_{i-j})`, `[batch, heads, query,
    head]`.

    u and v are `[heads, head]`, and `strip` `[heads, len(distances), head]` has r by `distances(keys)`, all float32.
    The queries are the last of the keys.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, u: Tensor, v: Tensor, strip: Tensor, scaling: float
    ) -> Any:
        output, lse = cpu.empty_outputs(query)
        total, group = key.shape[2], query.shape[1] // key.shape[1]
        for chunk in cpu.chunks(query.shape[2], total, total):
            width = chunk.place + chunk.rows - 1
            for low in range(0, query.shape[1], HEADS):
                some = slice(low, min(low + HEADS, query.shape[1]))
                shared = [head // group for head in range(some.start, some.stop)]
                along = strip[some, total - chunk.place : total - chunk.place + width].transpose(1, 2)
                own = query[:, some, chunk.queries].flip(2)
                term = ((own + v[some, None]) * scaling) @ along
                term[..., chunk.place :] = -math.inf
                mask = term.as_strided(
                    (*term.shape[:3], chunk.place), (term.stride(0), term.stride(1), term.stride(2) + 1, 1)
                )
                made, norm = cpu.attention(
                    (own + u[some, None]).to(own.dtype), key[:, shared, : chunk.place],
                    value[:, shared, : chunk.place], mask, scaling,
                )  # fmt: skip
                output[:, some, chunk.queries], lse[:, some, chunk.queries] = made.flip(2), norm.flip(2)
        ctx.save_for_backward(query, key, value, u, v, strip, output, lse)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, u, v, strip, output, lse = ctx.saved_tensors
        bias = _Term(query, u, v, strip, ctx.scaling)
        found = materialised_gradients(grads[0], query, key, value, output, lse, ctx.scaling, bias)
        to_u = found[0].to(u.dtype).sum((0, 2)) - bias.to_v
        return *found, to_u, bias.to_v, bias.to_strip, None


class _Term(TileBias):
    def __init__(self, query: Tensor, u: Tensor, v: Tensor, strip: Tensor, scaling: float) -> None:
        self.query, self.v, self.strip, self.scaling = query, v, strip, scaling
        self.shift, self.total = u, strip.shape[1] - cpu.CHUNK
        self.to_v, self.to_strip = torch.zeros_like(v), torch.zeros_like(strip)

    def _sides(self, tile: Tile) -> tuple[Tensor, Tensor]:
        along = slice(tile.begin, tile.begin + tile.width)
        own = self.query[tile.batch, tile.head, tile.queries].flip(1)
        return (own + self.v[tile.head]) * self.scaling, self.strip[tile.head, along]

    def add(self, scores: Tensor, tile: Tile) -> None:
        turned, along = self._sides(tile)
        term = turned @ along.T
        term[..., max(0, self.total - tile.begin) :] = -math.inf
        scores += diagonals(term, scores.shape[2])

    def take(self, skewed: Tensor, slope: Tensor, tile: Tile) -> Tensor:
        turned, along = self._sides(tile)
        self.to_strip[tile.head, tile.begin : tile.begin + tile.width].addmm_(
            skewed.flatten(0, 1).T, turned.flatten(0, 1)
        )
        more = (skewed @ along) * self.scaling
        self.to_v[tile.head] += more.sum((0, 1))
        return more
