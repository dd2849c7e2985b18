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

from ..positions import Positions
from ..ranges import Range
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

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, Part]]:
        """The ranges in which the queries `start` to `stop` meet any key, by their index."""
        for index, one in enumerate(self.ranges):
            if self.bounds is None:
                part = self._searched(one, start, stop)
            else:
                part = self._bounded(*(bound[start:stop] for bound in self.bounds[index]))
            if part is not None:
                yield index, part

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
        inside = one.part(start, stop, end).covers(seen)[:, None]
        if self.mask is None:
            inside = inside & torch.ones(stop - start, end, dtype=torch.bool).tril(end - (stop - start))
        else:
            mask = self.mask[:, :, start:stop, :end]
            inside = inside & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)
        met = inside.flatten(0, 2).any(0).nonzero()
        if not len(met):
            return None
        low, high = int(met[0]), int(met[-1]) + 1
        inside = inside[..., low:high]
        seeing = inside.any(-1)
        return Part(slice(low, high), self._additive(inside), None if bool(seeing.all()) else ~seeing)

    def _additive(self, inside: Tensor) -> Tensor:
        return torch.zeros(inside.shape, dtype=self.dtype).masked_fill_(~inside, -math.inf)


class Ranges(torch.autograd.Function):
    """Attention over ranges, `[batch, heads, query, head]`, laid out query before heads.

    `tensors` are a query and a key for each range, each distinct tensor once; `roles` says which belongs where.
    """

    @staticmethod
    def forward(ctx: Any, layout: Layout, scaling: float, roles: Any, value: Tensor, *tensors: Tensor) -> Any:
        output, lse = cpu.empty_outputs(tensors[roles[0][0]])
        for start in range(0, layout.count, cpu.CHUNK):
            here = slice(start, min(start + cpu.CHUNK, layout.count))
            merged = None
            for index, part in layout.parts(here.start, here.stop):
                query, key = (tensors[role] for role in roles[index])
                made, norm = cpu.attention(
                    query[:, :, here], key[:, :, part.keys], value[:, :, part.keys], _spread(part.mask, query), scaling
                )
                if part.blind is not None:
                    norm = norm.masked_fill(part.blind, -math.inf)
                merged = (made, norm) if merged is None else cpu.merge(merged, (made, norm))
            if merged is None:
                output[:, :, here], lse[:, :, here] = 0, 0
                continue
            lost = merged[1] == -math.inf  # padding, which sees nothing at all
            output[:, :, here] = merged[0].masked_fill(lost[..., None], 0)
            lse[:, :, here] = merged[1].masked_fill(lost, 0)
        ctx.save_for_backward(value, *tensors, output, lse)
        ctx.layout, ctx.scaling, ctx.roles = layout, scaling, roles
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        value, *tensors, output, lse = ctx.saved_tensors
        into = [torch.zeros(one.shape, dtype=torch.promote_types(one.dtype, torch.float32)) for one in tensors]
        to_value = torch.zeros(value.shape, dtype=into[0].dtype)
        for start in range(0, ctx.layout.count, cpu.CHUNK):
            here = slice(start, min(start + cpu.CHUNK, ctx.layout.count))
            for index, part in ctx.layout.parts(here.start, here.stop):
                query, key = (tensors[role] for role in ctx.roles[index])
                found = cpu.gradients(
                    grads[0][:, :, here], query[:, :, here], key[:, :, part.keys], value[:, :, part.keys],
                    output[:, :, here], lse[:, :, here], _spread(part.mask, query), ctx.scaling,
                )  # fmt: skip
                into[ctx.roles[index][0]][:, :, here] += found[0]
                into[ctx.roles[index][1]][:, :, part.keys] += found[1]
                to_value[:, :, part.keys] += found[2]
        changes = (total.to(one.dtype) for total, one in zip(into, tensors, strict=True))
        return None, None, None, to_value.to(value.dtype), *changes


def _spread(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(query.shape[0], query.shape[1], -1, -1)


def attention(ranges: list[Range], value: Tensor, positions: Positions, mask: Tensor | None, scaling: float) -> Tensor:
    """Causal attention over ranges, `[batch, query, heads, head]`."""
    tensors: list[Tensor] = []
    places: dict[int, int] = {}
    for tensor in (side for one in ranges for side in (one.query, one.key)):
        if id(tensor) not in places:
            places[id(tensor)] = len(tensors)
            tensors.append(tensor)
    roles = [(places[id(one.query)], places[id(one.key)]) for one in ranges]
    layout = Layout(ranges, positions, mask, value.dtype)
    return Ranges.apply(layout, scaling, roles, value, *tensors).transpose(1, 2)
