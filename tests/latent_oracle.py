"""Attention in float64 from the formulas: as trained, and over latents as the docstring of `Latents` says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pe_patch.core.projections import Latents, Projections


def inverse_frequencies(rotary_dim: int, base: float = 10000.0) -> Tensor:
    return base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def projected(of: Projections, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[tokens, heads, head_dim]`, and keys and values of the key-value heads, biases and norms included."""
    made = []
    for weight, bias, heads, norm in (
        (of.query, of.query_bias, of.heads, of.query_norm),
        (of.key, of.key_bias, of.kv_heads, of.key_norm),
        (of.value, of.value_bias, of.kv_heads, None),
    ):
        part = nn.functional.linear(hidden, weight, bias).unflatten(-1, (heads, of.head_dim))
        made.append(part if norm is None else norm(part))
    return made[0], made[1], made[2]


def turned(first: Tensor, second: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (first, second) `[tokens, heads, pairs]` turned by their place; `frequencies` `[heads | 1, pairs]`."""
    angle = torch.arange(len(first), dtype=torch.float64)[:, None, None] * frequencies
    return first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()


def mixed(query: Tensor, key: Tensor, value: Tensor, scaling: float, output: Tensor) -> Tensor:
    """Causal attention of `[tokens, heads, ...]`, through the output projection."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    hidden = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1) @ output.T


def trained(of: Projections, hidden: Tensor, output: Tensor, keeps: Tensor | None = None) -> Tensor:
    """`[tokens, hidden]` through the attention as it was; `keeps` `[kv_heads, rotary_dim / 2]`: pairs that rotate."""
    query, key, value = projected(of, hidden)
    frequencies = inverse_frequencies(of.rotary_dim).expand(of.kv_heads, -1)
    if keeps is not None:
        frequencies = frequencies * keeps
    first, second = of.pairs.T
    for part, own in ((query, frequencies.repeat_interleave(of.group, 0)), (key, frequencies)):
        part[..., first], part[..., second] = turned(part[..., first], part[..., second], own)
    key, value = (part.repeat_interleave(of.group, 1) for part in (key, value))
    return mixed(query, key, value, of.head_dim**-0.5, output)


def over_latents(of: Projections, latents: Latents, hidden: Tensor, output: Tensor, epsilon: float = 1e-6) -> Tensor:
    """The same with `latents` in place of keys and values."""
    query, key, value = projected(of, hidden)
    k = key.flatten(1)
    without_bias = k - of.key_bias if of.key_bias is not None and of.key_norm is None else k
    z = torch.cat((without_bias, hidden @ of.value.T), 1)
    q = torch.einsum("hnd,thd->thn", latents.query, query)
    c = z @ latents.down.T
    if latents.norm is not None:
        c = c * (c.square().mean(-1, keepdim=True) + epsilon).rsqrt() * latents.norm
    c_k, c_v = c.chunk(2, -1) if latents.split else (c, c)
    shared = (k @ latents.rope_key.T).unflatten(1, (latents.rope_heads, latents.rope))
    frequencies = inverse_frequencies(of.rotary_dim)[latents.frequency]

    def every(heads: Tensor, dim: int) -> Tensor:
        return heads.repeat_interleave(of.heads // heads.shape[dim], dim)

    q_rope = torch.cat(turned(*q[..., latents.nope :].chunk(2, -1), every(frequencies, 0)), -1)
    k_rope = torch.cat(turned(*shared.chunk(2, -1), frequencies), -1)
    k_nope = torch.einsum("hnr,tr->thn", latents.up_key, c_k)
    query = torch.cat((q[..., : latents.nope], q_rope), -1)
    key = torch.cat((every(k_nope, 1), every(k_rope, 1)), -1)
    value = every(torch.einsum("hdr,tr->thd", latents.up_value, c_v), 1)
    if of.value_bias is not None:
        value = value + every(of.value_bias.view(of.kv_heads, -1), 0)
    return mixed(query, key, value, of.head_dim**-0.5, output)
