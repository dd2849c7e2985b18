"""Causal attention with vectors by clipped distance: beyond the bound, all keys share one vector and one fused call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu


class _Band(NamedTuple):
    """A chunk of queries, and the band of keys that are nearer than the bound for at least one of them."""

    queries: slice
    """The queries."""
    first: int
    """First key of the band; the keys before it are beyond the bound for every query."""
    end: int
    """End of the band, exclusive."""
    steps: Tensor
    """Clipped distance of each pair, `[queries, keys]`."""
    future: Tensor
    """True for keys after the query, `[queries, keys]`."""

    @property
    def keys(self) -> slice:
        """Return the slice of the keys."""
        return slice(self.first, self.end)


def _bands(count: int, total: int, bound: int) -> Iterator[_Band]:
    """Yield the chunks of `count` queries, the last of `total` keys."""
    for chunk in cpu.chunks(count, total, total):
        first = max(0, chunk.end - chunk.rows - bound + 1)
        at = torch.arange(chunk.end - chunk.rows, chunk.end)
        distance = at[:, None] - torch.arange(first, chunk.end)
        yield _Band(chunk.queries, first, chunk.end, distance.clamp(0, bound), distance < 0)


class _Scores(NamedTuple):
    """The scores of one band and their factors."""

    query: Tensor
    """`[batch, heads, queries, head]`."""
    keys: Tensor
    """`[batch, heads, keys, head]`."""
    values: Tensor
    """`[batch, heads, keys, head]`."""
    terms: Tensor
    """Scaled products of each query with each vector, `[batch, heads, queries, bound + 1]`."""
    scores: Tensor
    """Scores of the band, `[batch, heads, queries, keys]`, -inf for future keys."""
    steps: Tensor
    """Clipped distance of each pair, `[batch, heads, queries, keys]`."""


class Clipped(torch.autograd.Function):
    """Causal attention with vectors added to keys and values, indexed by the distance clipped at a bound.

    Scores are `scaling q_i (k_j + on_keys[c])` and outputs are the mean of `v_j + on_values[c]`, with
    c = min(i - j, bound).

    Args:
        query: `[batch, heads, query, head]`; the queries are the last of the keys.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        on_keys: `[bound + 1, head]`, float32 or wider.
        on_values: `[bound + 1, head]`, float32 or wider; None to leave the values unchanged.
        scaling: factor on the dot products.

    Returns:
        The output `[batch, heads, query, head]`.

    Source: Shaw et al. 2018, arXiv 1803.02155, equations 3 and 4.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, on_keys: Tensor, on_values: Tensor | None, scaling: float
    ) -> Any:
        output, lse = cpu.empty_outputs(query)
        for band in _bands(query.shape[2], key.shape[2], on_keys.shape[0] - 1):
            near = _scores(band, query, key, value, on_keys, scaling)
            band_lse, far_output = near.scores.logsumexp(-1), None
            if band.first:
                far_output, far_lse = cpu.attention(
                    query[:, :, band.queries], key[:, :, : band.first], value[:, :, : band.first], None, scaling
                )
                far_lse = far_lse + near.terms[..., -1]
                band_lse = torch.logaddexp(band_lse, far_lse)
            weights = (near.scores - band_lse[..., None]).exp_()
            band_output = weights @ near.values
            if far_output is not None:
                band_output += far_output.to(band_output.dtype) * (far_lse - band_lse).exp_()[..., None]
            if on_values is not None:
                band_output += _weight_by_step(weights, near.steps, on_values.shape[0], bool(band.first)) @ on_values
            output[:, :, band.queries], lse[:, :, band.queries] = band_output.to(output.dtype), band_lse
        ctx.save_for_backward(query, key, value, on_keys, on_values, output, lse)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, on_keys, on_values, output, lse = ctx.saved_tensors
        scaling, group = ctx.scaling, query.shape[1] // key.shape[1]
        sums = cpu.Gradients(query, key, value)
        to_on_keys = torch.zeros_like(on_keys)
        to_on_values = None if on_values is None else torch.zeros_like(on_values)
        for band in _bands(query.shape[2], key.shape[2], on_keys.shape[0] - 1):
            near = _scores(band, query, key, value, on_keys, scaling)
            grad, band_output, band_lse = (tensor[:, :, band.queries] for tensor in (grads[0], output, lse))
            precise_grad = grad.to(near.query.dtype)
            weights = (near.scores - band_lse[..., None]).exp_()
            weight_grad = precise_grad @ near.values.mT
            if on_values is not None and to_on_values is not None:
                step_weights = _weight_by_step(weights, near.steps, on_values.shape[0], bool(band.first))
                to_on_values += (step_weights.mT @ precise_grad).sum((0, 1))
                weight_grad += (precise_grad @ on_values.T).gather(-1, near.steps)
            score_grad = weight_grad.sub_((precise_grad * band_output).sum(-1, keepdim=True)).mul_(weights)
            to_terms = torch.zeros_like(near.terms).scatter_add_(-1, near.steps, score_grad)
            if band.first:
                # The score gradients of a query sum to zero, so those of the near keys give the sum over the far keys.
                to_terms[..., -1] -= score_grad.sum(-1)
                far_output = band_output if on_values is None else band_output - on_values[-1].to(band_output.dtype)
                sums.add(
                    band.queries, slice(0, band.first), query[:, :, band.queries], key, value, far_output,
                    band_lse - near.terms[..., -1], grad, None, scaling,
                )  # fmt: skip
            to_on_keys += (to_terms.mT @ near.query).sum((0, 1)) * scaling
            to_query, to_key, to_value = sums.sums
            to_query[:, :, band.queries] += (score_grad @ near.keys + to_terms @ on_keys) * scaling
            to_key[:, :, band.keys] += ((score_grad.mT @ near.query) * scaling).unflatten(1, (-1, group)).sum(2)
            to_value[:, :, band.keys] += (weights.mT @ precise_grad).unflatten(1, (-1, group)).sum(2)
        return *sums.finished(), to_on_keys, to_on_values, None


def _scores(band: _Band, query: Tensor, key: Tensor, value: Tensor, on_keys: Tensor, scaling: float) -> _Scores:
    """Compute the scores of a band."""
    group, precise = query.shape[1] // key.shape[1], on_keys.dtype
    queries = query[:, :, band.queries].to(precise)
    keys, values = (tensor[:, :, band.keys].to(precise).repeat_interleave(group, 1) for tensor in (key, value))
    terms = (queries @ on_keys.T) * scaling
    steps = band.steps.expand(*queries.shape[:2], -1, -1)
    scores = (queries @ keys.mT).mul_(scaling).add_(terms.gather(-1, steps)).masked_fill_(band.future, -math.inf)
    return _Scores(queries, keys, values, terms, scores, steps)


def _weight_by_step(weights: Tensor, steps: Tensor, count: int, has_far_keys: bool) -> Tensor:
    """Sum the attention weights at each clipped distance, `[batch, heads, queries, count]`.

    With `has_far_keys`, add 1 - sum(weights), the weight of the far keys, to the last entry.
    """
    sums = weights.new_zeros(*weights.shape[:3], count).scatter_add_(-1, steps, weights)
    if has_far_keys:
        sums[..., -1] += 1 - weights.sum(-1)
    return sums
