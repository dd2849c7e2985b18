"""Several encodings under one softmax: a fused kernel for each range of pairs, joined by their log-sum-exps.

The gradient is exact because each range's backward is given output and log-sum-exp of the whole row, as in ring
attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...core.positions import Positions
from ...core.ranges import Range, Turn
from . import cpu


class Part(NamedTuple):
    """What one range has of one chunk of queries."""

    keys: slice
    mask: Tensor | None
    """`[batch | 1, 1, queries, keys]`, float; None where every query sees every key."""
    blind: Tensor | None
    """Queries that see no key, `[batch | 1, 1, queries]`; None where there are none."""


class Layout:
    """Which keys each chunk of queries meets in each range."""

    def __init__(self, ranges: list[Range], positions: Positions, mask: Tensor | None, dtype: torch.dtype) -> None:
        self.ranges, self.positions, self.mask, self.dtype = ranges, positions, mask, dtype
        self.count, self.total = positions.query.shape[1], positions.key.shape[1]
        self.bounds = [self._bounds(one) for one in ranges] if self._in_order() else None

    def _in_order(self) -> bool:
        """Whether the keys of a range lie side by side: one row of positions for all, rising, and no mask."""
        at = [self.positions.key, *(one.step_key for one in self.ranges if one.step_key is not None)]
        rows = [*at, self.positions.query, *(one.step_query for one in self.ranges if one.step_query is not None)]
        return (
            self.mask is None
            and all(bool((one == one[:1]).all()) for one in rows)
            and all(bool((one[0].diff() >= 0).all()) for one in at)
        )

    def _bounds(self, one: Range) -> tuple[Tensor, Tensor]:
        """First key and end of the keys of each query, `[query]` each."""
        query, key = (steps[0].contiguous() for steps in one.steps(self.positions))
        first = torch.zeros_like(query)
        end = torch.arange(self.total - self.count + 1, self.total + 1)
        if one.high is not None:
            first = torch.searchsorted(key, query - one.high, right=True)
        if one.low is not None:
            end = torch.minimum(end, torch.searchsorted(key, query - one.low, right=True))
        if one.below is not None:
            limit = torch.searchsorted(self.positions.key[0].contiguous(), torch.tensor([one.below]))
            end = torch.minimum(end, limit)
        return first, torch.maximum(first, end)

    def reach(self, index: int) -> slice:
        """From which key to which any query looks in a range."""
        if self.bounds is None:
            return slice(0, self.total)
        first, end = self.bounds[index]
        seeing = first < end
        return slice(int(first[seeing].min()), int(end[seeing].max())) if bool(seeing.any()) else slice(0, 0)

    def chunks(self, index: int) -> Iterator[tuple[slice, Part]]:
        """Chunks of queries that meet any key in a range, and what they have of it."""
        for start in range(0, self.count, cpu.CHUNK):
            here = slice(start, min(start + cpu.CHUNK, self.count))
            if self.bounds is None:
                part = self._searched(self.ranges[index], here.start, here.stop)
            else:
                part = self._bounded(*(bound[here] for bound in self.bounds[index]))
            if part is not None:
                yield here, part

    def _bounded(self, first: Tensor, end: Tensor) -> Part | None:
        seeing = first < end
        if not bool(seeing.any()):
            return None
        low, high = int(first[seeing].min()), int(end[seeing].max())
        blind = None if bool(seeing.all()) else ~seeing[None, None]
        if blind is None and int(first.max()) == low and int(end.min()) == high:
            return Part(slice(low, high), None, None)
        place = torch.arange(low, high)
        inside = (place >= first[:, None]) & (place < end[:, None])
        return Part(slice(low, high), self._additive(inside)[None, None], blind)

    def _searched(self, one: Range, start: int, stop: int) -> Part | None:
        end = self.total if self.mask is not None else self.total - self.count + stop
        seen = self.positions._replace(query=self.positions.query[:, start:stop], key=self.positions.key[:, :end])
        inside, more = one.part(start, stop, end).covers(seen)[:, None], None
        if self.mask is None:
            inside = inside & torch.ones(stop - start, end, dtype=torch.bool).tril(end - (stop - start))
        elif self.mask.dtype == torch.bool:
            inside = inside & self.mask[:, :, start:stop, :end]
        else:
            more = self.mask[:, :, start:stop, :end]
            inside = inside & (more > cpu.HIDDEN)
        met = inside.flatten(0, 2).any(0).nonzero()
        if not len(met):
            return None
        low, high = int(met[0]), int(met[-1]) + 1
        inside = inside[..., low:high]
        seeing, additive = inside.any(-1), self._additive(inside)
        if more is not None:
            additive = additive + more[..., low:high].to(additive.dtype)
        return Part(slice(low, high), additive, None if bool(seeing.all()) else ~seeing)

    def _additive(self, inside: Tensor) -> Tensor:
        return torch.zeros(inside.shape, dtype=self.dtype).masked_fill_(~inside, -math.inf)


class Ranges(torch.autograd.Function):
    """Attention over ranges, `[batch, heads, query, head]`, laid out query before heads.

    One range after the other, so that no more than one turned copy of the keys is held.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Any:
        output, lse = cpu.empty_outputs(query)
        output.zero_()
        lse.fill_(-math.inf)
        for index, one in enumerate(layout.ranges):
            reach = layout.reach(index)
            turned, origin = _turned_keys(one, key, reach), reach.start
            for here, part in layout.chunks(index):
                made, norm = cpu.attention(
                    _turned(_part(one, here), query[:, :, here]),
                    turned[:, :, part.keys.start - origin : part.keys.stop - origin],
                    value[:, :, part.keys], _spread(part.mask, query), scaling,
                )  # fmt: skip
                if part.blind is not None:
                    norm = norm.masked_fill(part.blind, -math.inf)
                output[:, :, here], lse[:, :, here] = cpu.merge((output[:, :, here], lse[:, :, here]), (made, norm))
        lse.masked_fill_(lse == -math.inf, 0)  # padding, which sees nothing at all
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scaling = layout, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, output, lse = ctx.saved_tensors
        into = cpu.Gradients(query, key, value)
        for index, one in enumerate(ctx.layout.ranges):
            reach = ctx.layout.reach(index)
            turned, values = _turned_keys(one, key, reach), value[:, :, reach]
            to_key = into.sums[1][:, :, reach]
            to_turned = to_key if one.turn_key is None else torch.zeros_like(to_key)
            for here, part in ctx.layout.chunks(index):
                turn = _part(one, here)
                into.add(
                    here, slice(part.keys.start - reach.start, part.keys.stop - reach.start),
                    _turned(turn, query[:, :, here]), turned, values, output[:, :, here], lse[:, :, here],
                    grads[0][:, :, here], _spread(part.mask, query), ctx.scaling, None if turn is None else turn.back,
                    (to_turned, into.sums[2][:, :, reach]),
                )  # fmt: skip
            if one.turn_key is not None:
                for there in _blocks(reach):
                    back = one.turn_key.part(there.start, there.stop).back
                    into.sums[1][:, :, there] += back(
                        to_turned[:, :, there.start - reach.start : there.stop - reach.start]
                    )
        return *into.finished(), None, None


