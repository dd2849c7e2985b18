"""A few queries at a time, in plain PyTorch: any device, any dtype, any mask, compiled or not.

Each chunk is computed again in backward, so that memory stays `heads x CHUNK x key` there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...core.positions import Positions

CHUNK = 256
"""Queries at a time, at most."""
PAIRS = {"cpu": 2**22}
"""Pairs of a query and a key at a time, over all heads, by device: what a CPU's caches and allocator deal with well."""
MANY = 2**27


def first_pass(engine: Any, count: int, keys: tuple[Tensor, ...], positions: Positions) -> tuple[Any, Positions]:
    """Keys and positions without the empty slots of a static cache, which a causal first pass without mask ignores."""
    if engine.mask is None and engine.causal and count > 1 and keys[0].shape[2] > count:
        return tuple(key[:, :, :count] for key in keys), positions._replace(key=positions.key[:, :count])
    return keys, positions


def again(engine: Any, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`compute(*arguments)`, computed again in backward."""
    random = bool(
        engine.dropout and engine.module.training
    )  # states of the generator are worth keeping for dropout alone
    output = checkpoint(compute, *arguments, use_reentrant=False, preserve_rng_state=random)
    assert isinstance(output, Tensor)
    return output


def by_chunks(
    engine: Any, count: int, total: int, tensors: tuple[Tensor, ...], compute: Callable[..., Tensor]
) -> Tensor:
    """`compute(start, stop, end, *tensors)` for the queries `start` to `stop` over the keys up to `end`, joined.

    `compute` gives `[batch, query, heads, head]`. `tensors` are all that a gradient flows to, besides parameters.
    """
    if engine.mask is not None or not engine.causal or count == 1:
        ends = None
    else:
        ends = total - count
    outputs = []
    size = PAIRS.get(tensors[0].device.type, MANY) // (tensors[0].shape[0] * tensors[0].shape[1] * total)
    size = min(CHUNK, max(16, size))
    for start in range(0, count, size):
        stop = min(start + size, count)
        end = total if ends is None else stop + ends
        if torch.is_grad_enabled():  # else autograd would keep every chunk's scores
            outputs.append(again(engine, compute, start, stop, end, *tensors))
        else:
            outputs.append(compute(start, stop, end, *tensors))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def biased(engine: Any, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Any) -> Tensor:
    """A bias on the host's own kernel, built for a few queries at a time; `[batch, query, heads, head]`."""
    count = query.shape[2]
    (key, value), positions = first_pass(engine, count, (key, value), positions)

    def compute(start: int, stop: int, end: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        chunk, keys, values = query[:, :, start:stop], key[:, :, :end], value[:, :, :end]
        seen = positions._replace(query=positions.query[:, start:stop], key=positions.key[:, :end])
        additive = engine.additive(bias, chunk, keys, seen)
        lowest = torch.finfo(query.dtype).min
        part = engine.part(start, stop, end)
        if part.mask is None:
            additive = additive.masked_fill(~part.allowed(chunk, keys), lowest)
        else:
            additive = (
                additive.masked_fill(~part.mask, lowest) if part.mask.dtype == torch.bool else additive + part.mask
            )
        if additive.device.type != "cpu" or query.dtype == torch.float64:  # kernels that take no other mask
            additive = additive.to(query.dtype)
        additive = additive.expand(query.shape[0], query.shape[1], -1, -1)
        return engine.host(chunk, keys, values, additive)[0]

    return by_chunks(engine, count, key.shape[2], (query, key, value), compute)


def by_rows(
    engine: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Positions,
    scores: Callable[..., Tensor],
    also: Callable[[Tensor, Positions], Tensor] | None = None,
) -> Tensor:
    """Whole rows of scores, made by `scores(query, key, positions, engine, (start, stop, end))`."""
    count = query.shape[2]
    (key, value), positions = first_pass(engine, count, (key, value), positions)

    def compute(start: int, stop: int, end: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        chunk, keys, values = query[:, :, start:stop], key[:, :, :end], value[:, :, :end]
        seen = positions._replace(query=positions.query[:, start:stop], key=positions.key[:, :end])
        part = engine.part(start, stop, end)
        made = scores(chunk, keys, seen, part, (start, stop, end))
        output, weights = part.mix(made, values)
        return output if also is None else output + also(weights, seen).transpose(1, 2).to(output.dtype)

    return by_chunks(engine, count, value.shape[2], (query, key, value), compute)
