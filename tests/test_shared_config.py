"""A patch and the config: one that several models share, and one that somebody changes while the patch is on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from pe_patch import describe, load_patched, patch_model, unpatch_model

from .interrupts import differing, state
from .models import FAMILIES, build, case, logits, tokens

IDS = tokens(2, 40)
SCHEMES = {"llama": "yarn", "gpt_neox": "alibi", "bloom": "t5", "gpt2": "learned"}


def siblings(family: str, count: int = 2) -> list[Any]:
    """Models that Transformers builds from one config object."""
    first = build(family)
    config, made = first.config, []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(type(first)(config).eval())
    assert all(model.config is config for model in made)
    return made


def put(model: Any, name: str) -> None:
    scheme, options = case(model.config.model_type, name)
    patch_model(model, scheme, **options)


@pytest.mark.parametrize("family", SCHEMES)
def test_patching_one_of_two_models_changes_nothing_of_the_other(family, tmp_path):
    model, other = siblings(family)
    native, before, written = logits(other, IDS[:, :30]), state(other), copy.deepcopy(other.config.to_dict())
    put(model, SCHEMES[family])
    logits(model, IDS[:, :30])
    assert not differing(before, state(other))
    assert torch.equal(logits(other, IDS[:, :30]), native)
    other.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, IDS[:, :30]), native)
    assert PreTrainedConfig.from_pretrained(tmp_path).to_dict().get("pe_patch") is None
    torch.manual_seed(1)  # a model that is built from the config afterwards
    assert torch.equal(logits(type(other)(other.config).eval(), IDS[:, :30]), native)
    assert {**other.config.to_dict(), "dtype": None, "architectures": None} == {
        **written, "dtype": None, "architectures": None,
    }  # fmt: skip


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_under_different_schemes_undone_in_any_order(family, last, tmp_path):
    pair = siblings(family)
    before = [state(model) for model in pair]
    alone = []
    for seed, name in enumerate(("linear", "alibi")):
        model = build(family)
        model.load_state_dict(pair[seed].state_dict())
        put(model, name)
        alone.append(logits(model, IDS))
    for model, name in zip(pair, ("linear", "alibi"), strict=True):
        put(model, name)
    for number, model in enumerate(pair):
        assert torch.equal(logits(model, IDS), alone[number])
        model.save_pretrained(tmp_path / str(number))
        assert torch.equal(logits(load_patched(tmp_path / str(number)).eval(), IDS), alone[number])
    unpatch_model(pair[1 - last])
    assert torch.equal(logits(pair[last], IDS), alone[last])
    assert describe(pair[last]).scheme == ("linear", "alibi")[last]
    unpatch_model(pair[last])
    for one in before:  # what Transformers itself notes when it saves
        one["configs"] = one["written"] = None
    assert not any(differing(one, {**state(model), "configs": None, "written": None}) for one, model in
                   zip(before, pair, strict=True))  # fmt: skip
    assert pair[0].config is pair[1].config and not hasattr(pair[0].config, "pe_patch")


def test_every_module_of_a_patched_model_reads_one_config():
    model = build("llama")
    native = model.config
    put(model, "yarn")
    assert model.config is model.model.config and model.config is not native
    configs = {id(m.config) for name, m in model.named_modules() if hasattr(m, "config") and "original" not in name}
    assert configs == {id(model.config)}
    unpatch_model(model)
    assert all(m.config is native for m in model.modules() if hasattr(m, "config"))


def delete_record(model):
    del model.config.pe_patch


def delete_every_attribute(model):
    for name in ("pe_patch", "max_position_embeddings", "rope_parameters", "_attn_implementation_internal"):
        vars(model.config).pop(name, None)


def replace_config(model):
    model.config = copy.deepcopy(build(model.config.model_type).config)


def change_attributes(model):
    model.config.max_position_embeddings = 7
    if model.config.model_type != "bloom":
        model.config.rope_parameters = None


def delete_attributes_of_modules(model):
    attention = model.base_model.layers[0].self_attn if model.config.model_type == "llama" else None
    for module, name in ((model, "save_pretrained"), (model.base_model, "forward"), (attention, "pe_scheme")):
        if module is not None:
            vars(module).pop(name, None)
    model.base_model._modules.pop("position_schemes")


@pytest.mark.parametrize(
    "meddle", [delete_record, delete_every_attribute, replace_config, change_attributes, delete_attributes_of_modules]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_others_do_meanwhile_does_not_break_the_undo(family, meddle):
    model = build(family)
    before, native = state(model), logits(model, IDS)
    put(model, "yarn")
    meddle(model)
    unpatch_model(model)
    assert not (found := differing(before, state(model))), found
    assert torch.equal(logits(model, IDS), native)


def test_what_the_user_writes_meanwhile_stays():
    """As without a patch: in the config that the model was built from."""
    model, other = siblings("llama")
    put(model, "yarn")
    model.config.use_cache = False
    model.config.mine = [1]
    del model.config.bos_token_id
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == 120 and other.config.vocab_size == 97
    unpatch_model(model)
    assert model.config is other.config
    assert (model.config.use_cache, model.config.mine, model.config.vocab_size) == (False, [1], 120)
    assert "bos_token_id" not in vars(model.config)
    assert not hasattr(model.config, "pe_patch") and model.config.max_position_embeddings == 32


@pytest.mark.parametrize("name", ["alibi", "yarn"])
def test_a_patch_of_the_inner_model_is_saved_with_the_outer_one(name, tmp_path):
    model, other = siblings("llama")
    before = state(model), state(other)
    put(model.model, name)
    expected = logits(model, IDS)
    assert model.config is model.model.config and not differing(before[1], state(other))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_patched(tmp_path).eval(), IDS), expected)
    unpatch_model(model)
    assert model.config is other.config and not hasattr(model.config, "pe_patch")


def test_the_configs_of_a_model_with_two_towers(tmp_path):
    """One encoder is patched through the model inside; the outer config and its copy of the sub-config follow."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=97, pad_token_id=0),
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32),
        image_token_index=96,
    )
    model, other = (LlavaForConditionalGeneration(config).eval() for _ in range(2))
    before = [state(each) for each in (model, other)]
    text = model.model.language_model
    patch_model(text, "linear", factor=2.0)
    assert model.config is model.model.config and model.config.text_config is text.config
    assert model.config.text_config.pe_patch["scheme"] == "linear"
    assert not (found := differing(before[1], state(other))), found
    assert other.config is config and not hasattr(config.text_config, "pe_patch")
    assert model.config.vision_config is config.vision_config
    unpatch_model(text)
    assert not (found := differing(before[0], state(model))), found
    patch_model(model, "linear", factor=2.0, submodule="language_model")
    assert not (found := differing(before[1], state(other))), found
    unpatch_model(model)
    assert not (found := differing(before[0], state(model))), found


@pytest.mark.parametrize("given", ["wrapper", "model"])
def test_a_peft_wrapper_reads_the_same_config(given):
    model = build("llama")
    wrapper = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert wrapper.config is model.config
    before, held = state(model), dict(vars(wrapper))
    patch_model(wrapper if given == "wrapper" else model, "yarn", factor=2.0, beta_fast=4.0)
    assert wrapper.config is model.config and wrapper.config.max_position_embeddings == 64
    unpatch_model(wrapper)
    assert wrapper.config is model.config and wrapper.config.max_position_embeddings == 32
    assert not differing(before, state(model))
    assert vars(wrapper).keys() == held.keys() and all(vars(wrapper)[key] is held[key] for key in held)
