"""PyTorch's fused attention on a CPU, whose forward returns the log-sum-exp (LSE) and whose backward accepts one.

It adds the mask to the scaled scores. A mask may be a view with overlapping rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import compat

CHUNK = 256
"""Queries in a chunk: enough for the kernel to be fast, few enough that masked pairs cost little."""
HIDDEN = -5e3
"""An additive mask hides a key where it is below this value; every convention in use is far below."""
SPAN = 1024
"""Keys that backward processes per kernel call, which bounds the memory of their partial gradients."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that the kernel supports."""


def is_supported(engine: Any, query: Tensor, value: Tensor) -> bool:
    """Return whether these kernels compute what Transformers' SDPA function would, outside a compiled graph.

    Args:
        engine: the attention engine of the layer.
        query: `[batch, heads, query, head]`.
        value: `[batch, key_heads, key, head]`.
    """
    return (
        engine.backend.name == "sdpa"
        and query.device.type == "cpu"
        and query.dtype in DTYPES
        and query.shape[-1] == value.shape[-1]
        and query.dtype == value.dtype
        and engine.causal
        and not (engine.dropout and engine.module.training)
        and engine.extra.get("softcap") is None
        and engine.extra.get("s_aux") is None
        and not torch.compiler.is_compiling()
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute attention with the LSE of each row.

    Args:
        query: `[batch, heads, query, head]`.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        mask: `[batch, heads, query, key]`, float, added to the scaled scores; None for no mask.
        scaling: factor on the dot products.
        causal: whether to apply a causal mask.

    Returns:
        The output `[batch, heads, query, head]`, and the LSE `[batch, heads, query]` in float32 or wider. PyTorch
        returns an LSE of 0 for a fully masked row.
    """
    _check_mask(query, mask)
    return compat.cpu_attention(query, key, value, 0.0, causal, attn_mask=mask, scale=scaling)


def _check_mask(query: Tensor, mask: Tensor | None) -> None:
    """Raise `TypeError` for a mask whose dtype the kernel would misread as its own.

    The kernel supports a mask in the dtype of the queries, and a float32 mask with queries in half precision.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    if mask is not None and mask.dtype not in (query.dtype, wide):
        raise TypeError(
            f"The mask has dtype {mask.dtype}, and queries of {query.dtype} need a mask of {query.dtype} or {wide}."
        )


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value from the output and LSE of the forward pass.

    `output` and `lse` may come from an attention over more keys than `key` holds. The contribution of these keys is
    then exact, as in ring attention.
    """
    _check_mask(query, mask)
    return compat.cpu_attention_backward(
        grad, query, key, value, output, lse, 0.0, False, attn_mask=mask, scale=scaling
    )


def are_consecutive(query: Tensor, key: Tensor) -> bool:
    """Return whether the positions of each row are consecutive, and the queries are the last of the keys."""
    if query.shape[1] > key.shape[1]:
        return False
    consecutive = all(bool((positions.diff(dim=-1) == 1).all()) for positions in (query, key))
    return consecutive and bool((query[:, -1:] == key[:, -1:]).all())


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge the outputs and LSEs of attention over two sets of keys into those of one softmax over both."""
    lse = torch.logaddexp(first[1], second[1])
    finite_lse = lse.masked_fill(lse == -math.inf, 0.0)
    first_weight, second_weight = ((part_lse - finite_lse).exp()[..., None] for part_lse in (first[1], second[1]))
    return (first[0] * first_weight + second[0] * second_weight).to(first[0].dtype), lse


class Chunk(NamedTuple):
    """A chunk of queries, and the keys that they attend to."""

    start: int
    """First query."""
    stop: int
    """End of the queries, exclusive."""
    first: int
    """First key."""
    end: int
    """End of the keys, exclusive; the last query is at the same position as key `end - 1`."""

    @property
    def rows(self) -> int:
        """Return the number of queries."""
        return self.stop - self.start

    @property
    def queries(self) -> slice:
        """Return the slice of the queries."""
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        """Return the slice of the keys."""
        return slice(self.first, self.end)


def chunks(count: int, total: int, width: int, rows: int = CHUNK) -> Iterator[Chunk]:
    """Yield chunks of `rows` queries for causal attention.

    Args:
        count: number of queries, which are the last of the keys.
        total: number of keys.
        width: how many keys back each query must reach. Chunks are rectangles, so most queries reach farther.
        rows: queries in a chunk.
    """
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        end = total - count + stop
        yield Chunk(start, stop, max(0, end - (stop - start) - width), end)


def empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate output and LSE in the memory layout `[batch, query, heads, ...]`, which the output projection needs."""
    batch, heads, count, width = query.shape
    output = query.new_empty(batch, count, heads, width).transpose(1, 2)
    precise = torch.promote_types(query.dtype, torch.float32)
    return output, torch.empty(batch, count, heads, dtype=precise).transpose(1, 2)


class Gradients:
    """Gradients of query, key and value, accumulated over chunks in float32 or wider."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.dtypes = [tensor.dtype for tensor in (query, key, value)]
        self.sums = [
            torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
            for tensor in (query, key, value)
        ]

    def add(
        self, queries: slice, keys: slice, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        grad: Tensor, mask: Tensor | None, scaling: float, finish: Callable[[Tensor], Tensor] | None = None,
        to_keys: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Add the gradients of a chunk of queries over a range of keys.

        Args:
            queries: slice of the queries in the whole sequence.
            keys: slice of the keys in `key` and `value`.
            query: the queries of the chunk; `output`, `lse`, `grad` and `mask` are of these queries too.
            key: `[batch, key_heads, key, head]`.
            value: `[batch, key_heads, key, head]`.
            output: output of the whole rows.
            lse: LSE of the whole rows.
            grad: gradient of the output.
            mask: additive mask of these queries and keys; None for no mask.
            scaling: factor on the dot products.
            finish: maps the gradient of `query` to that of the original queries; None if they are the same.
            to_keys: tensors that receive the gradients of keys and values; None for `self.sums`.
        """
        to_key, to_value = self.sums[1:] if to_keys is None else to_keys
        to_query = None
        for low in range(keys.start, keys.stop, SPAN):
            span = slice(low, min(low + SPAN, keys.stop))
            span_mask = None if mask is None else mask[..., low - keys.start : span.stop - keys.start]
            query_grad, key_grad, value_grad = gradients(
                grad, query, key[:, :, span], value[:, :, span], output, lse, span_mask, scaling
            )
            query_grad = query_grad.to(self.sums[0].dtype)
            to_query = query_grad if to_query is None else to_query + query_grad
            to_key[:, :, span] += key_grad
            to_value[:, :, span] += value_grad
        if to_query is not None:
            self.sums[0][:, :, queries] += to_query if finish is None else finish(to_query)

    def add_reversed(
        self, chunk: Chunk, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        mask: Tensor, scaling: float,
    ) -> None:  # fmt: skip
        """Add the gradients of a chunk whose mask has the queries in reversed order; other tensors have all queries."""
        grad, query, output, lse = (tensor[:, :, chunk.queries].flip(2) for tensor in (grad, query, output, lse))
        self.add(
            chunk.queries, chunk.keys, query, key, value, output, lse, grad, mask, scaling,
            lambda query_grad: query_grad.flip(2),
        )  # fmt: skip

    def finished(self) -> tuple[Tensor, ...]:
        """Return the gradients in the dtypes of query, key and value."""
        return tuple(total.to(dtype) for total, dtype in zip(self.sums, self.dtypes, strict=True))
