"""What a message suggests, and what a call that cannot work says before anything has changed."""

from __future__ import annotations

import logging
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers

from pe_patch import ADAPTERS, ALIASES, SCHEMES, PePatchError, UnsupportedError, describe, patch_model, unpatch_model
from pe_patch.errors import OptionError, OptionValueError, UnknownNameError, nearest

from .models import build, logits, snapshot, tokens, unchanged

MEANT = {
    # letter case and separators
    "YaRN": "yarn", "ALiBi": "alibi", "RoPE": "rope", "NTK": "ntk", "LongRoPE": "longrope",
    "Self-Extend": "self_extend",
    "dynamic-ntk": "dynamic_ntk", "xPos": "xpos", "NoPE": "nope", "p-RoPE": "p_rope", "T5": "t5", "KERPLE": "kerple",
    "NTK by parts": "ntk_by_parts", "ReRoPE": "rerope", "TransformerXL": "transformer_xl",
    # other names of the field
    "ntk-aware": "ntk", "position_interpolation": "linear", "PositionInterpolation": "linear", "rotary": "rope",
    "default": "rope", "su": "longrope", "transmla": "mla", "TransMLA": "mla", "mha2mla": "mla",
    "dual_chunk_attention": "dca", "t5_bias": "t5", "none": "nope", "sinusoid": "sinusoidal", "llama3.1": "llama3",
    # misspellings
    "yarm": "yarn", "yran": "yarn", "alibbi": "alibi", "self_extnd": "self_extend", "longrop": "longrope",
    "linaer": "linear", "dinamic_ntk": "dynamic_ntk",
    # something else, so that any suggestion would mislead
    "mrope": None, "vrope": None, "llama4": None, "longrope2": None, "random": None, "hope": None, "": None, "2": None,
    "cope2": None, "x": None,
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_names_of_schemes(name):
    found = nearest(name, [*SCHEMES, *ALIASES])
    if MEANT[name] is None:
        assert found == ""
    else:
        assert found.startswith(f" Did you mean '{MEANT[name]}'")
    with pytest.raises(ValueError, match="Unknown scheme") as caught:
        patch_model(build("llama"), name)
    assert found in str(caught.value)


def test_a_method_of_a_scheme_is_named_with_it():
    with pytest.raises(ValueError, match=r"Did you mean 'mla' with method='transmla'\?"):
        patch_model(build("llama"), "transmla")


OPTIONS = {
    ("yarn", "beta"): "'beta_fast' or 'beta_slow'", ("llama3", "beta"): None, ("yarn", "factr"): "'factor'",
    ("linear", "scale"): "'factor'", ("yarn", "rope_theta"): "'theta'", ("linear", "Factor"): "'factor'",
    ("rope", "base"): "'theta'", ("self_extend", "group_size"): "'group'", ("mla", "rank"): "'kv_rank'",
    ("yarn", "original_max_position_embedding"): "'original_max_position_embeddings'", ("alibi", "slope"): "'slopes'",
    ("yarn", "alpha"): None, ("dynamic_ntk", "delta"): None, ("cope", "max_position"): "'max_positions'",
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "option"), OPTIONS)
def test_names_of_options(scheme, option):
    with pytest.raises(TypeError, match="has no option") as caught:
        SCHEMES[scheme].check_options({option: 3})
    meant = OPTIONS[scheme, option]
    assert ("Did you mean" in str(caught.value)) == (meant is not None)
    assert meant is None or f"Did you mean {meant}?" in str(caught.value)


@pytest.mark.parametrize("family", ["xlnet", "mamba", "mamba2", "gemma4_text", "qwen3_next", "olmo_hybrid", "dbrx"])
def test_a_family_that_transformers_has_is_no_misspelling(family):
    assert family not in ADAPTERS
    model = build("bloom")
    model.config.model_type = family
    with pytest.raises(UnsupportedError, match="has no adapter") as caught:
        patch_model(model, "rope")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_example_of_a_required_option_is_of_the_right_kind(name):
    cls = SCHEMES[name]
    for p in cls.declared_options():
        if not p.required:
            continue
        others = {q.name: 1 for q in cls.declared_options() if q.required and q.name != p.name}
        with pytest.raises(TypeError, match=f"needs the option '{p.name}'") as caught:
            cls.check_options(others)
        example = str(caught.value).split("for example ")[1].split("=")[1]
        wants_list = "Sequence" in str(p.annotation)
        assert example.startswith("[") == wants_list
        if not wants_list:
            value = float(example.split(";")[0])
            cls(ADAPTERS["llama"].shape(build("llama").model, build("llama").config), **{p.name: value})


