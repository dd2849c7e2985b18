"""Attention over ranges of distance that differ in encoding: a fused kernel per range, merged by log-sum-exp (LSE).

The gradient is exact, because the backward of each range uses the output and LSE of the whole row, as in ring
attention.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...core.positions import Positions
from ...core.ranges import PositionTransform, Range
from . import cpu


class Block(NamedTuple):
    """The keys of one range that one chunk of queries attends to."""

    keys: slice
    """The smallest slice that contains these keys."""
    mask: Tensor | None
    """Additive mask `[batch | 1, 1, queries, keys]`; None if every query attends to every key of the slice."""
    empty_rows: Tensor | None
    """True for queries without any key, `[batch | 1, 1, queries]`; None if there are none."""


class Layout:
    """The keys that each chunk of queries attends to in each range."""

    def __init__(self, ranges: list[Range], positions: Positions, mask: Tensor | None, dtype: torch.dtype) -> None:
        self.ranges, self.positions, self.mask, self.dtype = ranges, positions, mask, dtype
        self.count, self.total = positions.query.shape[1], positions.key.shape[1]
        self.bounds = [self._bounds(each) for each in ranges] if self._is_sorted() else None

    def _is_sorted(self) -> bool:
        """Return whether the keys of a range are contiguous: no mask, the same sorted positions in all rows."""
        keys = [self.positions.key, *(each.step_key for each in self.ranges if each.step_key is not None)]
        queries = [self.positions.query, *(each.step_query for each in self.ranges if each.step_query is not None)]
        return (
            self.mask is None
            and all(bool((rows == rows[:1]).all()) for rows in (*keys, *queries))
            and all(bool((rows[0].diff() >= 0).all()) for rows in keys)
        )

    def _bounds(self, each: Range) -> tuple[Tensor, Tensor]:
        """Return the first key and the exclusive end of the keys of each query in a range, `[query]` each."""
        query, key = (steps[0].contiguous() for steps in each.steps(self.positions))
        first = torch.zeros_like(query)
        end = torch.arange(self.total - self.count + 1, self.total + 1)
        if each.high is not None:
            first = torch.searchsorted(key, query - each.high, right=True)
        if each.low is not None:
            end = torch.minimum(end, torch.searchsorted(key, query - each.low, right=True))
        if each.below is not None:
            limit = torch.searchsorted(self.positions.key[0].contiguous(), torch.tensor([each.below]))
            end = torch.minimum(end, limit)
        return first, torch.maximum(first, end)

    def reach(self, index: int) -> slice:
        """Return the slice of keys that any query attends to in a range."""
        if self.bounds is None:
            return slice(0, self.total)
        first, end = self.bounds[index]
        has_keys = first < end
        return slice(int(first[has_keys].min()), int(end[has_keys].max())) if bool(has_keys.any()) else slice(0, 0)

    def chunks(self, index: int) -> Iterator[tuple[slice, Block]]:
        """Yield the chunks of queries that attend to any key in a range, with the block of these keys."""
        for start in range(0, self.count, cpu.CHUNK):
            queries = slice(start, min(start + cpu.CHUNK, self.count))
            if self.bounds is None:
                block = self._block_from_pairs(self.ranges[index], queries.start, queries.stop)
            else:
                block = self._block_from_bounds(*(bound[queries] for bound in self.bounds[index]))
            if block is not None:
                yield queries, block

    def _block_from_bounds(self, first: Tensor, end: Tensor) -> Block | None:
        """Return the block of a chunk from the bounds of its queries; None if no query attends to any key."""
        has_keys = first < end
        if not bool(has_keys.any()):
            return None
        low, high = int(first[has_keys].min()), int(end[has_keys].max())
        empty_rows = None if bool(has_keys.all()) else ~has_keys[None, None]
        if empty_rows is None and int(first.max()) == low and int(end.min()) == high:
            return Block(slice(low, high), None, None)
        index = torch.arange(low, high)
        inside = (index >= first[:, None]) & (index < end[:, None])
        return Block(slice(low, high), self._additive(inside)[None, None], empty_rows)

    def _block_from_pairs(self, each: Range, start: int, stop: int) -> Block | None:
        """Return the block of a chunk by testing all pairs; None if no query attends to any key."""
        end = self.total if self.mask is not None else self.total - self.count + stop
        chunk_positions = self.positions._replace(
            query=self.positions.query[:, start:stop], key=self.positions.key[:, :end]
        )
        inside, mask_values = each.slice_pairs(start, stop, end).covers(chunk_positions)[:, None], None
        if self.mask is None:
            inside = inside & torch.ones(stop - start, end, dtype=torch.bool).tril(end - (stop - start))
        elif self.mask.dtype == torch.bool:
            inside = inside & self.mask[:, :, start:stop, :end]
        else:
            mask_values = self.mask[:, :, start:stop, :end]
            inside = inside & (mask_values > cpu.HIDDEN)
        attended = inside.flatten(0, 2).any(0).nonzero()
        if not len(attended):
            return None
        low, high = int(attended[0]), int(attended[-1]) + 1
        inside = inside[..., low:high]
        has_keys, additive = inside.any(-1), self._additive(inside)
        if mask_values is not None:
            additive = additive + mask_values[..., low:high].to(additive.dtype)
        return Block(slice(low, high), additive, None if bool(has_keys.all()) else ~has_keys)

    def _additive(self, inside: Tensor) -> Tensor:
        """Return the additive form of a boolean mask."""
        return torch.zeros(inside.shape, dtype=self.dtype).masked_fill_(~inside, -math.inf)


class Ranges(torch.autograd.Function):
    """Causal attention over ranges. Ranges run one after the other, so only one encoded copy of the keys is in memory.

    Args:
        query: `[batch, heads, query, head]`.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        layout: the keys of each chunk of queries in each range.
        scaling: factor on the dot products.

    Returns:
        The output `[batch, heads, query, head]`, in the memory layout `[batch, query, heads, head]`.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Any:
        output, lse = cpu.empty_outputs(query)
        output.zero_()
        lse.fill_(-math.inf)
        for index, each in enumerate(layout.ranges):
            reach = layout.reach(index)
            encoded_key, origin = _encode_keys(each, key, reach), reach.start
            for queries, block in layout.chunks(index):
                block_output, block_lse = cpu.attention(
                    _encode(_query_encoding(each, queries), query[:, :, queries]),
                    encoded_key[:, :, block.keys.start - origin : block.keys.stop - origin],
                    value[:, :, block.keys], _expand_mask(block.mask, query), scaling,
                )  # fmt: skip
                if block.empty_rows is not None:
                    block_lse = block_lse.masked_fill(block.empty_rows, -math.inf)
                output[:, :, queries], lse[:, :, queries] = cpu.merge(
                    (output[:, :, queries], lse[:, :, queries]), (block_output, block_lse)
                )
        lse.masked_fill_(lse == -math.inf, 0)  # padding, which attends to no key
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scaling = layout, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, output, lse = ctx.saved_tensors
        sums = cpu.Gradients(query, key, value)
        for index, each in enumerate(ctx.layout.ranges):
            reach = ctx.layout.reach(index)
            encoded_key, values = _encode_keys(each, key, reach), value[:, :, reach]
            to_key = sums.sums[1][:, :, reach]
            to_encoded = to_key if each.rotate_key is None else torch.zeros_like(to_key)
            for queries, block in ctx.layout.chunks(index):
                encoding = _query_encoding(each, queries)
                sums.add(
                    queries, slice(block.keys.start - reach.start, block.keys.stop - reach.start),
                    _encode(encoding, query[:, :, queries]), encoded_key, values, output[:, :, queries],
                    lse[:, :, queries], grads[0][:, :, queries], _expand_mask(block.mask, query), ctx.scaling,
                    None if encoding is None else encoding.back, (to_encoded, sums.sums[2][:, :, reach]),
                )  # fmt: skip
            if each.rotate_key is not None:
                for keys in _spans(reach):
                    back = each.rotate_key.slice_tokens(keys.start, keys.stop).back
                    sums.sums[1][:, :, keys] += back(
                        to_encoded[:, :, keys.start - reach.start : keys.stop - reach.start]
                    )
        return *sums.finished(), None, None


