"""Conversions of models that are not plain: biases beside norms, scaled rotations, frozen weights, towers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from pe_patch import ADAPTERS, describe, load_patched, patch_model, patched, unpatch_model
from pe_patch.errors import OptionError

from .families import build as build_family
from .models import build, error, logits, snapshot, tokens, unchanged

CALIBRATION = tokens(8, 48)
SMALL = {"kv_rank": 16, "calibration": CALIBRATION}


def whole(model, method, **options):
    """The model with every rotary dimension and the full rank kept, which for one key is the width of what it joins."""
    adapter, config = ADAPTERS[model.config.model_type], model.config
    shape = adapter.shape(model.base_model, config)
    kept = shape.rotary_dim if method == "mha2mla" else shape.num_key_value_heads * shape.rotary_dim
    values = shape.num_key_value_heads * shape.head_dim
    resting = shape.num_key_value_heads * (shape.head_dim - shape.rotary_dim)
    rank = {"kv_rank": values + resting, "rope_dim": kept, **options}
    return patch_model(model, "mla", method=method, calibration=CALIBRATION, **rank)


@pytest.mark.parametrize("method", ["transmla", "mha2mla", "svd"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {"attention_bias": True, "num_attention_heads": 8, "head_dim": 8}),
        ("phi", {"qk_layernorm": True, "num_attention_heads": 8}),
    ],
)
def test_biases_beside_norms_count_once(family, settings, method):
    model = build_family(family, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    expected = logits(model, tokens(2, 30))
    whole(model, method)
    assert error(logits(model, tokens(2, 30)), expected) < 1e-5


@pytest.mark.parametrize("method", ["transmla", "mha2mla"])
@pytest.mark.parametrize(("family", "share"), [("llama", 1.0), ("qwen3", 1.0), ("gpt_neox", 0.5)])
def test_a_factor_on_cos_and_sin_reaches_what_no_longer_rotates(family, share, method, tmp_path):
    """Where every token stands at zero nothing rotates, so at the full rank nothing is lost whatever stops rotating."""
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 64}
    scaled |= {"partial_rotary_factor": share} if share < 1 else {}
    model = build_family(family, rope_parameters=scaled, max_position_embeddings=1024)
    assert model.base_model.rotary_emb.attention_scaling > 1.2
    ids = tokens(2, 20)
    still = {"position_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    expected = logits(model, ids, **still)
    shape = ADAPTERS[family].shape(model.base_model, model.config)
    rope = 4
    keys = 1 if method == "transmla" else shape.num_key_value_heads
    rank = min(2 * shape.num_key_value_heads * shape.head_dim - keys * rope, shape.hidden_size)
    whole(model, method, rope_dim=rope, kv_rank=rank)
    assert error(logits(model, ids, **still), expected) < 1e-5
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_patched(tmp_path), ids), logits(model, ids))


def test_new_weights_train_where_the_old_ones_did_and_are_in_their_mode():
    frozen = build("llama").requires_grad_(False)
    patch_model(frozen, "mla", **SMALL)
    assert not [name for name, parameter in frozen.named_parameters() if parameter.requires_grad]
    assert not [name for name, module in frozen.named_modules() if module.training]
    model = build("llama").train()
    patch_model(model, "mla", **SMALL)
    assert all(module.training for module in model.modules())
    new = [parameter for name, parameter in model.named_parameters() if ".mla." in name]
    assert new and all(parameter.requires_grad for parameter in new)


def test_adapters_on_all_linear_layers_leave_what_is_out_of_use_alone():
    peft = pytest.importorskip("peft")
    model = patch_model(build("llama"), "mla", **SMALL)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert any(".mla.k_b_proj." in name for name in names) and not any("original" in name for name in names)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_static_cache_made_before_the_first_pass(family):
    model, ids = build(family), tokens(2, 20)
    patch_model(model, "mla", **SMALL)
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **given)
    found = model.generate(ids, cache_implementation="static", prefill_chunk_size=5, **given)
    assert torch.equal(found, expected)


def test_a_language_model_with_a_tower_beside_it_is_saved_whole(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=build("llama").config, image_token_index=96)
    model = LlavaForConditionalGeneration(config).eval()
    patch_model(model, "mla", submodule="language_model", keep_original=False, **SMALL)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_patched(tmp_path), tokens(2, 20)), logits(model, tokens(2, 20)))


def test_a_width_of_head_that_64_does_not_divide():
    model = build_family("phi3", hidden_size=192, num_attention_heads=2, num_key_value_heads=2, head_dim=96)
    assert describe(patch_model(model, "mla", **SMALL)).options["rope_dim"] == 48


def test_a_share_of_the_cache_beyond_the_full_rank_is_the_full_rank():
    model = build("llama", num_key_value_heads=4)
    patch_model(model, "mla", cache_ratio=0.75, calibration=CALIBRATION)
    assert describe(model).options["kv_rank"] == 64  # the hidden size: no more directions can be seen


@pytest.mark.parametrize("method", ["transmla", "mha2mla", "svd"])
@pytest.mark.parametrize("latent_norm", [False, True])
def test_a_rank_beyond_the_hidden_size_is_held_as_it_is_asked_for(method, latent_norm):
    """GPT-NeoX rotates half of its heads: 96 or 64 dimensions are left of keys and values, and 64 of hidden states."""
    model, ids = build("gpt_neox"), tokens(2, 20)
    expected = logits(model, ids)
    rope = 8 if method == "mha2mla" else 32
    options = {"kv_rank": 96, "rope_dim": rope, "calibration": CALIBRATION, "latent_norm": latent_norm}
    patch_model(model, "mla", method=method, **options)
    if not latent_norm:
        assert error(logits(model, ids), expected) < 1e-5
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[-1] == 96 and cache.layers[0].values.shape[-1] == 32
    assert torch.isfinite(logits(model, ids)).all()


def test_calibration_that_nothing_looks_at_is_told(caplog):
    given = {"kv_rank": 8, "rope_dim": 8, "calibration": CALIBRATION}
    patch_model(build("llama"), "mla", method="mha2mla", select="high", **given)
    assert "ignores calibration=" in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fresh_layers_start_as_transformers_starts_the_others(family):
    """Normal, with the standard deviation of the config."""
    model = build(family)
    patch_model(model, "mla", method="init", kv_rank=16, rope_dim=8)
    for name, parameter in model.named_parameters():
        if ".mla." in name and name.endswith("proj.weight"):
            assert abs(float(parameter.std()) / model.config.initializer_range - 1) < 0.1, name
        if ".mla." in name and name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))


def test_rounding_is_no_growth_of_the_loss():
    """With the full rank and all rotation kept the loss is the original's but for the last digits."""
    model = build("llama")
    patch_model(model, "mla", max_loss=0.0, rope_dim=32, calibration=CALIBRATION)
    assert 1 <= describe(model).options["kv_rank"] <= 32