BAD_LAYERS = [0, 1.5, "all", "0", True, [True], [False], [0.0], ["0"], [None], {0: 1}, b"0", slice("a"), object(),
              np.bool_(True), [np.bool_(True)], torch.tensor(0), torch.tensor([True]), torch.tensor([0.5]), [[0]],
              slice(None, None, 0)]  # fmt: skip


@pytest.mark.parametrize("layers", BAD_LAYERS, ids=lambda value: type(value).__name__)
def test_layers_of_a_wrong_kind(layers):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(OptionValueError, match="layers="):
        patch_model(model, "nope", layers=layers)
    assert unchanged(before, snapshot(model))


GOOD_LAYERS = [
    [0, 1], (1,), {0}, range(2), slice(1), np.array([0]), torch.tensor([1]), [np.int64(1)], iter([0]),
    lambda i: i == 1, [-1],
]  # fmt: skip


@pytest.mark.parametrize("layers", GOOD_LAYERS, ids=lambda value: type(value).__name__)
def test_layers_of_every_right_kind(layers):
    patch_model(build("llama"), "nope", layers=layers)


BAD_VALUES = {
    ("yarn", "factor"): [0.5, 0, -1, "4", None, True, float("nan"), [4], 1j],
    ("linear", "theta"): [1, 0, "10000", True, [1e4]],
    ("rope", "original_max_position_embeddings"): ["32", 3.5, True, [32], float("inf"), float("nan"), 0, -4, {}],
    ("alibi", "slopes"): [3, 0.5, "four", [1.0], [0.0] * 4, [float("nan")] * 4, [None] * 4, [[1.0]] * 4, {}],
    ("sandwich", "dim"): [7, 0, 2.0, None],
    ("longrope", "long_factor"): [4, "ones", [1.0], [None] * 8, [-1.0] * 8],
}


@pytest.mark.parametrize(("scheme", "option"), BAD_VALUES)
def test_a_bad_value_is_a_value_error_and_a_type_error(scheme, option):
    model = build("llama")
    before = snapshot(model)
    given = {"factor": 2} if scheme == "linear" else {}
    for value in BAD_VALUES[scheme, option]:
        with pytest.raises(ValueError, match=option) as caught:
            patch_model(model, scheme, **{**given, option: value})
        assert isinstance(caught.value, TypeError) and isinstance(caught.value, PePatchError)
    assert unchanged(before, snapshot(model))


def test_an_unknown_option_is_no_value_error():
    """Python raises TypeError for an unknown keyword argument."""
    with pytest.raises(OptionError) as caught:
        patch_model(build("llama"), "yarn", factr=2)
    assert not isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [np.float32(2), np.float64(2), np.int64(2), Fraction(2), torch.tensor(2.0)], ids=repr)
def test_numbers_of_other_libraries_are_numbers(value):
    model, other = build("llama"), build("llama")
    patch_model(model, "linear", factor=value)
    patch_model(other, "linear", factor=2.0)
    assert torch.equal(logits(model, tokens(1, 20)), logits(other, tokens(1, 20)))
    assert model.config.pe_patch == other.config.pe_patch


def test_flash_without_its_package_is_refused_when_patched():
    if transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="pip install flash-attn"):
        patch_model(model, "yarn", factor=2, backend="flash")
    assert unchanged(before, snapshot(model))
    patch_model(model, "yarn", factor=2)
    with pytest.raises(UnsupportedError, match="pip install flash-attn"):
        model.set_attn_implementation("flash_attention_2")


def test_flash_is_called_under_the_name_that_transformers_knows(monkeypatch):
    """Transformers takes the kernel that the config names, and ours is none of its own."""
    from transformers.integrations import flash_attention as host

    monkeypatch.setattr("pe_patch.attention.backends._check_flash", lambda: None)
    named = []

    def kernel(query, key, value, mask, *, attn_implementation, **_):
        named.append(attn_implementation)
        return query

    monkeypatch.setattr(host, "_flash_attention_forward", kernel)
    model = build("llama")
    patch_model(model, "yarn", factor=2, backend="flash")
    logits(model, tokens(1, 8))
    assert named == ["flash_attention_2"] * 2


MULTI = {
    "t5": transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=50),
    "whisper": transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, max_source_positions=16, num_mel_bins=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MULTI)
