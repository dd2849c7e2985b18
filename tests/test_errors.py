"""Bad input: a message that says what to do, and a model that is what it was."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from pe_patch import (
    ADAPTERS,
    SCHEMES,
    AlreadyPatchedError,
    PePatchError,
    Scheme,
    UnsupportedError,
    describe,
    load_patched,
    patch_model,
    unpatch_model,
)

from .models import FAMILIES, WINDOW, build, case, error, logits, put, snapshot, tokens, unchanged

KNOWN = {"original_max_position_embeddings": WINDOW}

BAD = {
    "unknown scheme": ("llama", "yarm", {"factor": 2}, ValueError, "Unknown scheme 'yarm'. Did you mean 'yarn'?"),
    "unknown option": ("llama", "yarn", {"factr": 2}, TypeError, "no option 'factr'. Did you mean 'factor'?"),
    "unknown option beside": ("bloom", "alibi", {"slope": [1]}, TypeError, "no option 'slope'. Did you mean 'slopes'?"),
    "missing factor": ("gpt_neox", "linear", {}, TypeError, "'linear' needs the option 'factor'"),
    "factor below 1": ("llama", "yarn", {"factor": 0.5}, TypeError, "factor must be a finite number of at least 1"),
    "dynamic factor below 1": ("llama", "dynamic_ntk", {"factor": 0.9}, TypeError, "at least 1"),
    "factor not a number": ("llama", "ntk", {"factor": "4x"}, TypeError, "factor='4x'"),
    "factor infinite": ("llama", "llama3", {"factor": float("inf")}, TypeError, "finite"),
    "no window known": ("bloom", "yarn", {"factor": 2}, TypeError, "give original_max_position_embeddings=<tokens>"),
    "no table size known": ("bloom", "learned", {}, TypeError, "max_positions=<tokens>"),
    "layer that is not there": ("llama", "nope", {"layers": [2]}, TypeError, "this model has layers 0 to 1"),
    "no layer at all": ("llama", "nope", {"layers": []}, TypeError, "none of the 2 layers"),
    "layers of an embedding": ("llama", "sinusoidal", {"layers": [0]}, TypeError, "layers= does not apply"),
    "unknown backend": ("llama", "yarn", {"factor": 2, "backend": "spda"}, ValueError, "Did you mean 'sdpa'?"),
    "unknown submodule": ("llama", "rope", {"submodule": "modle"}, ValueError, "Did you mean 'model'?"),
    "unknown on_existing": ("llama", "rope", {"on_existing": "ignore"}, TypeError, "error, replace, compose"),
    "adapter by name": ("llama", "rope", {"adapter": "llama"}, TypeError, "takes a pe_patch.Adapter"),
    "rotating twice": ("llama", "rope", {"keep_native": True}, TypeError, "would rotate twice"),
    "slopes of other heads": ("llama", "alibi", {"slopes": [0.5]}, TypeError, "slopes needs 4 positive numbers"),
    "list of other pairs": ("llama", "longrope", {"long_factor": [1.0]}, TypeError, "rotates 8 pairs"),
    "not a scheme": ("llama", 4, {}, ValueError, "not 4"),
    "contradictory dict": ("llama", {"rope_type": "yarn", "factor": 2.0, "colour": 1}, {}, PePatchError, "colour"),
    "given twice": ("llama", {"rope_type": "linear", "factor": 2.0}, {"factor": 3}, TypeError, "give it once"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_changes_nothing(bad):
    family, scheme, arguments, kind, message = BAD[bad]
    model = build(family)
    before = snapshot(model)
    with pytest.raises(PePatchError, match=re.escape(message)) as caught:
        patch_model(model, scheme, **arguments)
    assert isinstance(caught.value, kind)
    assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bad_second_patch_leaves_the_first(family):
    model, ids = build(family), tokens(2, 40)
    native = snapshot(model)
    expected = logits(put(model, "yarn"), ids)
    patched = snapshot(model)
    with pytest.raises(AlreadyPatchedError, match=r"already patched with 'yarn': unpatch_model\(model\) first"):
        patch_model(model, "nope")
    with pytest.raises(TypeError, match="has no option"):
        patch_model(model, "alibi", on_existing="replace", slop=1)
    with pytest.raises(ValueError, match="Unknown scheme"):
        patch_model(model, "alibbi", on_existing="replace")
    assert unchanged(patched, snapshot(model))
    assert torch.equal(logits(model, ids), expected)
    patch_model(model, "nope", on_existing="replace")
    assert describe(model).scheme == "nope"
    fresh = build(family)
    patch_model(fresh, "nope")
    assert torch.equal(logits(model, ids), logits(fresh, ids))
    unpatch_model(model)
    assert unchanged(native, snapshot(model))


@pytest.mark.parametrize("name", ["yarn", "linear", "dynamic_ntk"])
def test_odd_heads_cannot_rotate(name):
    model = build("bloom", hidden_size=60, num_attention_heads=4)
    before = snapshot(model)
    with pytest.raises(TypeError, match="even number") as caught:
        patch_model(model, name, **{**case("bloom", name)[1]})
    assert isinstance(caught.value, PePatchError) and "rotary_dim=15" in str(caught.value)
    assert unchanged(before, snapshot(model))
    patch_model(model, "alibi")


SCALED = {
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", SCALED)
def test_a_model_with_a_scaling_of_its_own(kind):
    parameters = {"rope_type": kind, "rope_theta": 5000.0, **SCALED[kind]}
    model, ids = build("llama", rope_parameters=parameters), tokens(2, 40)
    before = snapshot(model)
    with pytest.raises(AlreadyPatchedError, match=rf"'{kind}'.*window of 16 tokens and theta 5000"):
        patch_model(model, "yarn", factor=4)
    with pytest.raises(UnsupportedError, match="clipped_rope, resonance"):
        patch_model(model, "linear", factor=4, on_existing="compose")
    assert unchanged(before, snapshot(model))
    patch_model(model, "linear", factor=4, on_existing="replace")
    plain = build("llama", max_position_embeddings=16, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    patch_model(plain, "linear", factor=4)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    assert model.config.max_position_embeddings == 64
    unpatch_model(model)
    assert unchanged(before, snapshot(model))
    patch_model(model, "resonance", on_existing="compose")
    native = model.model.position_schemes.original["rotary_emb"]
    wavelength = 2 * torch.pi / model.model.rotary_emb.inv_freq
    assert torch.allclose(wavelength, (2 * torch.pi / native.inv_freq).round())
    assert model.model.rotary_emb.attention_scaling == pytest.approx(native.attention_scaling)
    unpatch_model(model)
    assert unchanged(before, snapshot(model))


def test_an_unknown_family_says_how_to_write_its_row():
    model = build("bloom")
    model.config.model_type = "bloomed"
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"Did you mean 'bloom'\?.*adapter=pe_patch.Adapter\(") as caught:
        patch_model(model, "alibi")
    assert isinstance(caught.value, ValueError)
    assert unchanged(before, snapshot(model))
    patch_model(model, "alibi", adapter=ADAPTERS["bloom"])
    assert error(logits(model, tokens(2, 20)), before["logits"]) < 1e-5


def test_what_is_not_a_model_is_refused():
    with pytest.raises(PePatchError, match="Linear is not a Transformers model"):
        patch_model(torch.nn.Linear(2, 2), "rope")
    with pytest.raises(PePatchError, match="no patch"):
        describe(build("llama"))


def test_a_reserved_option_fails_when_the_class_is_defined():
    with pytest.raises(TypeError, match="'strict', which patch_model reserves"):

        class Strict(Scheme):
            def __init__(self, shape, *, strict=1):
                super().__init__(shape)


@pytest.mark.parametrize("name", ["rope", "sinusoidal", "alibi"])
def test_an_option_that_cannot_be_saved_is_refused(name):
    class Opaque(SCHEMES[name]):
        def __init__(self, shape, *, thing):
            super().__init__(shape)

    model = build("llama")
    before = snapshot(model)
    with pytest.raises(TypeError, match="must be numbers, strings, lists or dicts"):
        patch_model(model, Opaque, thing=object())
    assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_beyond_the_window_warns_once_or_raises(family, caplog):
    model, ids = put(build(family), "linear"), tokens(1, 65)
    with caplog.at_level(logging.WARNING, logger="pe_patch"):
        caplog.clear()
        logits(model, ids[:, :64])
        assert not caplog.records
        logits(model, ids)
        logits(model, ids)
    assert len(caplog.records) == 1 and "beyond the 64" in caplog.text
    unpatch_model(model)
    strict = put(model, "linear", strict=True)
    expected = logits(strict, ids[:, :64])
    with pytest.raises(ValueError, match="65 tokens is beyond the 64"):
        logits(strict, ids)
    with pytest.raises(ValueError, match="beyond the 64"):
        strict.generate(ids[:, :60], max_new_tokens=9)
    with pytest.raises(ValueError, match="1001 tokens"):
        logits(strict, ids[:, :1], position_ids=torch.tensor([[1000]]))
    assert torch.equal(logits(strict, ids[:, :64]), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_learned_table_ends(family):
    model = put(build(family), "learned")
    logits(model, tokens(1, 64))
    with pytest.raises(ValueError, match=r"beyond the 64 .*max_positions") as caught:
        logits(model, tokens(1, 65))
    assert isinstance(caught.value, PePatchError)


def test_a_cache_from_before_the_patch_is_refused():
    model, ids = build("llama"), tokens(1, 12)
    past = model(ids, use_cache=True).past_key_values
    put(model, "alibi")
    with pytest.raises(PePatchError, match="filled before the model was patched"):
        model(ids[:, :1], past_key_values=past)


def test_a_missing_folder(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(PePatchError) as caught:
            load_patched(path)
        assert isinstance(caught.value, OSError) and str(path) in str(caught.value)
