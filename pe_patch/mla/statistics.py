"""Statistics of one attention over calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.projections import Projections, Statistics

SLICE = 1024
"""Tokens that are projected at a time."""


def normalized(norm: nn.Module | None, heads: Tensor) -> Tensor:
    """Apply a norm to `heads` `[..., heads, head_dim]` with its parameters cast to the dtype of `heads`."""
    if norm is None:
        return heads
    tensors = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    cast = {name: tensor.to(heads.dtype) for name, tensor in tensors.items()}
    return torch.func.functional_call(norm, cast, (heads,))


@torch.no_grad()
def gather(projections: Projections, hidden: Tensor, into: Statistics | None = None) -> Statistics:
    """Accumulate the statistics of calibration tokens.

    They are computed in `projections.work_dtype` on the device of the weights. If the family normalizes keys, the keys
    are those after the norm, and include their bias.

    Args:
        projections: the weights of the attention.
        hidden: inputs of the attention, `[tokens, hidden]`.
        into: the statistics to add to, in place; None to start new ones.
    """
    of, dtype, device = projections, projections.work_dtype, projections.key.device
    width = of.kv_heads * of.head_dim
    if into is None:
        into = Statistics(
            tokens=0,
            moment=torch.zeros(2 * width, 2 * width, dtype=dtype, device=device),
            key_moment=torch.zeros(width, width, dtype=dtype, device=device),
            pair_norms=torch.zeros(2, of.heads, of.rotary_dim // 2, dtype=dtype, device=device),
        )
    query_weight, key_weight, value_weight = (weight.to(dtype) for weight in (of.query, of.key, of.value))
    query_bias, key_bias = (None if bias is None else bias.to(dtype) for bias in (of.query_bias, of.key_bias))
    pairs = of.pairs.to(device)
    for chunk in hidden.split(SLICE):
        chunk = chunk.to(device, dtype)
        query = nn.functional.linear(chunk, query_weight, query_bias).unflatten(1, (of.heads, of.head_dim))
        key = nn.functional.linear(chunk, key_weight, key_bias).unflatten(1, (of.kv_heads, of.head_dim))
        query, key = normalized(of.query_norm, query), normalized(of.key_norm, key)
        biased = key.flatten(1)
        plain = biased - key_bias if key_bias is not None and of.key_norm is None else biased
        key_and_value = torch.cat((plain, chunk @ value_weight.T), 1)
        products = key_and_value.T @ key_and_value
        into.moment += products
        into.key_moment += products[:width, :width] if plain is biased else biased.T @ biased
        into.pair_norms[0] += query[..., pairs].norm(dim=-1).sum(0)
        into.pair_norms[1] += key[..., pairs].norm(dim=-1).sum(0).repeat_interleave(of.group, 0)
        into.tokens += chunk.shape[0]
    return into