def test_a_model_of_several_stacks_without_a_supported_one_is_refused_by_family(family):
    config = MULTI[family]
    model = transformers.AutoModelForSeq2SeqLM.from_config(config) if family == "t5" else None
    model = transformers.WhisperForConditionalGeneration(config) if model is None else model
    with pytest.raises(
        UnsupportedError, match="is not supported: none of its attention stacks has an adapter"
    ) as caught:
        patch_model(model, "rope")
    assert "choose one with submodule" not in str(caught.value) and f"({family})" in str(caught.value)


@pytest.mark.parametrize("submodule", [3, None, ["model"], True])
def test_a_submodule_that_is_no_name(submodule):
    if submodule is None:
        patch_model(build("llama"), "rope", submodule=None)
    else:
        with pytest.raises(ValueError, match="submodule="):
            patch_model(build("llama"), "rope", submodule=submodule)


SAME = [("linear", {"factor": 1}), ("yarn", {"factor": 1}), ("ntk", {"factor": 1.0}), ("llama3", {"factor": 1}),
        ("longrope", {"long_factor": [1.0] * 8}), ("self_extend", {"group": 1}),
        ("leaky_rerope", {"k": 1})]  # fmt: skip


@pytest.mark.parametrize(("scheme", "options"), SAME)
def test_options_that_change_nothing_are_applied_and_logged(scheme, options, caplog):
    model, ids = build("llama"), tokens(1, 40)
    native = logits(model, ids)
    with caplog.at_level(logging.WARNING, logger="pe_patch"):
        patch_model(model, scheme, **options)
    assert f"'{scheme}' with these options is what LlamaModel already does" in caplog.text
    torch.testing.assert_close(logits(model, ids), native, rtol=0, atol=1e-5 * float(native.abs().max()))


CHANGED = [("rope", {}), ("linear", {"factor": 2}), ("yarn", {"factor": "auto"}), ("rope", {"theta": 500.0}),
           ("resonance", {}), ("rope_alibi", {}), ("self_extend", {"group": 1, "log_scaling": True}),
           ("yarn", {"factor": 1, "attention_factor": 1.2})]  # fmt: skip


@pytest.mark.parametrize(("scheme", "options"), CHANGED)
def test_nothing_is_said_where_something_changes_or_nothing_was_asked(scheme, options, caplog):
    with caplog.at_level(logging.WARNING, logger="pe_patch"):
        patch_model(build("llama"), scheme, **options)
    assert "already does" not in caplog.text


def test_a_scaling_that_is_taken_away_is_a_change(caplog):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with caplog.at_level(logging.WARNING, logger="pe_patch"):
        patch_model(
            build("llama", rope_parameters=scaled),
            "linear",
            factor=1,
            on_existing="replace",
            original_max_position_embeddings=32,
        )
    assert "already does" not in caplog.text


FOLLOWING = [
    ("dynamic_ntk", {}),
    ("dynamic_yarn", {}),
    ("yarn", {"factor": "auto"}),
    ("longrope", {"long_factor": [2.0] * 8}),
]


@pytest.mark.parametrize(("scheme", "options"), FOLLOWING)
@torch.no_grad()
def test_a_scheme_that_follows_the_length_is_exported_for_one_length(scheme, options):
    model, ids = build("llama"), tokens(1, 20)
    patch_model(model, scheme, **options)
    kwargs = {"input_ids": ids, "use_cache": False}
    exported = torch.export.export(model, (), kwargs).module()
    assert torch.equal(exported(**kwargs).logits, model(**kwargs).logits)
    length = torch.export.Dim("length", min=4, max=64)
    with pytest.raises(UnsupportedError, match=r"follows the length .* torch\.export"):
        torch.export.export(model, (), kwargs, dynamic_shapes={"input_ids": {1: length}, "use_cache": None})
    with pytest.raises(UnsupportedError, match=r"follows the length .* torch\.export"):
        torch.export.export(model, (), {**kwargs, "attention_mask": torch.ones_like(ids)})


def test_a_vision_model_is_patched_in_its_language_model_and_another_name_is_an_error():
    text = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama"}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 8, "model_type": "siglip_vision_model"}  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(UnknownNameError, match="language_model"):
        patch_model(model, "rope", submodule="langage_model")
    patch_model(model, "rope")
    assert describe(model).family == "llama"
    unpatch_model(model)
    patch_model(model, "rope", submodule="language_model")
