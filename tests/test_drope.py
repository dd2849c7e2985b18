"""DroPE against the host fed as its authors feed it: (ones, zeros) for cos and sin, and a softmax scale."""

from __future__ import annotations

import pytest
import torch

from pe_patch import ADAPTERS, SCHEMES, PePatchError, UnsupportedError, describe, patch_model, unpatch_model

from . import families
from .models import BACKENDS, FAMILIES, build, cached_logits, error, logits, snapshot, tokens, unchanged


def unrotated(family: str, scale: float):
    """The host's own model whose joints are made to say nothing, and whose scores are scaled."""
    model = build(family)
    if family == "bloom":
        base = model.transformer
        base.build_alibi_tensor = lambda mask, heads, dtype: torch.zeros(
            mask.shape[0] * heads, 1, mask.shape[1], dtype=dtype
        )
        for layer in base.h:
            layer.self_attention.inv_norm_factor *= scale
        return model
    base = model.base_model
    native = base.rotary_emb.forward

    def dropped(x, position_ids):
        cos, sin = native(x, position_ids)
        return torch.ones_like(cos), torch.zeros_like(sin)

    base.rotary_emb.forward = dropped
    for layer in base.layers:
        attention = layer.self_attn if family == "llama" else layer.attention
        attention.scaling *= scale
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_host_without_rotation(family, scale, backend):
    ids = tokens(2, 40)
    ones = torch.ones_like(ids)
    expected = logits(unrotated(family, scale), ids, attention_mask=ones)
    model = build(family)
    before = snapshot(model)
    assert error(before["logits"], logits(unrotated(family, scale), ids[:, :20], attention_mask=ones[:, :20])) > 1e-2
    patch_model(model, "drope", softmax_scale=scale, backend=backend)
    assert error(logits(model, ids), expected) < 1e-5
    assert error(cached_logits(model, ids, 35), expected) < 1e-5
    unpatch_model(model)
    assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_scale_it_is_nope_bit_for_bit(family):
    model, ids = build(family), tokens(2, 40)
    patch_model(model, "nope")
    expected = logits(model, ids)
    patch_model(model, "drope", on_existing="replace")
    assert torch.equal(logits(model, ids), expected)
    assert describe(model).scheme == "drope"


DROPPING = sorted(
    name
    for name, adapter in ADAPTERS.items()
    if not adapter.forwards_kwargs and adapter.at_scores is None and name in families.LANGUAGE_MODELS
)


@pytest.mark.parametrize("family", DROPPING)
def test_without_a_scale_it_needs_no_positions_at_the_scores(family):
    model, ids = families.build(family), tokens(1, 20)
    native = logits(model, ids)
    patch_model(model, "drope")
    dropped = logits(model, ids)
    assert error(dropped, native) > 1e-2
    with pytest.raises(UnsupportedError, match="drops keywords"):
        patch_model(model, "drope", softmax_scale=1.5, on_existing="replace")
    assert torch.equal(logits(model, ids), dropped)


def test_it_says_that_it_must_be_trained(caplog):
    patch_model(build("llama"), "drope")
    assert "'drope' replaces the 'rope'" in caplog.text and "must be trained" in caplog.text


@pytest.mark.parametrize("name", ["nope", "drope"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_and_keeping_contradict(family, name):
    with pytest.raises(PePatchError, match="keep_native=True leaves"):
        patch_model(build(family), name, keep_native=True)


def test_the_scale_is_checked():
    for scale in (0, -1.0, float("inf"), True, "1"):
        with pytest.raises(PePatchError, match="softmax_scale="):
            patch_model(build("llama"), "drope", softmax_scale=scale)
    assert SCHEMES["drope"].mechanism == "none"
