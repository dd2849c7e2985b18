"""Adapt BLOOM, which drops keyword arguments on the way to its layers and builds its bias in its own forward.

The functions here are bound to the instance by swaps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..attention.interface import BACKENDS, attend, backend_for
from ..core.handover import call_with_value, current_value
from ..errors import UnsupportedError


def bloom_attention(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Any,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute BLOOM's attention through this library's attention function.

    `alibi` holds the positions of the pass. The other arguments are those of BLOOM's attention.
    """
    query, key, value = compat.bloom_heads(self, self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    implementation = compat.attention_implementation(self.__dict__["pe_config"])
    backend = BACKENDS["eager"] if output_attentions else backend_for(implementation)
    dropout = self.attention_dropout.p if self.training else 0.0
    output, weights = attend(
        self, query, key, value, attention_mask, backend=backend, scaling=self.inv_norm_factor, dropout=dropout,
        positions=alibi,
    )  # fmt: skip
    output = self.dense(output.flatten(2))
    return residual + nn.functional.dropout(output, self.hidden_dropout, self.training), weights


def carry_positions(base: Any, kwargs: dict[str, Any], positions: Any, position_ids: Tensor | None) -> dict[str, Any]:
    """Return the keywords of a pass with positions for `keep_positions`, and with a mask.

    Without a mask BLOOM builds its bias inline, so this adds one. Position ids that restart mean packed documents,
    which BLOOM itself does not support; a 4-D mask separates them.

    Raises:
        UnsupportedError: `slow_but_exact=True`.
    """
    if getattr(base.config, "pretraining_tp", 1) > 1 and getattr(base.config, "slow_but_exact", False):
        raise UnsupportedError("slow_but_exact=True splits the projection after attention; set it to False to patch.")
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    past = compat.cache_in(kwargs)
    if kwargs.get("attention_mask") is None:
        mask = None
        if position_ids is not None and past is None:
            embeds = torch.empty((*inputs.shape[:2], 1), device=inputs.device, dtype=base.word_embeddings.weight.dtype)
            mask = compat.layer_mask(
                "full_attention", None, config=base.config, inputs_embeds=embeds, attention_mask=None,
                position_ids=position_ids,
            )  # fmt: skip
        if mask is None:
            length = past.get_mask_sizes(inputs.shape[1], 0)[0] if past is not None else inputs.shape[1]
            mask = torch.ones(inputs.shape[0], length, dtype=torch.long, device=inputs.device)
        kwargs["attention_mask"] = mask
    kwargs["pe_positions"] = positions
    return kwargs


def keep_positions(base: Any, inner: Callable[..., Any], **kwargs: Any) -> Any:
    """Store the positions of this pass while BLOOM's own forward runs, which has no argument for them."""
    return call_with_value("positions", base, kwargs.pop("pe_positions", None), inner, **kwargs)


def build_alibi_tensor(base: Any, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Any:
    """Return the positions of this pass, which BLOOM passes to its layers in place of a bias."""
    return current_value("positions", base)