def _part(one: Range, here: slice) -> Turn | None:
    return None if one.turn_query is None else one.turn_query.part(here.start, here.stop)


def _turned(turn: Turn | None, x: Tensor) -> Tensor:
    return x if turn is None else turn(x)


def _blocks(reach: slice) -> Iterator[slice]:
    for start in range(reach.start, reach.stop, cpu.SPAN):
        yield slice(start, min(start + cpu.SPAN, reach.stop))


def _turned_keys(one: Range, key: Tensor, reach: slice) -> Tensor:
    """The keys that a range reaches, as it sees them; turned a few at a time, since turning takes several times their
    room."""
    if one.turn_key is None:
        return key[:, :, reach]
    turned = torch.empty_like(key[:, :, reach])
    for here in _blocks(reach):
        there = slice(here.start - reach.start, here.stop - reach.start)
        turned[:, :, there] = one.turn_key.part(here.start, here.stop)(key[:, :, here])
    return turned


def _spread(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(query.shape[0], query.shape[1], -1, -1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Positions,
    ranges: list[Range],
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Causal attention over ranges, `[batch, query, heads, head]`."""
    layout = Layout(ranges, positions, mask, value.dtype)
    output: Any = Ranges.apply(query, key, value, layout, scaling)
    return output.transpose(1, 2)
