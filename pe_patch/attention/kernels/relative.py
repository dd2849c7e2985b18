"""Causal attention with Transformer-XL's relative term: one more matrix product per chunk, read along diagonals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .tiles import Tile, TileBias, diagonals, materialized_gradients

HEADS = 2
"""Heads per kernel call, which bounds the memory of the relative term."""


def distances(total: int) -> Tensor:
    """Return the distance of each vector in the strip: decreasing over `total` keys, then 0 for future keys."""
    return torch.arange(total - 1, -cpu.CHUNK - 1, -1).clamp(min=0)


class Relative(torch.autograd.Function):
    """Causal attention with the scores `scaling ((q_i + u) k_j + (q_i + v) r_{i-j})`.

    Args:
        query: `[batch, heads, query, head]`; the queries are the last of the keys.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        u: `[heads, head]`, float32 or wider.
        v: `[heads, head]`, float32 or wider.
        strip: the vectors r at `distances(keys)`, `[heads, distances, head]`, float32 or wider.
        scaling: factor on the dot products.

    Returns:
        The output `[batch, heads, query, head]`.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, u: Tensor, v: Tensor, strip: Tensor, scaling: float
    ) -> Any:
        output, lse = cpu.empty_outputs(query)
        total, group = key.shape[2], query.shape[1] // key.shape[1]
        for chunk in cpu.chunks(query.shape[2], total, total):
            width = chunk.end + chunk.rows - 1
            for low in range(0, query.shape[1], HEADS):
                heads = slice(low, min(low + HEADS, query.shape[1]))
                shared = [head // group for head in range(heads.start, heads.stop)]
                vectors = strip[heads, total - chunk.end : total - chunk.end + width].transpose(1, 2)
                chunk_query = query[:, heads, chunk.queries].flip(2)
                term = ((chunk_query + v[heads, None]) * scaling) @ vectors
                term[..., chunk.end :] = -math.inf
                mask = term.as_strided(
                    (*term.shape[:3], chunk.end), (term.stride(0), term.stride(1), term.stride(2) + 1, 1)
                )
                chunk_output, chunk_lse = cpu.attention(
                    (chunk_query + u[heads, None]).to(chunk_query.dtype), key[:, shared, : chunk.end],
                    value[:, shared, : chunk.end], mask, scaling,
                )  # fmt: skip
                output[:, heads, chunk.queries], lse[:, heads, chunk.queries] = chunk_output.flip(2), chunk_lse.flip(2)
        ctx.save_for_backward(query, key, value, u, v, strip, output, lse)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, u, v, strip, output, lse = ctx.saved_tensors
        bias = _RelativeTerm(query, u, v, strip, ctx.scaling)
        input_grads = materialized_gradients(grads[0], query, key, value, output, lse, ctx.scaling, bias)
        to_u = input_grads[0].to(u.dtype).sum((0, 2)) - bias.to_v
        return *input_grads, to_u, bias.to_v, bias.to_strip, None


class _RelativeTerm(TileBias):
    """Add the relative term, and accumulate the gradients of v and of the strip."""

    def __init__(self, query: Tensor, u: Tensor, v: Tensor, strip: Tensor, scaling: float) -> None:
        self.query, self.v, self.strip, self.scaling = query, v, strip, scaling
        self.shift, self.total = u, strip.shape[1] - cpu.CHUNK
        self.to_v, self.to_strip = torch.zeros_like(v), torch.zeros_like(strip)

    def _factors(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return the two factors of the term: `(q + v) scaling` `[sequences, rows, head]`, and r `[width, head]`."""
        window = slice(tile.begin, tile.begin + tile.width)
        tile_query = self.query[tile.batch, tile.head, tile.queries].flip(1)
        return (tile_query + self.v[tile.head]) * self.scaling, self.strip[tile.head, window]

    def add(self, scores: Tensor, tile: Tile) -> None:
        scaled_query, vectors = self._factors(tile)
        term = scaled_query @ vectors.T
        term[..., max(0, self.total - tile.begin) :] = -math.inf
        scores += diagonals(term, scores.shape[2])

    def accumulate(self, skewed: Tensor, score_grad: Tensor, tile: Tile) -> Tensor:
        scaled_query, vectors = self._factors(tile)
        self.to_strip[tile.head, tile.begin : tile.begin + tile.width].addmm_(
            skewed.flatten(0, 1).T, scaled_query.flatten(0, 1)
        )
        query_grad = (skewed @ vectors) * self.scaling
        self.to_v[tile.head] += query_grad.sum((0, 1))
        return query_grad
