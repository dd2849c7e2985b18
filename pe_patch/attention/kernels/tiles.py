"""Gradients of causal attention that materialize the scores tile by tile, for biases that need the scores' gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 256
"""Queries in a tile."""
SPAN = 1024
"""Keys in a tile. A tile of this size fits into the cache of one CPU core."""
PAIRS = ROWS * SPAN
"""Maximum number of query-key pairs in a tile. A tile takes several short sequences, to save kernel calls."""


class Tile(NamedTuple):
    """A block of scores: queries of one head in some sequences, the last query first, over some of their keys."""

    batch: slice
    """The sequences."""
    head: int
    """The query head."""
    queries: slice
    """The queries."""
    keys: slice
    """The keys."""
    begin: int
    """Index of the tile's first diagonal in a strip by decreasing distance."""
    width: int
    """Number of diagonals of the tile, rows + keys - 1."""


class TileBias:
    """A bias that is added to the scores tile by tile, and receives their gradient."""

    rows = ROWS
    """Queries in a tile."""
    shift: Tensor | None = None
    """`[heads, head]`, added to the queries before the product with keys; None for nothing."""

    def begin(self, queries: slice, end: int) -> None:
        """Prepare for the tiles of a slice of queries over the keys up to `end`."""

    def add(self, scores: Tensor, tile: Tile) -> None:
        """Add the bias to the scaled scores `[sequences, rows, keys]` in place, with -inf for future keys."""
        raise NotImplementedError

    def accumulate(self, skewed: Tensor, score_grad: Tensor, tile: Tile) -> Tensor | None:
        """Accumulate the gradient of the bias from the scores' gradient.

        Args:
            skewed: `[sequences, rows, width]`, with one diagonal of the tile in each column.
            score_grad: `[sequences, rows, keys]`, the tile itself, a view of `skewed`.
            tile: the tile.

        Returns:
            A term `[sequences, rows, head]` of the gradient of the queries, or None.
        """
        raise NotImplementedError

    def finish(self, queries: slice, end: int) -> None:
        """Finish the tiles of a slice of queries."""


def diagonals(skewed: Tensor, keys: int) -> Tensor:
    """Return the tiles whose diagonals are the columns of `skewed`, as a view.

    Args:
        skewed: `[sequences, rows, rows + keys - 1]`, contiguous.
        keys: number of keys of a tile.

    Returns:
        `[sequences, rows, keys]`.
    """
    sequences, rows, width = skewed.shape
    return skewed.as_strided((sequences, rows, keys), (rows * width, width + 1, 1), skewed.storage_offset())


def materialized_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scaling: float, bias: TileBias
) -> tuple[Tensor, ...]:
    """Compute the gradients of query, key and value of causal attention whose queries are the last of the keys.

    Args:
        grad: gradient of the output `[batch, heads, query, head]`.
        query: `[batch, heads, query, head]`.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        output: `[batch, heads, query, head]`.
        lse: log-sum-exp of the scores `[batch, heads, query]`.
        scaling: factor on the dot products.
        bias: the bias, which accumulates its own gradient.
    """
    batch, heads, count, _ = query.shape
    total, group = key.shape[2], heads // key.shape[1]
    precise = torch.promote_types(query.dtype, torch.float32)
    inputs = (query, key, value)
    grads = tuple(torch.zeros(tensor.shape, dtype=precise) for tensor in inputs)
    grad, query, key, value, output = (tensor.to(precise) for tensor in (grad, query, key, value, output))
    max_rows, max_span = min(bias.rows, count), min(SPAN, total)
    max_sequences = min(batch, max(1, PAIRS // (max_rows * max_span)))
    buffers = [torch.empty(max_sequences * max_rows * (max_span + extra), dtype=precise) for extra in (0, 0, max_rows)]
    for start in range(0, count, bias.rows):
        queries = slice(start, min(start + bias.rows, count))
        rows, end = queries.stop - start, total - count + queries.stop
        bias.begin(queries, end)
        for first, head in ((first, head) for first in range(0, batch, max_sequences) for head in range(heads)):
            some = slice(first, min(first + max_sequences, batch))
            tile_key, tile_value = key[some, head // group], value[some, head // group]
            to_key, to_value = grads[1][some, head // group], grads[2][some, head // group]
            tile_query, tile_grad, tile_output = (
                tensor[some, head, queries].flip(1) for tensor in (query, grad, output)
            )
            if bias.shift is not None:
                tile_query = tile_query + bias.shift[head]
            scaled_query, tile_lse = tile_query * scaling, lse[some, head, queries].flip(1)[..., None]
            delta = (tile_grad * tile_output).sum(-1, keepdim=True)
            to_query = torch.zeros_like(tile_query)
            for low in range(0, end, SPAN):
                keys = slice(low, min(low + SPAN, end))
                span, sequences = keys.stop - low, some.stop - first
                tile = Tile(some, head, queries, keys, total - end + low, span + rows - 1)
                scores, weight_grad = (
                    buffer[: sequences * rows * span].view(sequences, rows, span) for buffer in buffers[:2]
                )
                torch.bmm(scaled_query, tile_key[:, keys].mT, out=scores)
                bias.add(scores, tile)
                weights = scores.sub_(tile_lse).exp_()
                torch.bmm(tile_grad, tile_value[:, keys].mT, out=weight_grad)
                weight_grad.sub_(delta)
                skewed = buffers[2][: sequences * rows * tile.width].view(sequences, rows, tile.width).zero_()
                score_grad = diagonals(skewed, span)
                torch.mul(weights, weight_grad, out=score_grad)
                to_query.baddbmm_(score_grad, tile_key[:, keys], alpha=scaling)
                to_key[:, keys].baddbmm_(score_grad.mT, scaled_query)
                to_value[:, keys].baddbmm_(weights.mT, tile_grad)
                term = bias.accumulate(skewed, score_grad, tile)
                if term is not None:
                    to_query += term
            grads[0][some, head, queries] = to_query.flip(1)
        bias.finish(queries, end)
    return tuple(total_grad.to(tensor.dtype) for total_grad, tensor in zip(grads, inputs, strict=True))
