"""Attention in chunks of queries, in plain PyTorch, for any device, dtype and mask, compiled or not.

Backward recomputes each chunk (activation checkpointing), so the scores take `heads x CHUNK x key` in both passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.positions import Positions

if TYPE_CHECKING:
    from .engine import Engine

CHUNK = 256
"""Maximum number of queries in a chunk."""
PAIRS = {"cpu": 2**22}
"""Maximum number of query-key pairs in a chunk, over batch and heads, by device type: larger ones are slow on a CPU."""
MAX_PAIRS = 2**27
"""Maximum number of query-key pairs in a chunk on device types that `PAIRS` does not list."""


def first_pass(engine: Engine, count: int, keys: tuple[Tensor, ...], positions: Positions) -> tuple[Any, Positions]:
    """Return keys and positions without the empty slots of a static cache.

    A causal first pass without a mask ignores these slots.

    Args:
        engine: the attention engine of the layer.
        count: number of queries.
        keys: tensors `[batch, key_heads, key, head]` to cut to the first `count` keys.
        positions: positions of the queries and keys.
    """
    if engine.mask is None and engine.causal and count > 1 and keys[0].shape[2] > count:
        return tuple(key[:, :, :count] for key in keys), positions._replace(key=positions.key[:, :count])
    return keys, positions


def checkpointed(engine: Engine, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call `compute(*arguments)` under activation checkpointing, which recomputes it in backward."""
    has_dropout = bool(engine.dropout and engine.module.training)  # nothing else draws random numbers
    output = checkpoint(compute, *arguments, use_reentrant=False, preserve_rng_state=has_dropout)
    assert isinstance(output, Tensor)
    return output


def by_chunks(
    engine: Engine, count: int, total: int, tensors: tuple[Tensor, ...], compute: Callable[..., Tensor]
) -> Tensor:
    """Compute attention in chunks of queries and concatenate the outputs.

    Args:
        engine: the attention engine of the layer.
        count: number of queries.
        total: number of keys.
        tensors: every tensor other than a parameter that needs a gradient; the first one is the query.
        compute: `compute(start, stop, end, *tensors)` returns `[batch, query, heads, head]` for the queries `start` to
            `stop` over the keys up to `end`.
    """
    sees_all_keys = engine.mask is not None or not engine.causal or count == 1
    outputs = []
    size = PAIRS.get(tensors[0].device.type, MAX_PAIRS) // (tensors[0].shape[0] * tensors[0].shape[1] * total)
    size = min(CHUNK, max(16, size))
    for start in range(0, count, size):
        stop = min(start + size, count)
        end = total if sees_all_keys else total - count + stop
        if torch.is_grad_enabled():  # otherwise autograd keeps the scores of every chunk
            outputs.append(checkpointed(engine, compute, start, stop, end, *tensors))
        else:
            outputs.append(compute(start, stop, end, *tensors))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def biased(engine: Engine, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Any) -> Tensor:
    """Compute attention with a bias in Transformers' own kernel, `[batch, query, heads, head]`.

    The bias joins the mask and is built for one chunk of queries at a time.
    """
    count = query.shape[2]
    (key, value), positions = first_pass(engine, count, (key, value), positions)

    def compute(start: int, stop: int, end: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        chunk, keys, values = query[:, :, start:stop], key[:, :, :end], value[:, :, :end]
        chunk_positions = positions._replace(query=positions.query[:, start:stop], key=positions.key[:, :end])
        sliced = engine.slice_queries(start, stop, end)
        additive = sliced.additive(bias, chunk, keys, chunk_positions)
        lowest = torch.finfo(additive.dtype).min
        if sliced.mask is None:
            additive = additive.masked_fill(~sliced.allowed(chunk, keys), lowest)
        elif sliced.mask.dtype == torch.bool:
            additive = additive.masked_fill(~sliced.mask, lowest)
        else:
            additive = additive + sliced.mask
        # These kernels require a mask in the dtype of the queries.
        if additive.device.type != "cpu" or query.dtype == torch.float64:
            additive = additive.to(query.dtype)
        additive = additive.expand(query.shape[0], query.shape[1], -1, -1)
        return engine.native_attention(chunk, keys, values, additive)[0]

    return by_chunks(engine, count, key.shape[2], (query, key, value), compute)


def by_rows(
    engine: Engine,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Positions,
    scores: Callable[..., Tensor],
    extra_output: Callable[[Tensor, Positions], Tensor] | None = None,
) -> Tensor:
    """Compute attention from whole rows of scores, `[batch, query, heads, head]`.

    Args:
        engine: the attention engine of the layer.
        query: `[batch, heads, query, head]`.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        positions: positions of the queries and keys.
        scores: `scores(query, key, positions, engine, (start, stop, end))` returns `[batch, heads, query, key]` for the
            queries `start` to `stop` and the keys up to `end`.
        extra_output: `extra_output(weights, positions)` returns a term `[batch, heads, query, head]` to add to the
            output.
    """
    count = query.shape[2]
    (key, value), positions = first_pass(engine, count, (key, value), positions)

    def compute(start: int, stop: int, end: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        chunk, keys, values = query[:, :, start:stop], key[:, :, :end], value[:, :, :end]
        chunk_positions = positions._replace(query=positions.query[:, start:stop], key=positions.key[:, :end])
        sliced = engine.slice_queries(start, stop, end)
        chunk_scores = scores(chunk, keys, chunk_positions, sliced, (start, stop, end))
        output, weights = sliced.softmax_and_mix(chunk_scores, values)
        if extra_output is None:
            return output
        assert weights is not None
        return output + extra_output(weights, chunk_positions).transpose(1, 2).to(output.dtype)

    return by_chunks(engine, count, value.shape[2], (query, key, value), compute)
