"""PyTorch's fused attention on a CPU, with the log-sum-exp of every row and a gradient that can be given one.

The masks that it takes may be views with overlapping rows, and their values are added to the scaled scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 256
"""Queries at a time: wide enough for the kernel, narrow enough that what they cannot see costs little."""
HIDDEN = -5e3
"""What an additive mask has where a key is hidden lies below this, by every convention."""
SPAN = 1024
"""Keys at a time in backward, which bounds the memory for what they add to their gradients."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def suits(engine: Any, query: Tensor, value: Tensor) -> bool:
    """Whether these kernels can stand in for the host's: same result, and no compiler looks on."""
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
    """Output `[batch, heads, query, head]` and log-sum-exp `[batch, heads, query]`, float32.

    mask `[batch, heads, query, key]`, float. A row that sees nothing has a log-sum-exp of 0 here (PyTorch's choice).
    """
    _check_mask(query, mask)
    return _forward(query, key, value, 0.0, causal, attn_mask=mask, scale=scaling)


def _check_mask(query: Tensor, mask: Tensor | None) -> None:
    """The kernel reads a mask of another dtype as if it were its own; only float32 beside half precision is meant."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if mask is not None and mask.dtype not in (query.dtype, wide):
        raise TypeError(f"A mask of {mask.dtype} does not go with queries of {query.dtype}.")


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
    """Gradients of query, key and value, all at `output` and `lse` of the whole row.

    They may be those of an attention over more keys than these: what these keys contribute is then exact, as in ring
    attention.
    """
    _check_mask(query, mask)
    return _backward(grad, query, key, value, output, lse, 0.0, False, attn_mask=mask, scale=scaling)


def consecutive(query: Tensor, key: Tensor) -> bool:
    """Whether all rows hold consecutive positions, the queries the last of the keys'."""
    if query.shape[1] > key.shape[1]:
        return False
    steady = all(bool((at.diff(dim=-1) == 1).all()) for at in (query, key))
    return steady and bool((query[:, -1:] == key[:, -1:]).all())


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over two sets of keys, from the output and log-sum-exp over each."""
    lse = torch.logaddexp(first[1], second[1])
    whole = lse.masked_fill(lse == -math.inf, 0.0)
    weight = [(one[1] - whole).exp()[..., None] for one in (first, second)]
    return (first[0] * weight[0] + second[0] * weight[1]).to(first[0].dtype), lse


class Chunk(NamedTuple):
    """Some queries, and the keys that they may see."""

    start: int
    stop: int
    first: int
    place: int

    @property
    def rows(self) -> int:
        """How many queries."""
        return self.stop - self.start

    @property
    def queries(self) -> slice:
        """Which of the queries."""
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        """Which of the keys; the last query stands at the last of them."""
        return slice(self.first, self.place)


def chunks(count: int, total: int, width: int, rows: int = CHUNK) -> Iterator[Chunk]:
    """Chunks of `count` queries, the last of `total` keys, each of which looks `width` keys back or a little more."""
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        place = total - count + stop
        yield Chunk(start, stop, max(0, place - (stop - start) - width), place)


def empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Room for output and log-sum-exp, laid out query before heads, as what follows attention wants it."""
    batch, heads, count, width = query.shape
    output = query.new_empty(batch, count, heads, width).transpose(1, 2)
    precise = torch.promote_types(query.dtype, torch.float32)
    return output, torch.empty(batch, count, heads, dtype=precise).transpose(1, 2)


class Gradients:
    """Gradients of query, key and value, summed over chunks in float32 or wider."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.dtypes = [one.dtype for one in (query, key, value)]
        self.sums = [
            torch.zeros(one.shape, dtype=torch.promote_types(one.dtype, torch.float32)) for one in (query, key, value)
        ]

    def add(
        self, queries: slice, keys: slice, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        grad: Tensor, mask: Tensor | None, scaling: float, finish: Callable[[Tensor], Tensor] | None = None,
        to_keys: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Add the `gradients` of some queries over some keys; all tensors but key and value are of those queries alone.

        `finish` makes the queries' gradient out of that of `query`; `to_keys` take the keys' and values' in the place
        of their sums.
        """
        to_key, to_value = self.sums[1:] if to_keys is None else to_keys
        into = None
        for low in range(keys.start, keys.stop, SPAN):
            there = slice(low, min(low + SPAN, keys.stop))
            seen = None if mask is None else mask[..., low - keys.start : there.stop - keys.start]
            found = gradients(grad, query, key[:, :, there], value[:, :, there], output, lse, seen, scaling)
            part = found[0].to(self.sums[0].dtype)
            into = part if into is None else into + part
            to_key[:, :, there] += found[1]
            to_value[:, :, there] += found[2]
        if into is not None:
            self.sums[0][:, :, queries] += into if finish is None else finish(into)

    def add_reversed(
        self, chunk: Chunk, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        mask: Tensor, scaling: float,
    ) -> None:  # fmt: skip
        """The same for a chunk whose mask has the queries in reversed order."""
        above, own, made, norm = (one[:, :, chunk.queries].flip(2) for one in (grad, query, output, lse))
        self.add(
            chunk.queries, chunk.keys, own, key, value, made, norm, above, mask, scaling, lambda into: into.flip(2)
        )

    def finished(self) -> tuple[Tensor, ...]:
        """The gradients in the dtypes of what they belong to."""
        return tuple(total.to(dtype) for total, dtype in zip(self.sums, self.dtypes, strict=True))
