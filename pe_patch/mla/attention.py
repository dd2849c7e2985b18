"""Attention over latents: expanded to keys and values, or absorbed into queries and outputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.projections import Latents, Projections
from .folding import EffectiveWeightCache

MOST_QUERIES = 256
"""Maximum number of queries for absorbed attention; larger passes expand the latents and use the fast kernels."""
MOST_SCORES = 2**25
"""Maximum number of scores that absorbed attention materializes at a time."""


class LatentHeads(Protocol):
    """The sizes and projections of a layer that attention over latents uses."""

    nope: int
    """Dimensions of a head's query and key without rotation."""
    rope: int
    """Rotary dimensions of a head's query and key."""
    value_dim: int
    """Dimensions of a head's value."""
    rank: int
    """Width of the latent, or of each latent if `split`."""
    rope_heads: int
    """Number of rotary keys cached for each token; one in DeepSeek's models."""
    split: bool
    """Keys and values have one latent each, concatenated, rather than a joint one."""

    def effective_weights(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the effective up-projections in the dtype and on the device of `like`.

        A constant that an adapter adds to the keys is left out: it adds the same to all scores of a query, and softmax
        ignores it.

        Returns:
            Up-projections of keys `[up_heads, nope, rank]` and values `[up_heads, value_dim, rank]`, and the bias of
            the values `[up_heads, value_dim]` or None.
        """
        ...

    def expand(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values from the cached tensors.

        Args:
            latent: latents `[batch, 1, length, rank]`, or twice the rank if `split`.
            shared: rotated keys `[batch, 1, length, rope_heads * rope]`.

        Returns:
            Keys `[batch, up_heads, length, nope + rope]` and values `[batch, up_heads, length, value_dim]`.
        """
        ...

    def clear(self) -> None:
        """Discard the weights that were prepared for decoding."""
        ...


def absorbs(heads: LatentHeads, query: Tensor, latent: Tensor, engine: Any) -> bool:
    """Return whether absorbed attention takes fewer multiplications than expanding the latents.

    For each cached token and head, absorbing costs 2 rank - nope - value_dim more multiplications for every query, and
    saves the rank (nope + value_dim) of expanding the token once.
    """
    count, expanded_width = query.shape[2], heads.nope + heads.value_dim
    if count >= latent.shape[2] or count > MOST_QUERIES or (engine.dropout and engine.module.training):
        return False
    if count > 1 and engine.mask is None:  # Transformers passes no mask in a first pass into a static cache
        return False
    return count * (2 * heads.rank - expanded_width) <= heads.rank * expanded_width


def absorbed(heads: LatentHeads, query: Tensor, latent: Tensor, shared: Tensor, engine: Any) -> tuple[Tensor, Tensor]:
    """Compute attention with W_UK absorbed into the queries and W_UV into the output.

    logit = (W_UK^T q_nope) c + q_rope k_rope, output = W_UV sum a c.

    Args:
        heads: the sizes and projections of the layer.
        query: `[batch, heads, query, nope + rope]`.
        latent: `[batch, 1, key, rank]`, or twice the rank if `split`.
        shared: rotated keys, `[batch, 1, key, rope_heads * rope]`.
        engine: the attention engine of the layer.

    Returns:
        The output of the heads `[batch, query, heads, value_dim]`, and the weights `[batch, heads, query, key]`.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.2.
    """
    up_key, up_value, value_bias = heads.effective_weights(query)
    batch, count, rows = query.shape[0], query.shape[1], query.shape[2]
    latent = latent.squeeze(1)
    on_keys, on_values = latent.chunk(2, -1) if heads.split else (latent, latent)
    nope, rope = query.split((heads.nope, heads.rope), -1)
    shared = shared.view(batch, -1, heads.rope_heads, heads.rope).permute(0, 2, 3, 1)
    scores = torch.matmul(rope.reshape(batch, heads.rope_heads, -1, heads.rope), shared)
    scores = scores.view(batch, count * rows, -1)
    if heads.nope:
        latent_query = torch.matmul(nope.reshape(batch, len(up_key), -1, heads.nope), up_key)
        scores = torch.baddbmm(scores, latent_query.view(batch, count * rows, heads.rank), on_keys.transpose(1, 2))
    scores = scores.view(batch, count, rows, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * engine.scaling
    weights = engine.weights(scores).to(query.dtype)
    latent_output = torch.matmul(weights.view(batch, count * rows, -1), on_values)
    output = torch.matmul(latent_output.view(batch, len(up_value), -1, heads.rank), up_value.transpose(1, 2))
    if value_bias is not None:
        output = output + value_bias[:, None]
    return output.view(batch, count, rows, heads.value_dim).transpose(1, 2), weights


def attention(heads: LatentHeads, query: Tensor, latent: Tensor, shared: Tensor, engine: Any) -> tuple[Tensor, Any]:
    """Compute attention over latents, absorbed or expanded, whichever takes fewer multiplications.

    Args:
        heads: the sizes and projections of the layer.
        query: `[batch, heads, query, nope + rope]`.
        latent: `[batch, 1, key, rank]`, or twice the rank if `split`.
        shared: rotated keys, `[batch, 1, key, rope_heads * rope]`.
        engine: the attention engine of the layer.

    Returns:
        The output `[batch, query, heads, value_dim]`, and the weights `[batch, heads, query, key]` or None.
    """
    if query.shape[2] > 1 or query.shape[2] == latent.shape[2]:
        heads.clear()
    if absorbs(heads, query, latent, engine):
        size = max(1, MOST_SCORES // (query.shape[0] * query.shape[1] * latent.shape[2]))
        total, end = query.shape[2], latent.shape[2]
        if size >= total:
            output, weights = absorbed(heads, query, latent, shared, engine)
        else:
            chunks = []
            for start in range(0, total, size):
                stop = min(start + size, total)
                sliced = engine.slice_queries(start, stop, end)
                chunks.append(absorbed(heads, query[:, :, start:stop], latent, shared, sliced))
            output = torch.cat([chunk_output for chunk_output, _ in chunks], 1)
            weights = torch.cat([chunk_weights for _, chunk_weights in chunks], 2) if engine.backend.dense else None
        weights = weights if engine.backend.dense else None
    else:
        output, weights = expanded(heads, query, latent, shared, engine)
    return output, weights


def expanded(heads: LatentHeads, query: Tensor, latent: Tensor, shared: Tensor, engine: Any) -> tuple[Tensor, Any]:
    """Compute attention by Transformers' kernels over keys and values expanded from the latents.

    The narrower of key and value is padded, because fast kernels require equal widths.
    """
    key, value = heads.expand(latent, shared)
    width, key_width = heads.value_dim, query.shape[-1]
    if not engine.backend.dense:
        value = nn.functional.pad(value, (0, max(key_width - width, 0)))
        query, key = (nn.functional.pad(tensor, (0, max(width - key_width, 0))) for tensor in (query, key))
    output, weights = engine.native_attention(query, key, value, engine.mask)
    return output[..., :width], weights


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of a `LatentAttention`."""

    hidden: int
    """Width of the hidden states."""
    heads: int
    """Number of query heads."""
    up_heads: int
    """Number of heads of the expanded keys and values."""
    kv_heads: int
    """Number of key-value heads of the trained attention."""
    head_dim: int
    """Head width of the trained attention, and of the values."""
    nope: int
    """Dimensions of a head's query and key without rotation."""
    rope: int
    """Rotary dimensions of a head's query and key."""
    rope_heads: int
    """Number of rotary keys cached for each token."""
    rank: int
    """Width of the latent, or of each latent if `split`."""
    split: bool = False
    """Keys and values have one latent each, rather than a joint one."""
    query_bias: bool = False
    """The query projection has a bias."""
    rope_bias: bool = False
    """The projection to latent and rotary key has a bias."""
    value_bias: bool = False
    """The up-projection of values has a bias."""
    norm: bool = False
    """The latent is normalized (RMSNorm)."""

    @property
    def latent(self) -> int:
        """Return the number of latent dimensions cached for each token."""
        return self.rank * (2 if self.split else 1)

    @property
    def cached(self) -> int:
        """Return the number of values cached for each token in one layer."""
        return self.latent + self.rope_heads * self.rope


class NormalizedProjections(nn.Module):
    """The trained projections of a family that normalizes the query and key of each head.

    Such a norm is not linear, so no single matrix can replace projection and norm.
    """

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module, query_norm: nn.Module, key_norm: nn.Module):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = query, key, value
        self.q_norm, self.k_norm = query_norm, key_norm

    @classmethod
    def copy(cls, projections: Projections) -> NormalizedProjections:
        """Copy the projections and norms of a layer. The value bias is left out, because it is added to the output."""
        query = _linear(projections.query, projections.query_bias)
        key = _linear(projections.key, projections.key_bias)
        value = _linear(projections.value, None)
        assert projections.query_norm is not None and projections.key_norm is not None
        return cls(query, key, value, copy.deepcopy(projections.query_norm), copy.deepcopy(projections.key_norm))

    def forward(self, hidden: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Project and normalize hidden states `[batch, length, hidden]`.

        Returns:
            Normalized queries `[batch, length, heads, head_dim]`, and normalized keys concatenated with values
            `[batch, length, 2 * kv_heads * head_dim]`.
        """
        query, key = (linear(hidden).unflatten(-1, (-1, head_dim)) for linear in (self.q_proj, self.k_proj))
        return self.q_norm(query), torch.cat((self.k_norm(key).flatten(-2), self.v_proj(hidden)), -1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with copies of a weight and a bias."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


class LatentAttention(nn.Module):
    """The projections of latent attention, which replace the query, key and value projections of a layer.

    Parameters have DeepSeek's names where DeepSeek has them. `forward` returns the queries and the tensors to cache;
    the function `attention` computes the attention over them.
    """

    frequency: Tensor

    def __init__(self, sizes: LatentSizes, features: NormalizedProjections | None = None, **factory: Any) -> None:
        super().__init__()
        self.sizes, self.weight_cache = sizes, EffectiveWeightCache()
        self.nope, self.rope, self.rank, self.value_dim = sizes.nope, sizes.rope, sizes.rank, sizes.head_dim
        self.rope_heads, self.split = sizes.rope_heads, sizes.split
        width = sizes.heads * (sizes.nope + sizes.rope)
        self.features = features
        if features is None:
            self.q_proj = nn.Linear(sizes.hidden, width, bias=sizes.query_bias, **factory)
            states = sizes.hidden
        else:
            self.query_mix = nn.Parameter(torch.empty(sizes.heads, width // sizes.heads, sizes.head_dim, **factory))
            bound = sizes.head_dim**-0.5
            nn.init.uniform_(self.query_mix, -bound, bound)
            states = 2 * sizes.kv_heads * sizes.head_dim
        self.kv_a_proj_with_mqa = nn.Linear(states, sizes.cached, bias=sizes.rope_bias, **factory)
        self.kv_a_layernorm = nn.RMSNorm(sizes.rank, eps=1e-6, **factory) if sizes.norm else None
        up_key = sizes.up_heads * sizes.nope
        self.k_b_proj = nn.Linear(sizes.rank, up_key, bias=False, **factory) if up_key else None
        self.v_b_proj = nn.Linear(sizes.rank, sizes.up_heads * sizes.head_dim, bias=sizes.value_bias, **factory)
        if self.v_b_proj.bias is not None:
            nn.init.zeros_(self.v_b_proj.bias)
        index = torch.zeros(sizes.rope_heads, sizes.rope // 2, dtype=torch.int64, device=factory.get("device"))
        self.register_buffer("frequency", index)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, latents and rotated keys of new tokens.

        Args:
            hidden: `[batch, length, hidden]`.
            cos: cosines of every trained frequency, `[batch | 1, length, rotary_dim / 2]`.
            sin: sines of every trained frequency, `[batch | 1, length, rotary_dim / 2]`.

        Returns:
            Queries `[batch, heads, length, nope + rope]`, and the tensors to cache: latents `[batch, 1, length, rank]`
            (twice the rank if `split`) and keys `[batch, 1, length, rope_heads * rope]`.
        """
        if self.features is None:
            query = self.q_proj(hidden).unflatten(-1, (self.sizes.heads, -1))
            compressed = self.kv_a_proj_with_mqa(hidden)
        else:
            query, states = self.features(hidden, self.sizes.head_dim)
            query = torch.einsum("bnhd,hed->bnhe", query, self.query_mix.to(query.dtype))
            compressed = self.kv_a_proj_with_mqa(states)
        latent, shared = compressed.split((self.sizes.latent, self.rope_heads * self.rope), -1)
        if self.kv_a_layernorm is not None:
            latent = self.kv_a_layernorm(latent)
        cos, sin = cos[..., self.frequency], sin[..., self.frequency]  # [batch | 1, length, rope_heads, rope / 2]
        shared = rotate(shared.unflatten(-1, (self.rope_heads, self.rope)), cos, sin).flatten(-2)
        group = self.sizes.heads // self.rope_heads
        if self.rope_heads > 1:
            cos, sin = cos.repeat_interleave(group, -2), sin.repeat_interleave(group, -2)
        nope, rope = query.split((self.nope, self.rope), -1)
        query = torch.cat((nope, rotate(rope, cos, sin)), -1)
        return query.transpose(1, 2), latent.unsqueeze(1), shared.unsqueeze(1)

    @property
    def value_bias(self) -> Tensor | None:
        """Return the bias of the values, `[up_heads * head_dim]`, or None.

        It belongs to a submodule whose forward runs: hooks would not load an offloaded parameter of this module.
        """
        return self.v_b_proj.bias

    @property
    def groups(self) -> int:
        """Return the number of query heads for each head of the expanded keys and values."""
        return self.sizes.heads // self.sizes.up_heads

    def up(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the up-projections of keys and values, without the value bias."""
        key, value, _ = self.effective_weights(like)
        return key, value

    def effective_weights(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        value, bias = self.weight_cache.weight("value", self.v_b_proj, self.rank, like)
        value = value.view(-1, self.value_dim, self.rank)
        value_bias = None if bias is None else bias.view(-1, self.value_dim)
        if self.k_b_proj is None:
            return value.new_zeros(len(value), 0, self.rank), value, value_bias
        key, _ = self.weight_cache.weight("key", self.k_b_proj, self.rank, like)
        return key.view(-1, self.nope, self.rank), value, value_bias

    def expand(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        latent = latent.squeeze(1)
        on_keys, on_values = latent.chunk(2, -1) if self.split else (latent, latent)
        up_heads = self.sizes.up_heads
        value = self.v_b_proj(on_values).unflatten(-1, (up_heads, self.value_dim)).transpose(1, 2)
        shared = shared.squeeze(1).unflatten(-1, (self.rope_heads, self.rope)).transpose(1, 2)
        shared = shared.repeat_interleave(up_heads // self.rope_heads, 1)
        if self.k_b_proj is None:
            return shared, value
        nope = self.k_b_proj(on_keys).unflatten(-1, (up_heads, self.nope)).transpose(1, 2)
        return torch.cat((nope, shared.to(nope.dtype)), -1), value

    def clear(self) -> None:
        self.weight_cache.clear()

    @torch.no_grad()
    def load_conversion(self, latents: Latents, projections: Projections) -> LatentAttention:
        """Copy the weights of a conversion into this module, and return it."""
        work, heads = projections.work_dtype, self.sizes.heads
        key, value = projections.key.to(work), projections.value.to(work)
        query = latents.query.to(work, copy=True)
        # The model may scale cos and sin. Dimensions that lose their rotation lose this factor on both query and key,
        # so its square goes into the query.
        query[:, : self.nope, : projections.rotary_dim] *= projections.rotation_scale**2
        if self.features is None:
            by_head = projections.query.to(work).unflatten(0, (heads, -1))
            self.q_proj.weight.copy_(torch.matmul(query, by_head).flatten(0, 1))
            states = torch.cat((key, value))
            down = torch.cat((latents.down.to(work) @ states, latents.rope_key.to(work) @ key))
            if projections.query_bias is not None:
                bias = projections.query_bias.to(work).view(heads, -1, 1)
                self.q_proj.bias.copy_(torch.matmul(query, bias).flatten())
        else:
            self.query_mix.copy_(query)
            rope_key = nn.functional.pad(latents.rope_key.to(work), (0, len(value)))
            down = torch.cat((latents.down.to(work), rope_key))
        self.kv_a_proj_with_mqa.weight.copy_(down)
        if projections.key_bias is not None and self.features is None:
            self.kv_a_proj_with_mqa.bias.zero_()
            rope_bias = latents.rope_key.to(work) @ projections.key_bias.to(work)
            self.kv_a_proj_with_mqa.bias[self.sizes.latent :] = rope_bias.to(self.kv_a_proj_with_mqa.bias.dtype)
        if projections.value_bias is not None:
            bias = projections.value_bias.view(projections.kv_heads, 1, -1)
            self.v_b_proj.bias.copy_(bias.expand(-1, self.sizes.up_heads // projections.kv_heads, -1).flatten())
        if self.kv_a_layernorm is not None and latents.norm is not None:
            self.kv_a_layernorm.weight.copy_(latents.norm)
        if self.k_b_proj is not None:
            self.k_b_proj.weight.copy_(latents.up_key.flatten(0, 1))
        self.v_b_proj.weight.copy_(latents.up_value.flatten(0, 1))
        self.frequency.copy_(latents.frequency)
        return self


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + rope / 2) of `x` `[..., rope]` by angles given as cos and sin `[..., rope / 2]`."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
