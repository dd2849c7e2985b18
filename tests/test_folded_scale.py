"""DeepSeek's families multiply YaRN's factor over all dimensions into the softmax scale when they are built."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from pe_patch import ADAPTERS, SCHEMES, export, load_patched, patch_model, unpatch_model
from pe_patch.errors import OptionError

from . import goldens
from .families import VOCABULARY, build
from .models import snapshot, unchanged
from .rotary_cases import close, shape

FOLDING = sorted(name for name, adapter in ADAPTERS.items() if adapter.scaling_includes_mscale)
WINDOW, FACTOR = 16, 4.0
YARNS = {
    "V3": {"mscale": 1.0, "mscale_all_dim": 1.0},
    "V2-Lite": {"mscale": 0.707, "mscale_all_dim": 0.707},
    "all dimensions alone": {"mscale_all_dim": 0.8},
    "unequal": {"mscale": 1.0, "mscale_all_dim": 0.5},
    "neither": {},
}
families = pytest.mark.parametrize("family", FOLDING)


def native(family, rope_type, **parameters):
    """The model of `build`, weight by weight, that Transformers itself builds with these rotary parameters."""
    plain = build(family)
    config = copy.deepcopy(plain.config)
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(plain.state_dict())
    return model


def yarn_of(said):
    return {"factor": FACTOR, "original_max_position_embeddings": WINDOW, **said}


@torch.no_grad()
def logits(model):
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))
    return model(ids, use_cache=False).logits[..., 1:]  # loading empties the row of padding, where it is tied


def scales(model):
    return [layer.self_attn.scaling for layer in model.model.layers]


@families
@pytest.mark.parametrize("said", YARNS)
def test_yarn_is_what_transformers_builds(family, said):
    options = yarn_of(YARNS[said])
    expected, model = native(family, "yarn", **options), build(family)
    before = snapshot(model)
    patch_model(model, "yarn", **options)
    assert scales(model) == scales(expected)
    assert (scales(model)[0] > model.model.layers[0].self_attn.qk_head_dim ** -0.5) == ("mscale_all_dim" in options)
    assert torch.equal(logits(model), logits(expected))
    unpatch_model(model)
    assert unchanged(before, snapshot(model))


@families
@pytest.mark.parametrize("scheme", ["rope", "linear", "nope", "alibi", "self_extend", "dynamic_ntk"])
def test_another_scheme_starts_from_the_plain_scale(family, scheme):
    options = {"linear": {"factor": FACTOR}, "self_extend": {"group": 2, "window": 4}}.get(scheme, {})
    model = native(family, "yarn", **yarn_of(YARNS["V3"]))
    before = snapshot(model)
    plain = native(family, "default")
    plain.config.max_position_embeddings = WINDOW
    patch_model(model, scheme, on_existing="replace", **options)
    patch_model(plain, scheme, **options)
    assert torch.equal(logits(model), logits(plain))
    if scheme == "linear":
        assert torch.equal(logits(model), logits(native(family, "linear", factor=FACTOR)))
    unpatch_model(model)
    assert unchanged(before, snapshot(model))


@families
def test_what_stays_keeps_its_scale(family):
    """A scheme over the model's own YaRN, one beside it, and the layers that were not chosen."""
    parameters = yarn_of(YARNS["V3"])
    built = scales(native(family, "yarn", **parameters))
    over = patch_model(native(family, "yarn", **parameters), "resonance", on_existing="compose")
    zones = patch_model(native(family, "yarn", **parameters), "self_extend", group=4, window=4, on_existing="compose")
    beside = patch_model(native(family, "yarn", **parameters), "alibi", keep_native=True, on_existing="replace")
    assert scales(over) == scales(zones) == scales(beside) == built
    part = patch_model(native(family, "yarn", **parameters), "rope", layers=[1], on_existing="replace")
    assert scales(part) == [built[0], scales(build(family))[1]]


@families
@pytest.mark.parametrize("said", ["V3", "V2-Lite"])
def test_a_checkpoint_keeps_it(family, said, tmp_path):
    model = patch_model(build(family), "yarn", **yarn_of(YARNS[said]))
    expected, built = logits(model), scales(model)
    export(model, tmp_path / "exported")
    model.save_pretrained(tmp_path / "saved")
    for plain in (tmp_path / "exported", tmp_path / "saved"):
        loaded = AutoModelForCausalLM.from_pretrained(plain)
        assert scales(loaded) == built and torch.equal(logits(loaded.eval()), expected)
    loaded = load_patched(tmp_path / "saved").eval()
    assert scales(loaded) == built and torch.equal(logits(loaded), expected)
    unpatch_model(loaded)
    assert scales(loaded) == scales(build(family)) and torch.equal(logits(loaded), logits(build(family)))


def test_a_factor_that_follows_the_length_is_refused():
    model = build("deepseek_v3")
    before = snapshot(model)
    for options in ({"scheme": "yarn", "factor": "auto"}, {"scheme": "dynamic_yarn"}):
        with pytest.raises(OptionError, match="softmax scale"):
            patch_model(model, {**options, **YARNS["V3"]})
    assert unchanged(before, snapshot(model))
    patch_model(build("llama"), "dynamic_yarn", **YARNS["V3"])


def test_the_authors_own_frequencies():
    entry = goldens.load("deepseek/freqs")["deepseek/freqs_dim64_seq16384_orig4096"]
    said = entry["params"]
    betas = {key: said[key] for key in ("beta_fast", "beta_slow")}
    scheme = SCHEMES["yarn"](
        shape(said["qk_rope_head_dim"], said["rope_theta"], 4096), factor=said["rope_factor"], **betas
    )
    close(scheme.inv_freq, entry["inv_freq_f64"])


def test_the_authors_own_factors():
    for factor, row in goldens.load("yarn/")["yarn/attention_factor_table"]["value"].items():
        for key, expected in row.items():
            if key.startswith("softmax_scale_mult"):
                scheme = SCHEMES["yarn"](shape(), factor=float(factor), mscale_all_dim=float(key.split("=")[1]))
                assert scheme.softmax_factor**2 == pytest.approx(expected, rel=1e-12)
