"""Gradients through scores that are built, a tile at a time: for biases that need the scores' own gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 256
SPAN = 1024
"""Queries and keys of a tile, which stays in a engine's share of the cache."""
PAIRS = ROWS * SPAN
"""Pairs of a query and a key in a tile, at most: of short sequences several go into one, so that many of them cost no
more calls than a long one does."""


class Tile(NamedTuple):
    """Some queries of one head in some sequences, the last query first, over some of their keys."""

    batch: slice
    head: int
    queries: slice
    keys: slice
    begin: int
    """Where the tile's first diagonal lies in a strip by falling distance."""
    width: int
    """How many diagonals the tile has, rows + keys - 1."""


class TileBias:
    """A bias that is added to one tile, and what it makes of the scores' gradient."""

    rows = ROWS
    """Queries at a time."""
    shift: Tensor | None = None
    """What the queries of each head gain before they meet keys, `[heads, head]`."""

    def begin(self, queries: slice, place: int) -> None:
        """Called before the tiles of some queries, over the keys up to `place`."""

    def add(self, scores: Tensor, tile: Tile) -> None:
        """Add to the scaled scores `[sequences, rows, keys]` in place; -inf ahead of a query."""
        raise NotImplementedError

    def take(self, skewed: Tensor, slope: Tensor, tile: Tile) -> Tensor | None:
        """Take the scores' gradient: `skewed` `[sequences, rows, width]` has one diagonal of the tile in each column,
        and `slope` `[sequences, rows, keys]` is the tile, a view of it. What the gradient of the queries gains,
        `[sequences, rows, head]`, or None."""
        raise NotImplementedError

    def end(self, queries: slice, place: int) -> None:
        """Called after the tiles of some queries."""


def diagonals(skewed: Tensor, keys: int) -> Tensor:
    """The tiles `[sequences, rows, keys]` of which `skewed` `[sequences, rows, rows + keys - 1]` has the diagonals as
    columns; a view."""
    sequences, rows, width = skewed.shape
    return skewed.as_strided((sequences, rows, keys), (rows * width, width + 1, 1), skewed.storage_offset())


def materialised_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scaling: float, bias: TileBias
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value of a causal attention whose queries are the last of the keys."""
    batch, heads, count, _ = query.shape
    total, group = key.shape[2], heads // key.shape[1]
    precise = torch.promote_types(query.dtype, torch.float32)
    sides = (query, key, value)
    found = tuple(torch.zeros(one.shape, dtype=precise) for one in sides)
    grad, query, key, value, output = (one.to(precise) for one in (grad, query, key, value, output))
    tall, broad = min(bias.rows, count), min(SPAN, total)
    many = min(batch, max(1, PAIRS // (tall * broad)))
    room = [torch.empty(many * tall * (broad + extra), dtype=precise) for extra in (0, 0, tall)]
    for start in range(0, count, bias.rows):
        here = slice(start, min(start + bias.rows, count))
        rows, place = here.stop - start, total - count + here.stop
        bias.begin(here, place)
        for first, head in ((first, head) for first in range(0, batch, many) for head in range(heads)):
            some = slice(first, min(first + many, batch))
            keys, values = key[some, head // group], value[some, head // group]
            to_key, to_value = found[1][some, head // group], found[2][some, head // group]
            own, above, made = (one[some, head, here].flip(1) for one in (query, grad, output))
            own = own if bias.shift is None else own + bias.shift[head]
            scaled, norm = own * scaling, lse[some, head, here].flip(1)[..., None]
            delta = (above * made).sum(-1, keepdim=True)
            into = torch.zeros_like(own)
            for low in range(0, place, SPAN):
                there = slice(low, min(low + SPAN, place))
                span, sequences = there.stop - low, some.stop - first
                tile = Tile(some, head, here, there, total - place + low, span + rows - 1)
                scores, change = (one[: sequences * rows * span].view(sequences, rows, span) for one in room[:2])
                torch.bmm(scaled, keys[:, there].mT, out=scores)
                bias.add(scores, tile)
                weights = scores.sub_(norm).exp_()
                torch.bmm(above, values[:, there].mT, out=change)
                change.sub_(delta)
                skewed = room[2][: sequences * rows * tile.width].view(sequences, rows, tile.width).zero_()
                slope = diagonals(skewed, span)
                torch.mul(weights, change, out=slope)
                into.baddbmm_(slope, keys[:, there], alpha=scaling)
                to_key[:, there].baddbmm_(slope.mT, scaled)
                to_value[:, there].baddbmm_(weights.mT, above)
                more = bias.take(skewed, slope, tile)
                if more is not None:
                    into += more
            found[0][some, head, here] = into.flip(1)
        bias.end(here, place)
    return tuple(one.to(like.dtype) for one, like in zip(found, sides, strict=True))
