"""A family is supported because it passes here: patched with what it has by itself, it is what it was."""

from __future__ import annotations

import pytest
import torch

from pe_patch import ADAPTERS, SCHEMES, Adapter, NoEffectError, UnsupportedError, describe, patch_model, unpatch_model

from .families import VOCABULARY, build

TEXT = sorted(name for name, adapter in ADAPTERS.items() if adapter.vision_encoder is None and not adapter.own_bias)
ROTARY = sorted(name for name in TEXT if ADAPTERS[name].native == "rope")
SOFT_CAPPED = {"gemma2"}  # Transformers itself refuses SDPA for these
GLOBAL = {"gemma3_text": {"layers": [3]}}
"""Layers that look far, where the others turn by another base and would be stretched with them."""
LENGTH, PREFIX, PADDING = 24, 16, 5


def attention_of(family: str) -> str | None:
    return "eager" if family in SOFT_CAPPED else None


@torch.no_grad()
def observe(model, ids, mask):
    """Logits of a full pass, of a left-padded one with position ids from the mask, and token by token with a cache."""
    full = model(ids, use_cache=False).logits
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    keywords = {} if model.config.model_type == "bloom" else {"position_ids": positions}
    padded = model(ids, attention_mask=mask, use_cache=False, **keywords).logits[:, PADDING:]
    output = model(ids[:, :PREFIX], use_cache=True)
    steps = [output.logits]
    for index in range(PREFIX, LENGTH):
        output = model(ids[:, index : index + 1], past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits)
    return full, padded, torch.cat(steps, 1)


@pytest.fixture
def tokens():
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask


@pytest.mark.parametrize("family", TEXT)
def test_native_scheme_changes_nothing(family, tokens):
    model = build(family, attention_of(family))
    native = observe(model, *tokens)
    patch_model(model, ADAPTERS[family].native)
    ours = observe(model, *tokens)
    for expected, actual in zip(native, ours, strict=True):
        if ADAPTERS[family].native == "alibi" or ADAPTERS[family].still_rotation is not None:  # at the scores
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
        else:
            assert torch.equal(actual, expected)
    described = describe(model)
    assert len(described.layers) == model.config.num_hidden_layers
    unpatch_model(model)
    for expected, actual in zip(native, observe(model, *tokens), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", TEXT)
def test_generates_under_a_scaling(family, tokens):
    model = build(family, attention_of(family))
    patch_model(model, "yarn", factor=4, **GLOBAL.get(family, {}))
    ids, mask = tokens
    output = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert output.shape == (2, LENGTH + 4)


CARRYING = [name for name in TEXT if ADAPTERS[name].forwards_kwargs]


@pytest.mark.parametrize("family", CARRYING)
def test_positions_reach_every_layer(family, tokens):
    """Each layer is handed the positions of queries and keys, whole, and a bias at its scores changes its output."""
    model = build(family, attention_of(family))
    native = observe(model, *tokens)[0]
    patch_model(model, "alibi")
    base = next(module for module in model.modules() if "pe_patch" in module.__dict__)
    reached: list = []
    attentions = list(ADAPTERS[family].attentions(base).values())
    for attention in attentions:
        attention.__dict__["pe_probe"] = reached
    full, _, cached = observe(model, *tokens)
    first = [(module, positions) for module, positions, _ in reached if positions.key.shape[1] == LENGTH][
        : len(attentions)
    ]
    assert [module for module, _ in first] == attentions
    for _, positions in first:
        assert torch.equal(positions.query, torch.arange(LENGTH)[None])
        assert torch.equal(positions.key, torch.arange(LENGTH)[None])
    torch.testing.assert_close(cached, full, rtol=0, atol=1e-5 * float(full.abs().max()))
    if not ADAPTERS[family].alibi:
        assert (full - native).abs().max() > 1e-3


@pytest.mark.parametrize(
    "family",
    [name for name in ROTARY if ADAPTERS[name].forwards_kwargs and not ADAPTERS[name].bars_rotation_at_scores],
)
def test_rotation_at_the_scores_equals_the_one_before_the_cache(family, tokens):
    """Dynamic NTK within the window turns by the native frequencies, but later: keys are cached as projected."""
    model = build(family, attention_of(family))
    native = observe(model, *tokens)
    patch_model(model, "dynamic_ntk", **GLOBAL.get(family, {}))
    scale = float(native[0].abs().max())
    for expected, actual in zip(native, observe(model, *tokens), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize(
    "family", [name for name in TEXT if not ADAPTERS[name].forwards_kwargs and not ADAPTERS[name].at_scores]
)
def test_a_family_that_drops_keywords_is_refused_by_name(family):
    model = build(family)
    before = {name for name in model.__dict__}
    with pytest.raises(UnsupportedError, match="drops keywords"):
        patch_model(model, "alibi")
    assert {name for name in model.__dict__} == before


def test_late_norm_is_refused_where_the_rotation_would_come_too_late():
    with pytest.raises(UnsupportedError, match="normalises"):
        patch_model(build("hunyuan_v1_dense"), "dynamic_ntk")


def test_layers_without_rotation_stay_without():
    """SmolLM3 leaves some layers without positions; a scheme that rotates at the scores must leave them so too."""
    model = build("smollm3")
    assert [bool(layer.self_attn.use_rope) for layer in model.model.layers] == [True, True, True, False]
    ids = torch.randint(3, VOCABULARY, (1, LENGTH))
    native = model(ids).logits.detach()
    patch_model(model, "dynamic_ntk")
    torch.testing.assert_close(model(ids).logits, native, rtol=0, atol=1e-6 * float(native.abs().max()))


def test_an_unknown_family_says_how_to_write_the_row():
    model = build("bloom")
    model.config.__class__ = type("BloomedConfig", (type(model.config),), {"model_type": "bloomed"})
    with pytest.raises(UnsupportedError, match=r"depends on the order .*Did you mean 'bloom'.*adapter=pe_p"):
        patch_model(model, "rope")


def test_an_adapter_that_does_not_reach_the_layers_is_found_out():
    """BLOOM does not call the attention interface; a row that claims so is caught by running it."""
    model = build("bloom")
    row = Adapter(layers="h", attention="self_attention", rotary=None)
    native = model(torch.ones(1, 3, dtype=torch.long)).logits
    with pytest.raises(NoEffectError, match="Layer 0"):
        patch_model(model, "rope", adapter=row, original_max_position_embeddings=64)
    assert torch.equal(model(torch.ones(1, 3, dtype=torch.long)).logits, native)


def test_the_table_is_long_enough():
    assert len(ROTARY) >= 17 and len(ADAPTERS) >= 23
    assert all(adapter.native in SCHEMES for adapter in ADAPTERS.values())
    assert {"llama", "gpt_neox", "bloom"} <= set(ADAPTERS)
