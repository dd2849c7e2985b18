"""A term of the query with a vector for each distance: one more product for every chunk, read along its diagonals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .tiles import Tile, TileBias, diagonals, materialised_gradients

HEADS = 4
"""Heads at a time, which bounds the memory for their products."""


def strip_of(vectors: Tensor) -> Tensor:
    """`[heads, count + CHUNK, head]` by falling distance, with zeros ahead, from `[heads, count, head]` by distance."""
    return torch.nn.functional.pad(vectors.flip(1), (0, 0, 0, cpu.CHUNK))


class Relative(torch.autograd.Function):
    """Causal attention whose scores gain `turned_i . vectors[i - j]`, `[batch, heads, query, head]`.

    `turned` `[batch, heads, query, head]` is scaled already; `vectors` `[heads, keys, head]` go by distance. The
    queries are the last of the keys.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, turned: Tensor, vectors: Tensor, scaling: float
    ) -> Any:
        output, lse = cpu.empty_outputs(query)
        strip, total, group = strip_of(vectors.detach()), key.shape[2], query.shape[1] // key.shape[1]
        for chunk in cpu.chunks(query.shape[2], total, total):
            width = chunk.place + chunk.rows - 1
            for low in range(0, query.shape[1], HEADS):
                some = slice(low, min(low + HEADS, query.shape[1]))
                shared = [head // group for head in range(some.start, some.stop)]
                along = strip[some, total - chunk.place : total - chunk.place + width].transpose(1, 2)
                term = turned[:, some, chunk.queries].flip(2) @ along
                term[..., chunk.place :] = -math.inf
                mask = term.as_strided(
                    (*term.shape[:3], chunk.place), (term.stride(0), term.stride(1), term.stride(2) + 1, 1)
                )
                made, norm = cpu.attention(
                    query[:, some, chunk.queries].flip(2), key[:, shared, : chunk.place],
                    value[:, shared, : chunk.place], mask, scaling,
                )  # fmt: skip
                output[:, some, chunk.queries], lse[:, some, chunk.queries] = made.flip(2), norm.flip(2)
        ctx.save_for_backward(query, key, value, turned, vectors, output, lse)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, turned, vectors, output, lse = ctx.saved_tensors
        bias = _Term(turned, strip_of(vectors))
        found = materialised_gradients(grads[0], query, key, value, output, lse, ctx.scaling, bias)
        return *found, bias.to_turned, bias.to_strip[:, : key.shape[2]].flip(1), None


class _Term(TileBias):
    def __init__(self, turned: Tensor, strip: Tensor) -> None:
        self.turned, self.strip, self.total = turned, strip, strip.shape[1] - cpu.CHUNK
        self.to_turned, self.to_strip = torch.zeros_like(turned), torch.zeros_like(strip)

    def _sides(self, tile: Tile) -> tuple[Tensor, Tensor]:
        along = slice(tile.begin, tile.begin + tile.width)
        return self.turned[tile.batch, tile.head, tile.queries].flip(0), self.strip[tile.head, along]

    def add(self, scores: Tensor, tile: Tile) -> None:
        turned, along = self._sides(tile)
        term = turned @ along.T
        term[:, max(0, self.total - tile.begin) :] = -math.inf
        scores += diagonals(term, scores.shape[1])

    def take(self, skewed: Tensor, slope: Tensor, tile: Tile) -> None:
        turned, along = self._sides(tile)
        self.to_turned[tile.batch, tile.head, tile.queries] += (skewed @ along).flip(0)
        self.to_strip[tile.head, tile.begin : tile.begin + tile.width].addmm_(skewed.T, turned)
