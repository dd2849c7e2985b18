"""The attention function that every patched layer calls, registered with Transformers' `AttentionInterface`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..core.positions import Positions
from ..errors import NoEffectError
from .backends import BACKENDS, BY_IMPLEMENTATION, NO_PAGING, Backend, Output, backend_for, check_backend
from .engine import Engine
from .parallel import check_context_parallel, local_heads, local_sinks, mask_of_layer, sequence_of

__all__ = ["BACKENDS", "BY_IMPLEMENTATION", "NO_PAGING", "Backend", "Engine", "attend", "backend_for", "check_backend"]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    backend: Backend,
    scaling: float | None,
    dropout: float = 0.0,
    positions: Positions | None,
    cached: bool | None = None,
    **extra: Any,
) -> Output:
    """Compute the attention of one layer with the scheme that is bound to it, or natively if there is none.

    Args:
        module: the attention module.
        query: `[batch, heads, query, head]`.
        key: `[batch, key_heads, key, head]`.
        value: `[batch, key_heads, key, head]`.
        mask: `[batch | 1, 1, query | 1, key]`, boolean or additive, or a `BlockMask`; None for a plain causal pass.
        backend: the backend that computes the attention.
        scaling: factor on the dot products; None for `head ** -0.5`.
        dropout: dropout probability of the attention weights in training.
        positions: positions of the queries and keys; None if the patched model did not pass any.
        cached: whether this pass uses a cache; None if unknown.
        extra: further keyword arguments of the family's attention: soft cap, sinks, sliding window.

    Returns:
        The output `[batch, query, heads, head]`, and the weights `[batch, heads, query, key]` or None.

    Raises:
        NoEffectError: the scheme would have no effect, or would see wrong positions.
        UnsupportedError: the backend, or the way heads are split, cannot run this scheme.
    """
    probe = module.__dict__.get("pe_probe")
    if probe is not None:
        probe.append((module, positions, cached))
    sequence = sequence_of(backend.implementation, backend.native_name)
    if sequence is not None:
        masks = None if positions is None else positions.masks
        mask = mask_of_layer(module, masks, extra.get("sliding_window"))
        # DeepSpeed changes this attribute when it repeats key heads, and does not restore it.
        module.__dict__["num_key_value_groups"] = query.shape[1] // key.shape[1]
        if "s_aux" in extra:
            extra["s_aux"] = local_sinks(extra["s_aux"], query, sequence)
    engine = Engine(module, mask, query.shape[-1] ** -0.5 if scaling is None else scaling, dropout, backend, extra)
    if module.__dict__.get("pe_left_out", False):
        return engine.native_attention(query, key, value, mask)
    scheme = module.__dict__.get("pe_scheme")
    if cached is False and key.shape[2] > query.shape[2]:
        raise NoEffectError(
            f"{type(module).__name__} got {key.shape[2]} keys in a pass over {query.shape[2]} tokens without a cache. "
            "Transformers passed it a cache that the patched model did not receive, so positions would be wrong. Run "
            "`pe-patch selftest`."
        )
    if positions is not None and "pe_layer" not in module.__dict__:
        raise NoEffectError(
            f"This {type(module).__name__} was added to the model after patching, so the scheme would have no effect "
            "in it. Call unpatch_model(model), change the model, and patch it again."
        )
    if scheme is None:
        shift = module.__dict__.get("pe_shift")
        return (
            engine.native_attention(query, key, value, mask)
            if shift is None
            else shift(engine, query, key, value, mask)
        )
    check_context_parallel(module, scheme.name)
    if positions is None:
        raise NoEffectError(
            f"No positions reached {type(module).__name__}, so {scheme.name!r} would have no effect there. Call the "
            "model or its base model instead of a layer, or call unpatch_model(model) to run layers alone."
        )
    if isinstance(mask, Tensor) and mask.shape[2] == 1:  # one row of the mask for all queries
        engine.mask = mask.expand(-1, -1, query.shape[2], -1)
    engine.heads = local_heads(module, query, key, scheme, sequence)
    positions, device_type = positions.fit(key.shape[2]), query.device.type
    if scheme.calls_modules or not torch.is_autocast_enabled(device_type):
        return scheme("attend", query, key, value, positions, engine)
    # Autocast leaves queries and values in different dtypes, and would round positions inside a scheme's products.
    query, key, value = (tensor.to(torch.get_autocast_dtype(device_type)) for tensor in (query, key, value))
    with torch.autocast(device_type, enabled=False):
        return scheme("attend", query, key, value, positions, engine)


def _register(backend: Backend) -> None:
    """Register the attention and mask functions of a backend with Transformers."""

    def interface(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        pe_positions: Positions | None = None,
        pe_cached: bool | None = None,
        **extra: Any,
    ) -> Output:
        output, weights = attend(
            module, query, key, value, attention_mask, backend=backend, scaling=scaling, dropout=dropout,
            positions=pe_positions, cached=pe_cached, **extra,
        )  # fmt: skip
        return output.contiguous(), weights  # some families view it, as Transformers' own functions allow

    interface.pe_backend = backend  # `sequence_of` detects by its absence that another function replaced this one
    AttentionInterface.register(backend.implementation, interface)
    AttentionMaskInterface.register(backend.implementation, backend.mask)


for _backend in BACKENDS.values():
    _register(_backend)
