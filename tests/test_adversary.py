"""Cases that somebody tried to break the library with, each against a value from elsewhere."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from pe_patch import (
    AlreadyPatchedError,
    NoEffectError,
    UnsupportedError,
    load_patched,
    patch_model,
    patched,
    unpatch_model,
)

from . import families
from .models import build, error, logits, put, snapshot, tokens, unchanged

pytestmark = pytest.mark.fast
TOLERANCE = 1e-5


def test_a_base_that_the_config_stretches_at_every_length_is_the_trained_one():
    """HunYuan's `alpha` is a larger base, not a scaling of a model that was trained with a smaller one."""
    parameters = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}
    model = families.build("hunyuan_v1_dense", rope_parameters=parameters)
    ids = tokens(1, 60)
    expected = logits(model, ids)
    patch_model(model, "rope", on_existing="replace")
    assert error(logits(model, ids), expected) < TOLERANCE
    assert model.config.rope_parameters["rope_theta"] == pytest.approx(10000.0 * 1000.0 ** (16 / 14))


def test_a_window_lowered_in_the_config_after_loading_is_not_believed(caplog):
    model = families.build("llama")
    model.config.max_position_embeddings = 16
    caplog.set_level("WARNING", logger="pe_patch")
    patch_model(model, "yarn", factor=2.0)
    assert model.config.max_position_embeddings == 2 * families.WINDOW
    assert "max_position_embeddings=16 was written into the config after the model was built for 64" in caplog.text
    expected = families.build(
        "llama",
        max_position_embeddings=2 * families.WINDOW,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0,
            "original_max_position_embeddings": families.WINDOW,
        },
    )  # fmt: skip
    assert torch.equal(logits(model, tokens(1, 60)), logits(expected, tokens(1, 60)))


def test_a_block_within_a_block_gives_the_outer_patch_back():
    model, ids = build("llama"), tokens(1, 40)
    before = snapshot(model)
    with patched(model, "shaw", max_distance=6):
        for parameter in model.model.position_schemes.scheme.parameters():
            torch.nn.init.normal_(parameter)
        expected = logits(model, ids)
        with patched(model, "linear", factor=2.0, on_existing="replace"):
            assert error(logits(model, ids), expected) > TOLERANCE
        assert torch.equal(logits(model, ids), expected)
        with pytest.raises(KeyError), patched(model, "linear", factor=2.0, on_existing="replace"):
            raise KeyError
        assert torch.equal(logits(model, ids), expected)
        with patched(model, "linear", factor=2.0, on_existing="replace"):
            unpatch_model(model)
        assert torch.equal(logits(model, ids), expected)
    assert unchanged(before, snapshot(model))


def test_a_block_that_comes_too_late_leaves_the_patch_of_another_thread(monkeypatch):
    """Both threads find the model native; the other one patches it first."""
    model, ids = build("llama"), tokens(1, 40)

    def other_thread_is_first(*_):
        monkeypatch.undo()
        thread = threading.Thread(target=put, args=(model, "self_extend"))
        thread.start()
        thread.join()

    monkeypatch.setattr("pe_patch.patch.check_choice", other_thread_is_first)
    with pytest.raises(AlreadyPatchedError), patched(model, "linear", factor=2.0):
        raise AssertionError
    assert torch.equal(logits(model, ids), logits(put(build("llama"), "self_extend"), ids))


@pytest.mark.parametrize("name", ("yarn", "alibi", "self_extend"))
def test_a_module_put_in_behind_the_patch_is_an_error(name):
    model, ids = put(build("llama"), name), tokens(1, 20)
    expected = logits(build("llama"), ids)
    model.model.rotary_emb = LlamaRotaryEmbedding(build("llama").config)
    with pytest.raises(NoEffectError, match="rotary_emb is a LlamaRotaryEmbedding that was put in behind the patch"):
        logits(model, ids)
    unpatch_model(model)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("name", ("alibi", "self_extend", "shaw", "dynamic_ntk"))
def test_an_attention_put_in_behind_the_patch_is_an_error(name):
    model = put(build("llama"), name)
    layer = model.model.layers[1]
    attention = LlamaAttention(build("llama").config, 1)
    attention.load_state_dict(layer.self_attn.state_dict())
    attention.config, layer.self_attn = model.config, attention.eval()
    with pytest.raises(NoEffectError, match="LlamaAttention was put into the model behind the patch"):
        logits(model, tokens(1, 20))


@pytest.mark.parametrize(("layers", "gone"), [(None, 0), (None, 1), ([1], 0), ([0, 2], 1), ([0, 2], 0)])
@pytest.mark.parametrize("name", ("yarn", "self_extend", "shaw"))
def test_layers_taken_out_of_a_patched_model_are_saved_as_they_are(name, layers, gone, tmp_path):
    model, ids = put(build("llama", num_hidden_layers=3), name, layers=layers), tokens(1, 40)
    del model.model.layers[gone]
    model.config.num_hidden_layers = 2
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert error(logits(load_patched(tmp_path), ids), expected) < TOLERANCE
    assert torch.equal(logits(model, ids), expected)
    unpatch_model(model)
    native = build("llama", num_hidden_layers=3)
    del native.model.layers[gone]
    assert torch.equal(logits(model, ids), logits(native, ids))


@pytest.mark.parametrize("family", ("bloom", "gpt2", "llama"))
def test_the_config_of_a_patched_model_builds_no_model_without_the_scheme(family, tmp_path):
    """BLOOM and GPT-2 have no rotary module that stops at a rope type it does not know."""
    model, ids = put(build(family), "self_extend"), tokens(1, 40)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    saved, own = AutoConfig.from_pretrained(tmp_path), copy.deepcopy(model.config)
    for make in (
        lambda: type(model)(model.config),
        lambda: type(model)(own),
        lambda: type(model.base_model)(own),
        lambda: type(model).from_pretrained(tmp_path, config=saved),
    ):
        with pytest.raises(UnsupportedError, match=r"patched with 'self_extend'.*load_patched"):
            make()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path))
    assert error(logits(loaded, ids), expected) < TOLERANCE
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        built = AutoModelForCausalLM.from_config(model.config).eval()
        built.load_state_dict(model.state_dict())
        assert error(logits(built, ids), expected) < TOLERANCE
    unpatch_model(model)
    type(model)(model.config)


