"""Causal attention with a bias that depends on both positions, not on their distance alone.

The bias is built in blocks of `ROWS` queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .tiles import Tile, TileBias, materialized_gradients

ROWS = 64
"""Queries in a block of the bias, which covers all heads."""

BiasBlock = Callable[[Tensor, Tensor], Tensor]
"""A function of positions `[query]` and `[key]` that returns the bias `[heads, query, key]`."""


def _reversed_block(bias_block: BiasBlock, at: tuple[Tensor, Tensor], queries: slice, end: int) -> Tensor:
    """Return the bias of some queries over the keys up to `end`, the last query first, with -inf for future keys."""
    block = bias_block(at[0][queries].flip(0), at[1][:end])
    future = torch.ones(block.shape[1:], dtype=torch.bool).tril(end - block.shape[1]).logical_not_().flip(0)
    return block.masked_fill_(future, -math.inf)


class Dense(torch.autograd.Function):
    """Causal attention with a bias that depends on both positions; the queries are the last of the keys.

    Args:
        query: `[batch, heads, query, head]`.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        at: the positions `[query]` and `[key]`.
        bias_block: returns the bias for positions.
        scaling: factor on the dot products.
        parameters: every tensor used by `bias_block` that may need a gradient.

    Returns:
        The output `[batch, heads, query, head]`.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, at: Any, bias_block: BiasBlock, scaling: float,
        *parameters: Tensor,
    ) -> Any:  # fmt: skip
        output, lse = cpu.empty_outputs(query)
        for chunk in cpu.chunks(query.shape[2], key.shape[2], key.shape[2], ROWS):
            mask = _reversed_block(bias_block, at, chunk.queries, chunk.end)[None].expand(query.shape[0], -1, -1, -1)
            chunk_output, chunk_lse = cpu.attention(
                query[:, :, chunk.queries].flip(2), key[:, :, : chunk.end], value[:, :, : chunk.end], mask, scaling
            )
            output[:, :, chunk.queries], lse[:, :, chunk.queries] = chunk_output.flip(2), chunk_lse.flip(2)
        ctx.save_for_backward(query, key, value, *parameters, output, lse)
        ctx.at, ctx.bias_block, ctx.scaling = at, bias_block, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, *parameters, output, lse = ctx.saved_tensors
        if any(ctx.needs_input_grad[6:]):
            bias = _BlockBias(ctx.at, ctx.bias_block, [tensor for tensor in parameters if tensor.requires_grad])
            input_grads = materialized_gradients(grads[0], query, key, value, output, lse, ctx.scaling, bias)
            learned = (total.to(tensor.dtype) for total, tensor in zip(bias.sums, bias.parameters, strict=True))
            parameter_grads = (next(learned) if tensor.requires_grad else None for tensor in parameters)
            return *input_grads, None, None, None, *parameter_grads
        sums = cpu.Gradients(query, key, value)
        for chunk in cpu.chunks(query.shape[2], key.shape[2], key.shape[2], ROWS):
            block = _reversed_block(ctx.bias_block, ctx.at, chunk.queries, chunk.end)
            mask = block[None].expand(query.shape[0], -1, -1, -1)
            sums.add_reversed(chunk, grads[0], query, key, value, output, lse, mask, ctx.scaling)
        return *sums.finished(), None, None, None, *(None for _ in parameters)


class _BlockBias(TileBias):
    """Add blocks of the bias, and accumulate the gradients of its parameters."""

    rows = ROWS

    def __init__(self, at: Any, bias_block: BiasBlock, parameters: list[Tensor]) -> None:
        self.at, self.bias_block, self.parameters = at, bias_block, parameters
        self.sums = [
            torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in parameters
        ]

    def begin(self, queries: slice, end: int) -> None:
        with torch.enable_grad():
            self.block = _reversed_block(self.bias_block, self.at, queries, end)
        self.grad = torch.zeros_like(self.block)

    def add(self, scores: Tensor, tile: Tile) -> None:
        scores += self.block.detach()[tile.head, :, tile.keys]

    def accumulate(self, skewed: Tensor, score_grad: Tensor, tile: Tile) -> None:
        self.grad[tile.head, :, tile.keys] += score_grad.sum(0)

    def finish(self, queries: slice, end: int) -> None:
        block_grads = torch.autograd.grad(self.block, self.parameters, self.grad, allow_unused=True)
        self.block = self.grad = torch.empty(0)
        for total, block_grad in zip(self.sums, block_grads, strict=True):
            if block_grad is not None:
                total += block_grad
