"""Vectors by distance that are all one beyond a bound: far keys need one number for each query, near ones a band."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu


class _Near(NamedTuple):
    """A chunk of queries and the keys of which some are near."""

    queries: slice
    first: int
    place: int
    steps: Tensor
    """Clipped distance of each pair, `[queries, keys]`."""
    ahead: Tensor

    @property
    def keys(self) -> slice:
        return slice(self.first, self.place)


def _chunks(count: int, total: int, bound: int) -> Iterator[_Near]:
    for chunk in cpu.chunks(count, total, total):
        first = max(0, chunk.place - chunk.rows - bound + 1)
        at = torch.arange(chunk.place - chunk.rows, chunk.place)
        distance = at[:, None] - torch.arange(first, chunk.place)
        yield _Near(chunk.queries, first, chunk.place, distance.clamp(0, bound), distance < 0)


class _Scores(NamedTuple):
    """What a chunk's scores are made of."""

    query: Tensor
    keys: Tensor
    values: Tensor
    terms: Tensor
    """Each query with each vector, `[batch, heads, queries, bound + 1]`."""
    near: Tensor
    """Scores of near keys, `[batch, heads, queries, keys]`, -inf ahead."""
    steps: Tensor


class Clipped(torch.autograd.Function):
    """Causal attention with vectors by clipped distance on keys and values, `[batch, heads, query, head]`.

    Scores are `scaling q_i (k_j + on_keys[c])`, outputs the mean of `v_j + on_values[c]`, c = min(i - j, bound);
    `on_keys` and `on_values` are `[bound + 1, head]`, float32, the latter None for none. The queries are the last keys.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, on_keys: Tensor, on_values: Tensor | None, scaling: float
    ) -> Any:
        output, lse = cpu.empty_outputs(query)
        for part in _chunks(query.shape[2], key.shape[2], on_keys.shape[0] - 1):
            made = _scores(part, query, key, value, on_keys, scaling)
            norm, far = made.near.logsumexp(-1), None
            if part.first:
                far, own = cpu.attention(
                    query[:, :, part.queries], key[:, :, : part.first], value[:, :, : part.first], None, scaling
                )
                own = own + made.terms[..., -1]
                norm = torch.logaddexp(norm, own)
            weights = (made.near - norm[..., None]).exp_()
            result = weights @ made.values
            if far is not None:
                result += far.to(result.dtype) * (own - norm).exp_()[..., None]
            if on_values is not None:
                result += _by_step(weights, made.steps, on_values.shape[0], bool(part.first)) @ on_values
            output[:, :, part.queries], lse[:, :, part.queries] = result.to(output.dtype), norm
        ctx.save_for_backward(query, key, value, on_keys, on_values, output, lse)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, on_keys, on_values, output, lse = ctx.saved_tensors
        scaling, group = ctx.scaling, query.shape[1] // key.shape[1]
        into = cpu.Gradients(query, key, value)
        to_keys = torch.zeros_like(on_keys)
        to_values = None if on_values is None else torch.zeros_like(on_values)
        for part in _chunks(query.shape[2], key.shape[2], on_keys.shape[0] - 1):
            made = _scores(part, query, key, value, on_keys, scaling)
            grad, result, norm = (one[:, :, part.queries] for one in (grads[0], output, lse))
            above = grad.to(made.query.dtype)
            weights = (made.near - norm[..., None]).exp_()
            change = above @ made.values.mT
            if on_values is not None and to_values is not None:
                by_step = _by_step(weights, made.steps, on_values.shape[0], bool(part.first))
                to_values += (by_step.mT @ above).sum((0, 1))
                change += (above @ on_values.T).gather(-1, made.steps)
            slope = change.sub_((above * result).sum(-1, keepdim=True)).mul_(weights)
            to_terms = torch.zeros_like(made.terms).scatter_add_(-1, made.steps, slope)
            if part.first:
                # The slopes of one query sum to nothing, so that those of its far keys follow from the near ones'.
                to_terms[..., -1] -= slope.sum(-1)
                far = result if on_values is None else result - on_values[-1].to(result.dtype)
                into.add(
                    part.queries, slice(0, part.first), query[:, :, part.queries], key, value, far,
                    norm - made.terms[..., -1], grad, None, scaling,
                )  # fmt: skip
            to_keys += (to_terms.mT @ made.query).sum((0, 1)) * scaling
            to_query = (slope @ made.keys + to_terms @ on_keys) * scaling
            to_key, to_value = ((slope.mT @ made.query) * scaling, weights.mT @ above)
            summed = (one.unflatten(1, (-1, group)).sum(2) for one in (to_key, to_value))
            for total, one, where in zip(
                into.sums, (to_query, next(summed), next(summed)), (part.queries, part.keys, part.keys), strict=True
            ):
                total[:, :, where] += one
        return *into.finished(), to_keys, to_values, None


def _scores(part: _Near, query: Tensor, key: Tensor, value: Tensor, on_keys: Tensor, scaling: float) -> _Scores:
    group, precise = query.shape[1] // key.shape[1], on_keys.dtype
    own = query[:, :, part.queries].to(precise)
    keys, values = (one[:, :, part.keys].to(precise).repeat_interleave(group, 1) for one in (key, value))
    terms = (own @ on_keys.T) * scaling
    steps = part.steps.expand(*own.shape[:2], -1, -1)
    near = (own @ keys.mT).mul_(scaling).add_(terms.gather(-1, steps)).masked_fill_(part.ahead, -math.inf)
    return _Scores(own, keys, values, terms, near, steps)


def _by_step(weights: Tensor, steps: Tensor, count: int, more: bool) -> Tensor:
    """How much weight lies at each clipped distance, `[batch, heads, queries, count]`; `more` says that there are keys
    beyond these, which have what is left."""
    sums = weights.new_zeros(*weights.shape[:3], count).scatter_add_(-1, steps, weights)
    if more:
        sums[..., -1] += 1 - weights.sum(-1)
    return sums
