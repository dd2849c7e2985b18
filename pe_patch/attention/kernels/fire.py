"""FIRE's bias, a two-layer ReLU network of one scalar for each query-key pair, computed exactly and in little memory.

The scalar varies little over a block of pairs, so nearly every hidden unit is either zero or linear throughout. The
linear units sum to one line for each head. What remains for each pair is that line and the few units that cross zero
within the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, COLUMNS = 256, 256
"""Queries and keys of a block. The intermediate results of eight heads fit into the cache of one CPU core."""


def _blocks(queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks of a `[queries, keys]` matrix as slices of rows and columns."""
    for row in range(0, queries, ROWS):
        for column in range(0, keys, COLUMNS):
            yield slice(row, min(row + ROWS, queries)), slice(column, min(column + COLUMNS, keys))


def _distance(query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """Return |i - j|, `[query, key]`; integers up to 2^24 are exact in float32."""
    return (query.to(dtype)[:, None] - key.to(dtype)).abs_()


def _relative(query: Tensor, key: Tensor, c: Tensor, denominator: Tensor) -> Tensor:
    """Return ln(|c| |i - j| + 1) divided by the query's denominator, `[query, key]`."""
    return _distance(query, key, denominator.dtype).mul_(c.abs()).log1p_().div_(denominator[:, None])


class _Units(NamedTuple):
    """The state of the hidden units over a block."""

    z: Tensor
    """The network's input for each pair, `[1, pairs]`."""
    linear: Tensor
    """1 for a unit that is positive over the whole block, else 0; `[units]`."""
    crossing: Tensor
    """Indices of the units that cross zero within the block."""

    @staticmethod
    def over(block: Tensor, weight: Tensor, bias: Tensor) -> _Units:
        """Classify the units by their values at the smallest and largest input of a block."""
        z = block.reshape(1, -1)
        ends = torch.stack(torch.aminmax(z))[:, None] * weight + bias
        above = ends > 0
        return _Units(z, above.all(0).to(z.dtype), (above[0] != above[1]).nonzero()[:, 0])

    def line(self, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> Tensor:
        """Return the intercept and slope of the sum of the linear units, `[heads, 2]`."""
        return weight_out @ (self.linear[:, None] * torch.stack((bias_in, weight_in), 1))

    def preactivations(self, weight_in: Tensor, bias_in: Tensor) -> Tensor:
        """Return the crossing units before ReLU, `[crossing, pairs]`."""
        return torch.addcmul(bias_in[self.crossing, None], weight_in[self.crossing, None], self.z)


class Network(torch.autograd.Function):
    """FIRE's bias, which backward recomputes.

    Args:
        query: positions `[query]`.
        key: positions `[key]`.
        c: the scalar c of psi(x) = ln(|c| x + 1).
        denominator: the normalizer of each query, `[query]`.
        weight_in: `[units]`.
        bias_in: `[units]`.
        weight_out: `[heads, units]`.
        bias_out: `[heads]`.

    Returns:
        The bias `[heads, query, key]`.

    Source: Li et al. 2023, arXiv 2310.04418, section 3.
    """

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
            terms = torch.cat((units.z, units.preactivations(weight_in, bias_in).relu_()))
            factors = torch.cat((line[:, 1:], weight_out[:, units.crossing]), 1)
            block_output = torch.addmm((line[:, 0] + bias_out)[:, None], factors, terms)
            output[:, block[0], block[1]] = block_output.view(-1, *relative[block].shape)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, c, denominator, weight_in, bias_in, weight_out = ctx.saved_tensors
        relative = _relative(query, key, c, denominator)
        to_relative = torch.empty_like(relative)
        # For each head and unit: the gradient and the gradient times z, summed over the pairs where the unit is active.
        sums = relative.new_zeros(2, *weight_out.shape)
        to_bias_out = relative.new_zeros(weight_out.shape[0])
        for block in _blocks(*relative.shape):
            units = _Units.over(relative[block], weight_in, bias_in)
            grad = grads[0][:, block[0], block[1]].reshape(weight_out.shape[0], -1)
            active = (units.preactivations(weight_in, bias_in) > 0).to(units.z.dtype)
            factors = torch.cat((torch.ones_like(units.z), units.z, active, active * units.z))
            block_sums = grad @ factors.T
            to_bias_out += block_sums[:, 0]
            sums += block_sums[:, :2].T[:, :, None] * units.linear
            sums[:, :, units.crossing] += block_sums[:, 2:].unflatten(1, (2, -1)).transpose(0, 1)
            line = units.line(weight_in, bias_in, weight_out)
            slopes = torch.cat((line[:, 1:], weight_out[:, units.crossing] * weight_in[units.crossing]), 1)
            z_grad = slopes.T @ grad
            to_relative[block] = (z_grad[0] + (z_grad[1:] * active).sum(0)).view(relative[block].shape)
        to_denominator = -relative.mul_(to_relative).sum(1) / denominator
        distance = _distance(query, key, relative.dtype)
        psi_slope = distance / (distance * c.abs()).add_(1)  # derivative of ln(|c| x + 1) with respect to |c|
        to_c = (psi_slope.mul_(to_relative).sum(1) / denominator).sum() * c.sign()
        to_bias_in, to_weight_in = (sums * weight_out).sum(1)
        to_weight_out = sums[0] * bias_in + sums[1] * weight_in
        return None, None, to_c, to_denominator, to_weight_in, to_bias_in, to_weight_out, to_bias_out
