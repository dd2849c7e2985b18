"""Attention over latents, expanded to keys and values or absorbed into queries and outputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.projections import Latents, Projections
from .folding import Folding

MOST_QUERIES = 256
"""Beyond this many queries in a pass, keys and values are expanded and the fast kernels used, whatever the sizes."""
MOST_SCORES = 2**25
"""Numbers that absorbed attention holds as scores at a time."""


class LatentHeads(Protocol):
    """What attention over latents needs to know of a layer."""

    nope: int
    """Numbers of a query or key that do not rotate."""
    rope: int
    value_dim: int
    rank: int
    rope_heads: int
    """Heads of the rotary key that is cached; one in DeepSeek's models."""
    split: bool
    """The latent is one for keys and one for values, side by side."""

    def folded(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The matrices from latents to keys `[up_heads, nope, rank]` and values `[up_heads, value_dim, rank]`, and what
        is added to the values, `[up_heads, value_dim]`. What an adapter adds to the keys adds the same to all scores of
        a query, which softmax ignores."""
        ...

    def expand(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[batch, up_heads, length, nope + rope]` and values `[batch, up_heads, length, value_dim]` from latents
        `[batch, 1, length, rank or twice that]` and rotated keys `[batch, 1, length, rope_heads * rope]`."""
        ...

    def drop(self) -> None:
        """Forget weights that were prepared for decoding."""
        ...


def absorbs(heads: LatentHeads, query: Tensor, latent: Tensor, engine: Any) -> bool:
    """Whether it takes less work to bring the queries to the latents than the latents to the queries.

    For each cached token and head, absorbing costs 2 rank - nope - value_dim more products for every query, and saves
    the rank (nope + value_dim) of expanding the token once.
    """
    count, expanded = query.shape[2], heads.nope + heads.value_dim
    if count >= latent.shape[2] or count > MOST_QUERIES or (engine.dropout and engine.module.training):
        return False
    if count > 1 and engine.mask is None:  # the host says so in a first pass into a static cache
        return False
    return count * (2 * heads.rank - expanded) <= heads.rank * expanded


def absorbed(heads: LatentHeads, query: Tensor, latent: Tensor, shared: Tensor, engine: Any) -> tuple[Tensor, Tensor]:
    """Attention with W_UK brought to the queries and W_UV to the output (DeepSeek-V2, arXiv 2405.04434, section 2.1.2):
    logit = (W_UK^T q_nope) c + q_rope k_rope, output = W_UV sum a c.

    Args:
        query: `[batch, heads, query, nope + rope]`.
        latent: `[batch, 1, key, rank]`, or twice the rank where split.
        shared: rotated keys, `[batch, 1, key, rope_heads * rope]`.

    Returns:
        the output of the heads `[batch, query, heads, value_dim]`, and the weights `[batch, heads, query, key]`.
    """
    up_key, up_value, added = heads.folded(query)
    batch, count, rows = query.shape[0], query.shape[1], query.shape[2]
    latent = latent.squeeze(1)
    on_keys, on_values = latent.chunk(2, -1) if heads.split else (latent, latent)
    nope, rope = query.split((heads.nope, heads.rope), -1)
    shared = shared.view(batch, -1, heads.rope_heads, heads.rope).permute(0, 2, 3, 1)
    scores = torch.matmul(rope.reshape(batch, heads.rope_heads, -1, heads.rope), shared)
    scores = scores.view(batch, count * rows, -1)
    if heads.nope:
        brought = torch.matmul(nope.reshape(batch, len(up_key), -1, heads.nope), up_key)
        scores = torch.baddbmm(scores, brought.view(batch, count * rows, heads.rank), on_keys.transpose(1, 2))
    scores = scores.view(batch, count, rows, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * engine.scaling
    weights = engine.weights(scores).to(query.dtype)
    mixed = torch.matmul(weights.view(batch, count * rows, -1), on_values)
    output = torch.matmul(mixed.view(batch, len(up_value), -1, heads.rank), up_value.transpose(1, 2))
    if added is not None:
        output = output + added[:, None]
    return output.view(batch, count, rows, heads.value_dim).transpose(1, 2), weights


def attention(heads: LatentHeads, query: Tensor, latent: Tensor, shared: Tensor, engine: Any) -> tuple[Tensor, Any]:
    """Attention over latents in whichever of the two ways takes less work; returns what `engine` returns."""
    if query.shape[2] > 1 or query.shape[2] == latent.shape[2]:
        heads.drop()
    if absorbs(heads, query, latent, engine):
        size = max(1, MOST_SCORES // (query.shape[0] * query.shape[1] * latent.shape[2]))
        total, end = query.shape[2], latent.shape[2]
        if size >= total:
            output, weights = absorbed(heads, query, latent, shared, engine)
        else:
            parts = [
                absorbed(heads, query[:, :, i : i + size], latent, shared, engine.part(i, min(i + size, total), end))
                for i in range(0, total, size)
            ]
            output = torch.cat([part[0] for part in parts], 1)
            weights = torch.cat([part[1] for part in parts], 2) if engine.backend.dense else None
        weights = weights if engine.backend.dense else None
    else:
        output, weights = expanded(heads, query, latent, shared, engine)
    return output, weights


def expanded(heads: LatentHeads, query: Tensor, latent: Tensor, shared: Tensor, engine: Any) -> tuple[Tensor, Any]:
    """The same by the ordinary kernels over keys and values made from the latents; all heads get one width, since
    kernels leave their fast path where keys and values differ."""
    key, value = heads.expand(latent, shared)
    width, wide = heads.value_dim, query.shape[-1]
    if not engine.backend.dense:
        value = nn.functional.pad(value, (0, max(wide - width, 0)))
        query, key = (nn.functional.pad(one, (0, max(width - wide, 0))) for one in (query, key))
    output, weights = engine.host(query, key, value, engine.mask)
    return output[..., :width], weights


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of a `LatentAttention`."""

    hidden: int
    heads: int
    up_heads: int
    kv_heads: int
    head_dim: int
    """Of the trained attention, and of the values."""
    nope: int
    rope: int
    rope_heads: int
    rank: int
    split: bool = False
    query_bias: bool = False
    rope_bias: bool = False
    value_bias: bool = False
    norm: bool = False

    @property
    def latent(self) -> int:
        """Numbers of the latent that a token leaves in the cache."""
        return self.rank * (2 if self.split else 1)

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the cache of one layer."""
        return self.latent + self.rope_heads * self.rope


class Features(nn.Module):
    """Queries, keys and values of a family that normalises each head's query and key, which no single matrix makes."""

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module, query_norm: nn.Module, key_norm: nn.Module):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = query, key, value
        self.q_norm, self.k_norm = query_norm, key_norm

    @classmethod
    def copy(cls, of: Projections) -> Features:
        """The same modules with weights of their own. The bias of the values is left out: it is added to the output."""
        pairs = ((of.query, of.query_bias), (of.key, of.key_bias), (of.value, None))
        assert of.query_norm is not None and of.key_norm is not None
        query, key, value = (_linear(*pair) for pair in pairs)
        return cls(query, key, value, copy.deepcopy(of.query_norm), copy.deepcopy(of.key_norm))

    def forward(self, hidden: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Normalised queries `[batch, length, heads, head_dim]`, and normalised keys and values side by side
        `[batch, length, 2 * kv_heads * head_dim]`."""
        query, key = (linear(hidden).unflatten(-1, (-1, head_dim)) for linear in (self.q_proj, self.k_proj))
        return self.q_norm(query), torch.cat((self.k_norm(key).flatten(-2), self.v_proj(hidden)), -1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


class LatentAttention(nn.Module):
    """What stands in the place of an attention's query, key and value projections once it holds latents.

    The names are DeepSeek's where DeepSeek has them. `forward` gives the queries and what is to be cached; `attention`
    does the rest.
    """

    frequency: Tensor

    def __init__(self, sizes: LatentSizes, features: Features | None = None, **factory: Any) -> None:
        super().__init__()
        self.sizes, self.folding = sizes, Folding()
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
        """Queries, latents and rotated keys of new tokens.

        Args:
            hidden: `[batch, length, hidden]`.
            cos, sin: of every trained frequency, `[batch | 1, length, rotary_dim / 2]`.

        Returns:
            queries `[batch, heads, length, nope + rope]`, and what is cached: latents `[batch, 1, length, rank]` (twice
            the rank where split) and keys `[batch, 1, length, rope_heads * rope]`.
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
        shared = turned(shared.unflatten(-1, (self.rope_heads, self.rope)), cos, sin).flatten(-2)
        group = self.sizes.heads // self.rope_heads
        if self.rope_heads > 1:
            cos, sin = cos.repeat_interleave(group, -2), sin.repeat_interleave(group, -2)
        nope, rope = query.split((self.nope, self.rope), -1)
        query = torch.cat((nope, turned(rope, cos, sin)), -1)
        return query.transpose(1, 2), latent.unsqueeze(1), shared.unsqueeze(1)

    @property
    def value_bias(self) -> Tensor | None:
        """`[up_heads * head_dim]`; it stands in a module that is called, since hooks offload what does not."""
        return self.v_b_proj.bias

    @property
    def groups(self) -> int:
        """Query heads to each head of the expanded keys and values."""
        return self.sizes.heads // self.sizes.up_heads

    def up(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices of `folded` alone."""
        key, value, _ = self.folded(like)
        return key, value

    def folded(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        value, bias = self.folding.weight("value", self.v_b_proj, self.rank, like)
        value = value.view(-1, self.value_dim, self.rank)
        added = None if bias is None else bias.view(-1, self.value_dim)
        if self.k_b_proj is None:
            return value.new_zeros(len(value), 0, self.rank), value, added
        key, _ = self.folding.weight("key", self.k_b_proj, self.rank, like)
        return key.view(-1, self.nope, self.rank), value, added

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

    def drop(self) -> None:
        self.folding.drop()

    @torch.no_grad()
    def take(self, latents: Latents, projections: Projections) -> LatentAttention:
        """Fill in the weights of a conversion; returns itself."""
        work, heads = projections.work_dtype, self.sizes.heads
        key, value = projections.key.to(work), projections.value.to(work)
        query = latents.query.to(work, copy=True)
        # Where the model multiplies cos and sin, dims that no longer meet them are multiplied here, for both sides.
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
            turned_bias = latents.rope_key.to(work) @ projections.key_bias.to(work)
            self.kv_a_proj_with_mqa.bias[self.sizes.latent :] = turned_bias.to(self.kv_a_proj_with_mqa.bias.dtype)
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


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` `[..., rope]`, whose pairs are (i, i + rope / 2), by angles given as cos and sin `[..., rope / 2]`."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