def test_a_block_that_could_not_be_undone_is_not_entered():
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(OptionError, match="cannot be undone"), patched(model, "mla", keep_original=False, **SMALL):
        pass
    assert unchanged(before, snapshot(model))


def test_an_empty_model_shows_what_would_be_swapped():
    with torch.device("meta"):
        empty = type(build("llama"))(build("llama").config)
    patch_model(empty, "mla", cache_ratio=0.25)
    assert describe(empty).effective["cached_per_token_and_layer"].startswith("16 numbers, 64 before")


def test_calibration_as_tokenizers_and_numpy_give_it():
    ids, mask = CALIBRATION.clone(), torch.ones_like(CALIBRATION)
    ids[3, :10], mask[3, :10] = 0, 0
    rows = [*CALIBRATION[:3].tolist(), CALIBRATION[3, 10:].tolist(), *CALIBRATION[4:].tolist()]
    given = [rows, {"input_ids": ids, "attention_mask": mask}, (np.array(row) for row in rows)]
    found = []
    for calibration in given:
        model = patch_model(build("llama"), "mla", kv_rank=8, calibration=calibration)
        found.append(copy.deepcopy(model.model.layers[1].self_attn.mla.state_dict()))
        assert model.model.position_schemes.scheme[0].calibration is None
        unpatch_model(model)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
