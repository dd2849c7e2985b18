"""A network of one number through rectified units, for every pair of a query and a key and at little cost.

Over a block of pairs that number hardly changes, so that nearly every unit is either idle or linear throughout. The
linear ones sum up to one line for each head, and what is left to compute for each pair is the line and the few units
that have their knot within the block. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, COLUMNS = 256, 256
"""Queries and keys of a block: what eight heads make of it stays in a engine's share of the cache."""


def _blocks(queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, queries, ROWS):
        for column in range(0, keys, COLUMNS):
            yield slice(row, min(row + ROWS, queries)), slice(column, min(column + COLUMNS, keys))


def _distance(query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """|i - j|, `[query, key]`; integers up to 2^24 are exact in float32."""
    return (query.to(dtype)[:, None] - key.to(dtype)).abs_()


def _relative(query: Tensor, key: Tensor, c: Tensor, denominator: Tensor) -> Tensor:
    """ln(|c| |i - j| + 1) over the query's denominator, `[query, key]`."""
    return _distance(query, key, denominator.dtype).mul_(c.abs()).log1p_().div_(denominator[:, None])


class _Units(NamedTuple):
    """What the hidden units do over a block whose numbers are z `[1, pairs]`."""

    z: Tensor
    linear: Tensor
    """1 for a unit that is above zero throughout, else 0; `[units]`."""
    bent: Tensor
    """Indices of the units with their knot inside."""

    @staticmethod
    def over(block: Tensor, weight: Tensor, bias: Tensor) -> _Units:
        z = block.reshape(1, -1)
        ends = torch.stack(torch.aminmax(z))[:, None] * weight + bias
        above = ends > 0
        return _Units(z, above.all(0).to(z.dtype), (above[0] != above[1]).nonzero()[:, 0])

    def line(self, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> Tensor:
        """The constant and the slope that the linear units sum up to, `[heads, 2]`."""
        return weight_out @ (self.linear[:, None] * torch.stack((bias_in, weight_in), 1))

    def before(self, weight_in: Tensor, bias_in: Tensor) -> Tensor:
        """The bent units before they are rectified, `[bent, pairs]`."""
        return torch.addcmul(bias_in[self.bent, None], weight_in[self.bent, None], self.z)


class Network(torch.autograd.Function):
    """FIRE's bias for positions `[query]` and `[key]`, `[heads, query, key]`; made again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        c: Tensor,
        denominator: Tensor,
        weight_in: Tensor,
        bias_in: Tensor,
        weight_out: Tensor,
        bias_out: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(query, key, c, denominator, weight_in, bias_in, weight_out)
        relative = _relative(query, key, c, denominator)
        output = relative.new_empty(weight_out.shape[0], *relative.shape)
        for block in _blocks(*relative.shape):
            units = _Units.over(relative[block], weight_in, bias_in)
            line = units.line(weight_in, bias_in, weight_out)
            terms = torch.cat((units.z, units.before(weight_in, bias_in).relu_()))
            factors = torch.cat((line[:, 1:], weight_out[:, units.bent]), 1)
            made = torch.addmm((line[:, 0] + bias_out)[:, None], factors, terms)
            output[:, block[0], block[1]] = made.view(-1, *relative[block].shape)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, c, denominator, weight_in, bias_in, weight_out = ctx.saved_tensors
        relative = _relative(query, key, c, denominator)
        to_relative = torch.empty_like(relative)
        # For each head and unit the gradient and the gradient times z, summed over the pairs where the unit is on.
        sums = relative.new_zeros(2, *weight_out.shape)
        plain = relative.new_zeros(weight_out.shape[0])
        for block in _blocks(*relative.shape):
            units = _Units.over(relative[block], weight_in, bias_in)
            above = grads[0][:, block[0], block[1]].reshape(weight_out.shape[0], -1)
            on = (units.before(weight_in, bias_in) > 0).to(units.z.dtype)
            weights = torch.cat((torch.ones_like(units.z), units.z, on, on * units.z))
            found = above @ weights.T
            plain += found[:, 0]
            sums += found[:, :2].T[:, :, None] * units.linear
            sums[:, :, units.bent] += found[:, 2:].unflatten(1, (2, -1)).transpose(0, 1)
            line = units.line(weight_in, bias_in, weight_out)
            change = torch.cat((line[:, 1:], weight_out[:, units.bent] * weight_in[units.bent]), 1).T @ above
            to_relative[block] = (change[0] + (change[1:] * on).sum(0)).view(relative[block].shape)
        to_denominator = -relative.mul_(to_relative).sum(1) / denominator
        distance = _distance(query, key, relative.dtype)
        slope = distance / (distance * c.abs()).add_(1)  # of ln(|c| x + 1) in |c|
        to_c = (slope.mul_(to_relative).sum(1) / denominator).sum() * c.sign()
        to_bias, to_weight = (sums * weight_out).sum(1)
        to_out = sums[0] * bias_in + sums[1] * weight_in
        return None, None, to_c, to_denominator, to_weight, to_bias, to_out, plain