def _query_encoding(each: Range, queries: slice) -> PositionTransform | None:
    """Return the encoding of a slice of queries in a range; None if it leaves them unchanged."""
    return None if each.rotate_query is None else each.rotate_query.slice_tokens(queries.start, queries.stop)


def _encode(encoding: PositionTransform | None, x: Tensor) -> Tensor:
    """Apply an encoding to queries or keys."""
    return x if encoding is None else encoding(x)


def _spans(reach: slice) -> Iterator[slice]:
    """Yield consecutive spans of at most `cpu.SPAN` keys."""
    for start in range(reach.start, reach.stop, cpu.SPAN):
        yield slice(start, min(start + cpu.SPAN, reach.stop))


def _encode_keys(each: Range, key: Tensor, reach: slice) -> Tensor:
    """Return the encoded keys that a range reaches, encoded span by span to bound the memory of temporary copies."""
    if each.keys is not None:
        return each.keys[:, :, reach]
    if each.rotate_key is None:
        return key[:, :, reach]
    encoded = torch.empty_like(key[:, :, reach])
    for keys in _spans(reach):
        local = slice(keys.start - reach.start, keys.stop - reach.start)
        encoded[:, :, local] = each.rotate_key.slice_tokens(keys.start, keys.stop)(key[:, :, keys])
    return encoded


def _expand_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Expand a mask to `[batch, heads, queries, keys]` without copying."""
    return None if mask is None else mask.expand(query.shape[0], query.shape[1], -1, -1)


def _layout(ranges: list[Range], positions: Positions, mask: Tensor | None, dtype: torch.dtype) -> Layout:
    """Return the layout of a pass; layers that see the same keys share it, each with its own encodings."""
    if positions.encoded is None:
        return Layout(ranges, positions, mask, dtype)
    bounds = tuple((each.low, each.high, each.below, id(each.step_query), id(each.step_key)) for each in ranges)
    seen = None if mask is None else (mask.data_ptr(), mask.shape)
    name = ("layout", positions.key.shape[1], bounds, seen, dtype)
    shared = positions.encoded.once(name, lambda: Layout(ranges, positions, mask, dtype), *ranges, mask)
    own = copy.copy(shared)
    own.ranges = ranges
    return own


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Positions,
    ranges: list[Range],
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Compute causal attention over ranges, `[batch, query, heads, head]`.

    Args:
        query: `[batch, heads, query, head]`.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        positions: positions of the queries and keys.
        ranges: disjoint ranges of distance with their encodings.
        mask: `[batch | 1, 1, query, key]`, boolean or additive; None for a causal mask.
        scaling: factor on the dot products.
    """
    layout = _layout(ranges, positions, mask, value.dtype)
    output: Any = Ranges.apply(query, key, value, layout, scaling)
    return output.transpose(1, 2)
