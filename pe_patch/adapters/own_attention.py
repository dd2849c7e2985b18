"""Adapt families that compute attention in their own code and drop keywords on the way to it: GPT-J, CodeGen, MPT,
GPT-Neo, GPT NeoX Japanese, XGLM and Falcon.

The functions here are bound to the instance by swaps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..attention.interface import BACKENDS, attend
from ..core.handover import current_value
from ..errors import UnsupportedError

POSITIONS = "positions"
"""Name under which `adapters.bloom.keep_positions` hands the positions of a pass to the attentions."""


def carry_to_attention(
    base: Any, kwargs: dict[str, Any], positions: Any, position_ids: Tensor | None
) -> dict[str, Any]:
    """Return the keywords of a pass with positions for `keep_positions`."""
    return {**kwargs, "pe_positions": positions}


def score(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
    """Return the output `[batch, heads, tokens, head]` and the weights of an attention with a method for its scores.

    Stands in for the method `compat.SCORE_METHOD` of GPT-J, CodeGen, GPT-Neo and GPT NeoX Japanese. Queries, keys and
    values are `[batch, heads, tokens, head]`.
    """
    if getattr(self, "attention_type", "global") == "local":
        attention_mask = within_window(attention_mask, query, key, self.config.window_size)
    # GPT-Neo does not scale its scores.
    divisor = next((float(getattr(self, name)) for name in ("scale_attn", "norm_factor") if hasattr(self, name)), 1.0)
    dropout = self.attn_dropout if hasattr(self, "attn_dropout") else self.attention_dropout
    output, weights = attend(
        self, query.to(value.dtype), key.to(value.dtype), value, attention_mask, backend=BACKENDS["eager"],
        scaling=1 / divisor, dropout=dropout.p if self.training else 0.0, positions=carried_positions(self),
    )  # fmt: skip
    return output.transpose(1, 2), weights


def carried_positions(attention: Any) -> Any:
    """Return the positions of this pass, which `keep_positions` holds.

    Raises:
        UnsupportedError: there are none.
    """
    positions = current_value(POSITIONS, attention.__dict__["pe_owner"])
    if positions is None and attention.__dict__.get("pe_scheme") is not None:
        raise UnsupportedError(
            f"No positions reach {type(attention).__name__} here. Gradient checkpointing computes it again outside the "
            "model's forward, and this family has no argument for positions: turn gradient checkpointing off."
        )
    return positions


def within_window(mask: Tensor | None, query: Tensor, key: Tensor, window: int) -> Tensor:
    """Return the additive mask `[batch | 1, 1, query, key]` with the keys hidden that are `window` tokens away or more.

    A mask of None is causal.
    """
    count, total = query.shape[2], key.shape[2]
    distance = torch.arange(total - count, total, device=query.device)[:, None] - torch.arange(
        total, device=query.device
    )
    hidden = (distance >= window) | ((distance < 0) if mask is None else torch.zeros_like(distance, dtype=torch.bool))
    lowest = torch.finfo(query.dtype).min
    base = torch.zeros(1, 1, count, total, dtype=query.dtype, device=query.device) if mask is None else mask
    return base.masked_fill(hidden, lowest)


def xglm_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Compute XGLM's attention through this library's attention function.

    The arguments are those of XGLM's attention. No model of this family attends to an encoder.
    """
    query, key, value = (
        project(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    past = compat.cache_in(kwargs)
    if past is not None:
        key, value = past.update(key, value, self.layer_idx)
    output, weights = attend(
        self, query, key, value, attention_mask, backend=BACKENDS["eager"], scaling=self.scaling,
        dropout=self.dropout if self.training else 0.0, positions=carried_positions(self),
    )  # fmt: skip
    return self.out_proj(output.flatten(2)), weights


def falcon_attention(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Compute the attention of a Falcon model that rotates through this library's attention function.

    The arguments are those of Falcon's attention.
    """
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    assert position_embeddings is not None
    fused = self.query_key_value(hidden_states)
    query, key, value = (part.transpose(1, 2) for part in getattr(self, compat.FALCON_SPLIT)(fused))
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    # Falcon leaves its dropout out where it rotates.
    output, weights = attend(
        self, query, key, value, attention_mask, backend=BACKENDS["eager"], scaling=self.inv_norm_factor,
        positions=carried_positions(self),
    )  # fmt: skip
    return self.dense(output.flatten(2)), weights


def falcon_refuses(config: Any) -> str | None:
    """Return why a Falcon model cannot be patched, or None."""
    return "has ALiBi in its own attention code, beside a rotary module without a use" if config.alibi else None


class _EveryDevice:
    """Compares equal to every device."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class StillTable:
    """Stand in for the table of sines and cosines of a CodeGen attention: every position has sin 0 and cos 1.

    Args:
        width: number of entries of a row, the sines first.
        dtype: dtype of the table.
    """

    device = _EveryDevice()

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype

    def __getitem__(self, position_ids: Tensor) -> Tensor:
        """Return the rows of position ids, `[batch, tokens, width]`."""
        row = torch.cat((torch.zeros(self.width // 2), torch.ones(self.width - self.width // 2)))
        return row.to(position_ids.device, self.dtype).expand(*position_ids.shape, -1)


def still_positions(self: Any, position_ids: Tensor) -> Tensor:
    """Return rows of sin 0 and cos 1 for all positions up to the largest, `[batch, positions, width]`, for GPT-J."""
    native = self.embed_positions
    upto = torch.arange(int(position_ids.max()) + 1, device=position_ids.device)
    return StillTable(native.shape[1], native.dtype)[upto.expand(position_ids.shape[0], -1)]


def carry_with_mask(base: Any, kwargs: dict[str, Any], positions: Any, position_ids: Tensor | None) -> dict[str, Any]:
    """Return the keywords of a pass over MPT with positions for `keep_positions`, and with a mask, which it needs.

    Raises:
        UnsupportedError: its ALiBi has other slopes than those of the paper.
    """
    steepest = base.config.attn_config.alibi_bias_max
    if steepest != 8:
        raise UnsupportedError(f"alibi_bias_max={steepest} is not supported: the slopes of ALiBi's paper need 8.")
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    past = compat.cache_in(kwargs)
    if not (isinstance(kwargs.get("attention_mask"), Tensor) and kwargs["attention_mask"].ndim == 4):
        embeds = torch.empty((*inputs.shape[:2], 1), device=inputs.device, dtype=base.wte.weight.dtype)
        kwargs["attention_mask"] = compat.layer_mask(
            "full_attention", past, config=base.config, inputs_embeds=embeds,
            attention_mask=kwargs.get("attention_mask"), position_ids=position_ids if past is None else None,
        )  # fmt: skip
    return {**kwargs, "pe_positions": positions}


def positions_as_bias(base: Any, *_: Any, **__: Any) -> Any:
    """Return the positions of this pass, which MPT passes to its layers in place of a bias."""
    return current_value(POSITIONS, base)


def mpt_attention(
    self: Any,
    hidden_states: Tensor,
    position_bias: Any,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Compute MPT's attention through this library's attention function.

    `position_bias` holds the positions of the pass. The mask is true where MPT hides a key. The other arguments are
    those of MPT's attention.
    """
    projected = self.Wqkv(hidden_states)
    if self.clip_qkv:
        projected = projected.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = (
        part.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for part in projected.chunk(3, dim=-1)
    )
    past = compat.cache_in(kwargs)
    if past is not None:
        key, value = past.update(key, value, self.layer_idx)
    mask = None
    if attention_mask is not None:
        hidden = attention_mask[..., : key.shape[2]]
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill(hidden, torch.finfo(query.dtype).min)
    output, weights = attend(
        self, query, key, value, mask, backend=BACKENDS["eager"], scaling=self.softmax_scale,
        dropout=self.attn_dropout_p if self.training else 0.0, positions=position_bias,
    )  # fmt: skip
    return self.out_proj(output.flatten(2)), weights


def still_rotation(attention: nn.Module) -> tuple[str, object]:
    """Return the attribute of a GPT-J or CodeGen attention that rotates, and what stops it."""
    owner: Any = attention
    if hasattr(owner, compat.EMBED_POSITIONS):
        return compat.EMBED_POSITIONS, still_positions
    return "embed_positions", StillTable(owner.embed_positions.shape[1], owner.embed_positions.dtype)
