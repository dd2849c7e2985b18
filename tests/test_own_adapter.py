"""An adapter that somebody wrote: right ones pass, wrong ones are found out by running the model."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from pe_patch import ADAPTERS, Adapter, PePatchError, UnsupportedError, patch_model, unpatch_model

from .families import EXPERTS, GROUPED, VOCABULARY, build

IDS = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(5))
PAIRED = Adapter(interleaved_pairs=True)
SMALL = GROUPED | EXPERTS | {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1}
UNSUPPORTED = {
    "ernie4_5": PAIRED,
    "ernie4_5_moe": PAIRED,
    "glm4_moe": Adapter(),
    "jais2": Adapter(),
    "diffllama": Adapter(),
    "cohere2_moe": Adapter(layout="interleaved", interleaved_pairs=True, full_precision_product=True),
    "laguna": Adapter(rotary_per_layer_type=True),
    "flint": Adapter(rotates="sliding_window"),
    "vaultgemma": Adapter(),
}
"""Families without a row, and what is right for them, read from their source."""
LAYERS = {"flint": 4}
IDENTITY = {"group": 1, "window": 8, "original_max_position_embeddings": 64}
"""Self-Extend with a group of one token is RoPE (Jin et al. 2024), rotated at the scores."""


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def unsupported(family, **settings):
    return build(family, **{**SMALL, "num_hidden_layers": LAYERS.get(family, 2), **settings})


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_the_right_adapter_gives_the_models_own_rotation(family):
    assert family not in ADAPTERS
    model = unsupported(family)
    native = logits(model)
    patch_model(model, "self_extend", adapter=UNSUPPORTED[family], on_existing="replace", **IDENTITY)
    torch.testing.assert_close(logits(model), native, rtol=0, atol=1e-5 * float(native.abs().max()))
    unpatch_model(model)
    assert torch.equal(logits(model), native)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", ["ernie4_5", "glm4_moe", "cohere2_moe", "jais2"])
def test_a_wrong_pairing_or_layout_is_found_out(family, pairs, layout):
    right = UNSUPPORTED[family]
    adapter = replace(right, layout=layout, interleaved_pairs=pairs)
    model = unsupported(family)
    native = logits(model)
    if adapter == right:
        return
    with pytest.raises(PePatchError, match=r"Adapter\((.*)\) fits") as caught:
        patch_model(model, "self_extend", adapter=adapter, on_existing="replace", **IDENTITY)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, TypeError)
    if layout != right.layout:
        assert f"layout={right.layout!r}" in str(caught.value)
    if pairs != right.interleaved_pairs:
        assert f"interleaved_pairs={right.interleaved_pairs}" in str(caught.value)
    assert torch.equal(logits(model), native)
    patch_model(model, "self_extend", adapter=right, on_existing="replace", **IDENTITY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("std", [0.02, 0.15])
def test_half_precision_and_weights_as_they_are_initialised_hide_nothing(std, dtype):
    """With weights of 0.02 every query looks at all keys alike, so that no logit shows the rotation."""
    for adapter, passes in ((PAIRED, True), (Adapter(), False)):
        model = unsupported("ernie4_5", std=std, dtype=dtype)
        if passes:
            patch_model(model, "dynamic_ntk", adapter=adapter)
        else:
            with pytest.raises(ValueError, match="interleaved_pairs=True"):
                patch_model(model, "dynamic_ntk", adapter=adapter)


def test_a_static_rotation_needs_no_pairing_and_warns(caplog):
    """It happens in the family's own function."""
    model = unsupported("ernie4_5")
    native = logits(model)
    with caplog.at_level(logging.WARNING, logger="pe_patch"):
        patch_model(model, "rope", adapter=Adapter())
    assert "Adapter(interleaved_pairs=True) fits" in caplog.text
    assert torch.equal(logits(model), native)


def test_a_rotation_the_other_way_round_is_refused_at_the_scores():
    """NanoChat turns by the negative angle (`rotate_half` gives [x2, -x1])."""
    model = unsupported("nanochat")
    native = logits(model)
    with pytest.raises(ValueError, match="the other way round"):
        patch_model(model, "self_extend", adapter=Adapter(), **IDENTITY)
    patch_model(model, "rope", adapter=Adapter())
    assert torch.equal(logits(model), native)


def test_layers_that_do_not_rotate_are_named():
    model = unsupported("flint")
    still = [i for i, layer in enumerate(model.model.layers) if layer.self_attn.sliding_window is None]
    named = ", ".join(map(str, still))
    with pytest.raises(ValueError, match=rf"Layers {named} do not rotate at all: give rotates="):
        patch_model(model, "self_extend", adapter=Adapter(), **IDENTITY)


WRONG = {
    "attention": ({"attention": "attn"}, "has no 'attn'. Its modules are: input_layernorm, mlp"),
    "layers": ({"layers": "layer"}, "has no 'layer'. Did you mean 'layers'?"),
    "no list": ({"layers": "norm"}, "is a LlamaRMSNorm and not a list of layers"),
    "rotary": ({"rotary": "rotary"}, "has no 'rotary'. Did you mean 'rotary_emb'?"),
    "not rotary": ({"rotary": "norm"}, "lacks frequencies under the name inv_freq"),
    "no rotary": ({"rotary": None}, "Give Adapter(rotary='rotary_emb')"),
    "layout": ({"layout": "half"}, "not one of halves, interleaved, single, sin_first, complex"),
    "rotates": ({"rotates": "use_rope"}, "has no 'use_rope'"),
    "learned": ({"learned": "wpe"}, "has no 'wpe'"),
    "multiplier": ({"embedding_multiplier": "scale"}, "has no 'scale'"),
    "rotary_per_layer_type": ({"rotary_per_layer_type": True}, "no layer_types for 2 layers"),
    "number": ({"layers": 4}, "not the name of an attribute"),
    "path": ({"layers": "decoder.layers"}, "has no 'decoder'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_names_that_lead_nowhere(wrong):
    fields, message = WRONG[wrong]
    model = build("llama")
    with pytest.raises(PePatchError) as caught:
        patch_model(model, "rope", adapter=Adapter(**fields))
    assert message in str(caught.value)
    assert isinstance(caught.value, UnsupportedError | ValueError)


@pytest.mark.parametrize(
    "family", ["llama", "gpt_neox", "deepseek_v2", "llama4_text", "gemma3_text", "olmo3", "gpt_oss"]
)
def test_the_rows_of_the_table_prove_themselves(family):
    model = build(family)
    layers = {"layers": [3]} if family == "gemma3_text" else {}
    patch_model(model, "dynamic_ntk", adapter=ADAPTERS[family], **layers)
    unpatch_model(model)


class Holder(torch.nn.Module):
    """A module that holds a table and looks positions up in it."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, *arguments):
        return self.table(*arguments)


def test_only_the_table_of_positions_may_be_deeper_than_the_base_model():
    with pytest.raises(PePatchError, match=r"rotary='model.rotary_emb', which must be an attribute of the base"):
        patch_model(build("llama"), "yarn", factor=2, adapter=Adapter(rotary="model.rotary_emb"))
    plain, moved = build("gpt2"), build("gpt2")
    moved.transformer.wpe = Holder(moved.transformer.wpe)
    native = logits(moved)
    for model, learned in ((plain, "wpe"), (moved, "wpe.table")):
        row = Adapter(layers="h", attention="attn", rotary=None, learned=learned)
        patch_model(model, "rope", adapter=row)
    assert torch.equal(logits(plain), logits(moved)) and not torch.allclose(logits(moved), native, atol=1e-3)
    unpatch_model(moved)
    assert torch.equal(logits(moved), native)
