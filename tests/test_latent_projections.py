"""The weights that a conversion starts from are those that the family's own attention computes with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pe_patch import ADAPTERS, UnsupportedError
from pe_patch.adapters.projections import check_unquantised

from .families import build

PROJECTING = sorted(family for family, adapter in ADAPTERS.items() if adapter.projections is not None)
LENGTH = 7


def read(model, layer=0):
    base, adapter = model.base_model, ADAPTERS[model.config.model_type]
    return adapter.projections.read(adapter.attentions(base)[layer], adapter.shape(base, model.config, layer))


def caught(model, ids):
    """What the attention of the last layer is given, and the queries, keys and values it hands to the interface."""
    from transformers import AttentionInterface

    seen = {}

    def attend(module, query, key, value, *_, **__):
        seen[module.layer_idx] = query, key, value
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("caught", attend)
    try:
        model.config._attn_implementation = "caught"
        attention = ADAPTERS[model.config.model_type].attentions(model.base_model)[-1]

        def catch(module, args, kwargs):
            seen["hidden"] = args[0] if args else kwargs["hidden_states"]

        handle = attention.register_forward_pre_hook(catch, with_kwargs=True)
        # position 0 turns nothing, so what reaches the interface is what was projected
        model.base_model(ids, position_ids=torch.zeros_like(ids), use_cache=False)
        handle.remove()
    finally:
        AttentionInterface._global_mapping.pop("caught", None)
    return seen["hidden"], seen[len(ADAPTERS[model.config.model_type].attentions(model.base_model)) - 1]


def heads(hidden, weight, bias, norm, head_dim):
    projected = nn.functional.linear(hidden, weight, bias).unflatten(-1, (-1, head_dim))
    return (projected if norm is None else norm(projected)).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("family", PROJECTING)
def test_what_is_read_projects_as_the_family_does(family):
    model = build(family)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases and norms are built as zeros and ones, which tell nothing apart
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    hidden, native = caught(model, torch.randint(3, 90, (2, LENGTH), generator=generator))
    found = read(model, -1)
    ours = (
        heads(hidden, found.query, found.query_bias, found.query_norm, found.head_dim),
        heads(hidden, found.key, found.key_bias, found.key_norm, found.head_dim),
        heads(hidden, found.value, found.value_bias, None, found.head_dim),
    )
    assert ours[0].shape[1] == found.heads and ours[1].shape[1] == found.kv_heads
    for expected, actual in zip(native, ours, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
