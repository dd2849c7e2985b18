"""What calibration tokens tell about one attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.projections import Projections, Statistics

SLICE = 1024
"""Tokens that are projected at once."""


def normalised(norm: nn.Module | None, heads: Tensor) -> Tensor:
    """`heads` `[..., heads, head_dim]` after `norm`, whose parameters are taken in their dtype."""
    if norm is None:
        return heads
    own = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    return torch.func.functional_call(norm, {name: tensor.to(heads.dtype) for name, tensor in own.items()}, (heads,))


@torch.no_grad()
def gather(projections: Projections, hidden: Tensor, into: Statistics | None = None) -> Statistics:
    """Add what `hidden` `[tokens, hidden]`, inputs of this attention, tells to `into`, which is changed and returned.

    Computed and summed in `projections.work_dtype`, on the device of the weights. A key under a norm is what the norm
    makes of it, bias included: there is nothing to leave out afterwards.
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
    for part in hidden.split(SLICE):
        part = part.to(device, dtype)
        query = nn.functional.linear(part, query_weight, query_bias).unflatten(1, (of.heads, of.head_dim))
        key = nn.functional.linear(part, key_weight, key_bias).unflatten(1, (of.kv_heads, of.head_dim))
        query, key = normalised(of.query_norm, query), normalised(of.key_norm, key)
        biased = key.flatten(1)
        plain = biased - key_bias if key_bias is not None and of.key_norm is None else biased
        both = torch.cat((plain, part @ value_weight.T), 1)
        products = both.T @ both
        into.moment += products
        into.key_moment += products[:width, :width] if plain is biased else biased.T @ biased
        into.pair_norms[0] += query[..., pairs].norm(dim=-1).sum(0)
        into.pair_norms[1] += key[..., pairs].norm(dim=-1).sum(0).repeat_interleave(of.group, 0)
        into.tokens += part.shape[0]
    return into
