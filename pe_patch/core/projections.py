"""The projections of an attention under one set of names, and the latents that replace them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Projections:
    """The weights of one multi-head or grouped-query attention, ordered by head; views, not copies."""

    query: Tensor
    """`[heads * head_dim, hidden]`"""
    key: Tensor
    """`[kv_heads * head_dim, hidden]`"""
    value: Tensor
    """`[kv_heads * head_dim, hidden]`"""
    query_bias: Tensor | None
    """`[heads * head_dim]`"""
    key_bias: Tensor | None
    value_bias: Tensor | None
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    """Number of leading dimensions of a head that rotate."""
    interleaved: bool = False
    """Rotated pairs are neighbours (2k, 2k + 1) rather than halves (k, k + rotary_dim / 2)."""
    rotation_scale: float = 1.0
    """Factor of the trained model on cos and sin (YaRN, LongRoPE)."""
    query_norm: nn.Module | None = None
    """Norm on each head's query, `[..., head_dim]`, before the rotation (Qwen3)."""
    key_norm: nn.Module | None = None

    @property
    def hidden(self) -> int:
        return self.query.shape[1]

    @property
    def group(self) -> int:
        """Return the number of query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def pairs(self) -> Tensor:
        """Return the two dimensions of a head that each frequency rotates, `[rotary_dim / 2, 2]`."""
        index = torch.arange(self.rotary_dim, device="cpu")
        return index.view(-1, 2) if self.interleaved else index.view(2, -1).T.contiguous()

    @property
    def work_dtype(self) -> torch.dtype:
        """Return the dtype of a conversion: float32, or float64 for float64 weights."""
        return torch.promote_types(self.query.dtype, torch.float32)


@dataclass
class Statistics:
    """Sums over calibration tokens for one attention. Keys are taken before the rotation and after the key norm that
    some families have."""

    tokens: int
    moment: Tensor
    """Sum over the tokens of z z^T, `[2 * kv_heads * head_dim] * 2`, where z is [key of every head | value of every
    head] without their biases."""
    key_moment: Tensor
    """The same of the keys alone with their bias, `[kv_heads * head_dim] * 2`."""
    pair_norms: Tensor
    """Sums of the 2-norms of each rotated pair: `[2, heads, rotary_dim / 2]`, of queries, and of keys repeated for the
    query heads of their group; biases included."""


@dataclass
class Latents:
    """Weights of latent attention, as maps from the trained queries, keys and values.

    With q_h = the query of head h (`[head_dim]`, bias included), z = [keys | values] of all key-value heads without
    biases (`[2 * kv_heads * head_dim]`) and k the keys with their bias:

        query of head h = query[h] q_h         -> first `nope` numbers without position, then `rope` that rotate
        latent c        = down z               -> what is cached
        shared key      = rope_key k           -> what is cached, rotated: `rope_heads` heads of `rope` numbers, in
                                                  which pairs are halves (i, i + rope / 2) and pair i of head g turns by
                                                  the trained frequency number frequency[g, i]
        key of head g   = up_key[g] c_k        -> `nope` numbers; c_k is c, or its first half where `split`
        value of head g = up_value[g] c_v      -> head_dim numbers; c_v is c, or its second half where `split`

    `up_key` and `up_value` have either one entry for each query head or one for each key-value head.

    The bias of a non-rotating key part adds one constant to all scores of a query, so softmax ignores it. The bias of a
    value is added to the output.
    """

    query: Tensor
    """`[heads, nope + rope, head_dim]`"""
    down: Tensor
    """`[rank, 2 * kv_heads * head_dim]`, or twice the rank where `split`"""
    rope_key: Tensor
    """`[rope_heads * rope, kv_heads * head_dim]`"""
    up_key: Tensor
    """`[heads | kv_heads, nope, rank]`"""
    up_value: Tensor
    """`[heads | kv_heads, head_dim, rank]`"""
    frequency: Tensor
    """`[rope_heads, rope / 2]`, int64: which of the trained frequencies turns a pair"""
    split: bool = False
    norm: Tensor | None = field(default=None)
    """`[rank]`, weight of an RMS norm on the latent, where one was asked for"""

    @property
    def nope(self) -> int:
        return self.up_key.shape[1]

    @property
    def rope(self) -> int:
        return 2 * self.frequency.shape[1]

    @property
    def rope_heads(self) -> int:
        return self.frequency.shape[0]
