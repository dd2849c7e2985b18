"""Latent attention in a longer window, native and converted."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pe_patch import AlreadyPatchedError, UnsupportedError, patch_model, unpatch_model
from pe_patch.errors import OptionError

from .families import WINDOW
from .families import build as family
from .models import WINDOW as SHORT
from .models import build, cached_logits, error, logits, snapshot, tokens, unchanged

TOLERANCE = 1e-5
LAYOUTS = pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW}
V3, V2_LITE = {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.707, "mscale_all_dim": 0.707}


def built(name: str, **parameters: Any) -> Any:
    """The model of `family`, weight by weight, that Transformers itself builds with these rotary parameters."""
    plain = family(name)
    config = copy.deepcopy(plain.config)
    config.rope_parameters = parameters
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(plain.state_dict())
    return model


NATIVE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "factor": ({"factor": 4.0}, {**YARN, **V3}),
    "V2-Lite": ({"over": {"rope_type": "yarn", "factor": 4.0, **V2_LITE}}, {**YARN, **V2_LITE}),
    "unequal": ({"over": {"scheme": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
                {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "linear": ({"over": {"rope_type": "linear", "factor": 4.0}},
               {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "ntk": ({"over": {"scheme": "ntk", "factor": 4.0}},
            {"rope_type": "default", "rope_theta": 10000.0 * 4.0 ** (8 / 6)}),  # rotary width d: theta s^(d / (d - 2))
}  # fmt: skip


@LAYOUTS
@pytest.mark.parametrize("case", NATIVE)
def test_a_native_model_is_what_transformers_builds(name, case):
    options, parameters = NATIVE[case]
    expected, model, ids = built(name, **parameters), family(name), tokens(2, 100)
    before, plain = snapshot(model), logits(model, ids)
    patch_model(model, "mla", **options)
    wanted = logits(expected, ids)
    assert error(wanted, plain) > 1e-2
    assert error(logits(model, ids), wanted) < TOLERANCE
    assert error(cached_logits(model, ids, 90), wanted) < TOLERANCE
    assert model.config.max_position_embeddings == 4 * WINDOW
    unpatch_model(model)
    assert unchanged(before, snapshot(model)) and torch.equal(logits(model, ids), plain)


@LAYOUTS
def test_a_native_scaling_is_kept_or_replaced(name):
    model = built(name, **YARN, **V3)
    ids, before = tokens(2, 100), snapshot(model)
    with pytest.raises(AlreadyPatchedError):
        patch_model(model, "mla", factor=8.0)
    assert unchanged(before, snapshot(model))
    kept = logits(model, ids)
    patch_model(model, "mla")
    assert error(cached_logits(model, ids, 90), kept) < TOLERANCE
    unpatch_model(model)
    patch_model(model, "mla", factor=8.0, on_existing="replace")
    expected = logits(built(name, **{**YARN, "factor": 8.0}, **V3), ids)
    assert error(expected, kept) > 1e-3
    assert error(cached_logits(model, ids, 90), expected) < TOLERANCE
    unpatch_model(model)
    assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("over", ["dynamic_ntk", {"rope_type": "dynamic_yarn"}, {"scheme": "linear", "factor": "auto"}])
@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_frequencies_that_follow_the_length_are_refused(name, over):
    model = family(name)
    before = snapshot(model)
    given = {} if name != "llama" else {"kv_rank": 8, "calibration": tokens(2, 40)}
    with pytest.raises((UnsupportedError, OptionError)):
        patch_model(model, "mla", over=over, **given)
    with pytest.raises(OptionError, match="factor and over"):
        patch_model(model, "mla", over="ntk", factor=2.0, **given)
    assert unchanged(before, snapshot(model))


CALIBRATION = tokens(4, SHORT, seed=8)
EXTENSIONS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "factor": ({"factor": 4.0}, "yarn", {"factor": 4.0}),
    "yarn": ({"over": {"scheme": "yarn", "factor": 4.0}}, "yarn", {"factor": 4.0}),
    "ntk": ({"over": {"scheme": "ntk", "factor": 4.0}}, "ntk", {"factor": 4.0}),
    "linear": ({"over": {"rope_type": "linear", "factor": 4.0}}, "linear", {"factor": 4.0}),
}
WHOLE = {"transmla": {"rope_dim": 32, "kv_rank": 32}, "mha2mla": {"method": "mha2mla", "rope_dim": 16, "kv_rank": 32}}


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("case", EXTENSIONS)
def test_a_lossless_conversion_is_the_scheme_on_the_original(case, method):
    """Where YaRN says its factor on cos and sin, a conversion says it in the softmax scale: all dimensions rotate, so
    that both are the same."""
    given, scheme, options = EXTENSIONS[case]
    model, ids = build("llama"), tokens(2, 80)
    expected = logits(patch_model(copy.deepcopy(model), scheme, **options), ids)
    assert error(expected, logits(model, ids)) > 1e-2
    patch_model(model, "mla", calibration=CALIBRATION, **WHOLE[method], **given)
    assert error(logits(model, ids), expected) < 1e-4
    assert error(cached_logits(model, ids, 72), expected) < 1e-4
    assert model.config.max_position_embeddings == 4 * SHORT


def frequencies(case: str, width: int) -> Tensor:
    """By the papers' formulas, in float64."""
    pair = torch.arange(0, width, 2, dtype=torch.float64)
    if case == "ntk":
        return (10000.0 * 4.0 ** (width / (width - 2))) ** (-pair / width)
    plain = 10000.0 ** (-pair / width)
    if case == "linear":
        return plain / 4

    def dim(turns: float) -> float:
        return width * math.log(SHORT / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = max(math.floor(dim(32)), 0), min(math.ceil(dim(1)), width - 1)
    ramp = ((pair / 2 - low) / (high - low)).clamp(0, 1)
    return plain / 4 * ramp + plain * (1 - ramp)


@pytest.mark.parametrize("method", ["transmla", "mha2mla"])
@pytest.mark.parametrize("case", EXTENSIONS)
def test_rotary_keys_of_a_lossy_conversion(case, method):
    """What is cached is the key before rotation, turned in float64 by the extended frequency of the pair it kept."""
    model, ids = build("llama", num_hidden_layers=1), tokens(1, 80)
    options = {"method": method, "rope_dim": 8, "kv_rank": 12, "calibration": CALIBRATION, **EXTENSIONS[case][0]}
    patch_model(model, "mla", **options)
    layer = model.model.layers[0]
    bare: list[Tensor] = []
    handle = layer.self_attn.mla.kv_a_proj_with_mqa.register_forward_hook(lambda _, __, out: bare.append(out))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    handle.remove()
    kept = layer.self_attn.mla.frequency
    heads = 2 if method == "mha2mla" else 1
    assert kept.shape == (heads, 4)
    key = bare[0][0, :, 12:].double().view(80, heads, 2, 4)
    pairs = torch.complex(key[:, :, 0], key[:, :, 1])
    angle = torch.arange(80, dtype=torch.float64)[:, None, None] * frequencies(case, 16)[kept]
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), -1).flatten(1)
    assert error(cache.layers[0].values[0, 0].double(), expected) < 1e-5
    assert error(cached_logits(model, ids, 72), logits(model, ids)) < TOLERANCE
