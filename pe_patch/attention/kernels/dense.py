"""A bias that goes by the positions of query and key and not by their distance alone, built for a few queries at a
time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .tiles import Tile, TileBias, materialised_gradients

ROWS = 64
"""Queries for which the bias of all heads is held at a time."""

Build = Callable[[Tensor, Tensor], Tensor]
"""The bias `[heads, query, key]` for positions `[query]` and `[key]`."""


def _reversed(build: Build, at: tuple[Tensor, Tensor], queries: slice, place: int) -> Tensor:
    """The bias of some queries, the last one first, -inf ahead of them."""
    made = build(at[0][queries].flip(0), at[1][:place])
    ahead = torch.ones(made.shape[1:], dtype=torch.bool).tril(place - made.shape[1]).logical_not_().flip(0)
    return made.masked_fill_(ahead, -math.inf)


class Dense(torch.autograd.Function):
    """Causal attention with a bias by positions, `[batch, heads, query, head]`; the queries are the last of the keys.

    `at` are the positions `[query]` and `[key]`. `parameters` are all that `build` takes a gradient to.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, at: Any, build: Build, scaling: float, *parameters: Tensor
    ) -> Any:
        output, lse = cpu.empty_outputs(query)
        for chunk in cpu.chunks(query.shape[2], key.shape[2], key.shape[2], ROWS):
            mask = _reversed(build, at, chunk.queries, chunk.place)[None].expand(query.shape[0], -1, -1, -1)
            made, norm = cpu.attention(
                query[:, :, chunk.queries].flip(2), key[:, :, : chunk.place], value[:, :, : chunk.place], mask, scaling
            )
            output[:, :, chunk.queries], lse[:, :, chunk.queries] = made.flip(2), norm.flip(2)
        ctx.save_for_backward(query, key, value, *parameters, output, lse)
        ctx.at, ctx.build, ctx.scaling = at, build, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, *parameters, output, lse = ctx.saved_tensors
        if any(ctx.needs_input_grad[6:]):
            bias = _Built(ctx.at, ctx.build, [one for one in parameters if one.requires_grad])
            found = materialised_gradients(grads[0], query, key, value, output, lse, ctx.scaling, bias)
            learned = (total.to(one.dtype) for total, one in zip(bias.found, bias.parameters, strict=True))
            return *found, None, None, None, *(next(learned) if one.requires_grad else None for one in parameters)
        into = cpu.Gradients(query, key, value)
        for chunk in cpu.chunks(query.shape[2], key.shape[2], key.shape[2], ROWS):
            mask = _reversed(ctx.build, ctx.at, chunk.queries, chunk.place)[None].expand(query.shape[0], -1, -1, -1)
            into.add_reversed(chunk, grads[0], query, key, value, output, lse, mask, ctx.scaling)
        return *into.finished(), None, None, None, *(None for _ in parameters)


class _Built(TileBias):
    rows = ROWS

    def __init__(self, at: Any, build: Build, parameters: list[Tensor]) -> None:
        self.at, self.build, self.parameters = at, build, parameters
        self.found = [torch.zeros(one.shape, dtype=torch.promote_types(one.dtype, torch.float32)) for one in parameters]

    def begin(self, queries: slice, place: int) -> None:
        with torch.enable_grad():
            self.made = _reversed(self.build, self.at, queries, place)
        self.grad = torch.zeros_like(self.made)

    def add(self, scores: Tensor, tile: Tile) -> None:
        scores += self.made.detach()[tile.head, :, tile.keys]

    def take(self, skewed: Tensor, slope: Tensor, tile: Tile) -> None:
        self.grad[tile.head, :, tile.keys] += slope.sum(0)

    def end(self, queries: slice, place: int) -> None:
        found = torch.autograd.grad(self.made, self.parameters, self.grad, allow_unused=True)
        self.made = self.grad = torch.empty(0)
        for total, part in zip(self.found, found, strict=True):
            if part is not None:
                total += part
