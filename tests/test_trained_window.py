"""The window that a model was trained for: the same number through every door, or a question."""

from __future__ import annotations

import copy
import json
import logging
import math
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pe_patch import NoEffectError, UnsupportedError, describe, load_patched, patch_model
from pe_patch.adapters.trained_window import author_facts, trained_window
from pe_patch.advice import advise
from pe_patch.checkpoints.sources import empty_model
from pe_patch.cli import main as cli
from pe_patch.doctor import diagnose, examine
from pe_patch.errors import OptionError
from pe_patch.patching.api import unpatch_model
from pe_patch.patching.targets import find_stack
from pe_patch.schemes.config_formats import UNSCALED_MAXIMA, read

from . import families
from .models import build, error, logits, tokens
from .real_configs import DEEPSEEK_V3, GEMMA3, LLAMA31, PHI3, R1_QWEN3, REAL, VICUNA, YARN_64K, YARN_MISTRAL

KEY = "original_max_position_embeddings"
LIST = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
QWEN3 = {"model_type": "qwen3", "max_position_embeddings": 40960, "rope_theta": 1e6}
CARD = {"rope_type": "yarn", "factor": 4.0, KEY: 32768}
LINEAR = {"rope_theta": 1e5, "max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}


def tiny(real: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the positions of a released model and the sizes of a toy."""
    family = real["model_type"]
    sizes = families.COMMON | families.SIZES.get(family, families.GROUPED)
    whole = {key: value for key, value in sizes.items() if key != "max_position_embeddings"} | copy.deepcopy(real)
    whole["hidden_size"] = 64
    if family == "phi3":
        whole |= {"num_attention_heads": 8, "head_dim": 8}
    if (whole.get("rope_scaling") or {}).get("type") == "su":
        whole["rope_scaling"]["type"] = "longrope"
    return whole


def model_of(real: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[real["model_type"]].from_dict(tiny(real))).eval()


def far(model: Any) -> dict[str, Any]:
    """Gemma 3's far-reaching layers."""
    kinds = getattr(model.config, "layer_types", None) or []
    chosen = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    return {"layers": chosen} if model.config.model_type == "gemma3_text" else {}


WINDOWS: dict[str, tuple[dict[str, Any], int, int]] = {
    # before the scaling, and with it
    "Llama 2": ({"model_type": "llama", "max_position_embeddings": 4096}, 4096, 4096),
    "CodeLlama": ({"model_type": "llama", "max_position_embeddings": 16384, "rope_theta": 1e6}, 16384, 16384),
    "Yi 200K": ({"model_type": "llama", "max_position_embeddings": 200000, "rope_theta": 5e6}, 200000, 200000),
    "Llama 3.1": (LLAMA31, 8192, 131072),  # factor 8, and windows 16 apart
    "Llama 3.2": (
        {**LLAMA31, "rope_scaling": {**LLAMA31["rope_scaling"], "factor": 32.0}}, 8192, 131072,
    ),  # not 32 x 8192 = 262,144
    "Gemma 3 4B": (GEMMA3, 16384, 131072),  # 131,072 / 8
    "Gemma 3 4B, v4": (REAL["Gemma-3 (v4, a base of its own for the sliding layers)"][0], 16384, 131072),
    "Vicuna 16k": (VICUNA, 4096, 16384),  # max_sequence_length = 4 x 4096
    "linear, all lengths after the factor": (
        {"model_type": "llama", "max_sequence_length": 16384, **LINEAR}, 4096, 16384,  # 16,384 / 4
    ),
    "linear, with the window before": (
        {"model_type": "llama", **LINEAR, "rope_scaling": {**LINEAR["rope_scaling"], KEY: 4096}}, 4096, 16384,
    ),
    "Phi-3 128k": (PHI3, 4096, 131072),
    "DeepSeek-V3": (DEEPSEEK_V3, 4096, 163840),  # 40 x 4096
    "Yarn-Llama-2": (YARN_64K, 4096, 65536),  # 16 x 4096
    "Yarn-Mistral": (YARN_MISTRAL, 8192, 131072),  # 16 x 8192 beside 32,768
    "Qwen2.5 by its card": (REAL["Qwen2.5-7B-Instruct with YaRN, as its card says"][0], 32768, 131072),  # 4 x 32,768
    "Qwen2.5": ({"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1e6}, 32768, 32768),
    "Qwen3": (QWEN3, 32768, 32768),  # the card; 40,960 holds 8,192 more
    "Qwen3 MoE": ({**QWEN3, "model_type": "qwen3_moe"}, 32768, 32768),
    "Qwen3 by its card": ({**QWEN3, "rope_scaling": CARD}, 32768, 131072),
    "R1-0528-Qwen3": (R1_QWEN3, 32768, 131072),
    "Mistral 0.1": ({"model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 1e4}, 8192, 8192),
    "Mistral 0.3": ({"model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 1e6}, 32768, 32768),
    "InternLM's dynamic": (
        {"model_type": "llama", "max_position_embeddings": 32768, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        32768, 32768,  # within it dynamic NTK changes nothing
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_one_number_through_every_door(name, tmp_path, capsys):
    real, before, after = WINDOWS[name]
    (tmp_path / "config.json").write_text(json.dumps(tiny(real)))
    model = model_of(real)
    _, base = find_stack(model, None)
    window = trained_window(base, base.config)
    assert (window.length, window.scaled_length) == (before, after) and window.source
    assert trained_window(None, base.config) == window  # from the config alone
    scaled = before != after or window.scaled
    patch_model(model, "ntk", factor=2, on_existing="replace", **far(model))
    replaced = describe(model).effective
    assert (replaced["trained_window"], replaced["effective_window"]) == (before, 2 * before)
    assert replaced["trained_window_source"] == window.source and window.source in str(describe(model))
    unpatch_model(model)
    patch_model(model, "resonance", on_existing="compose" if scaled else "error", **far(model))
    composed = describe(model).effective
    assert (composed["trained_window"], composed["trained_window_source"]) == (
        after, window.scaled_source or window.source,
    )  # fmt: skip
    facts = advise(str(tmp_path), 2 * after).case.facts
    assert (facts.original, facts.window) == (before, after)
    numbers = diagnose(tmp_path).effective
    numbers = numbers.get("full_attention") or numbers["all"]
    assert (numbers["trained_window"], numbers["scaled_window"]) == (before, after)
    assert not [finding for finding in examine(tmp_path) if "window" in finding.code and finding.severity == "error"]
    if not far(model):
        words = ["--scheme", "ntk", "--factor", "2", "--on-existing", "replace", "--json"]
        assert cli.main(["inspect", str(tmp_path), *words]) == 0
        assert json.loads(capsys.readouterr().out)["effective"]["trained_window"] == before


@pytest.mark.parametrize("name", ["Llama 3.1", "Llama 3.2", "Gemma 3 4B", "Vicuna 16k", "Qwen3 by its card"])
def test_composed_schemes_count_from_the_window_as_it_is(name):
    real, _, after = WINDOWS[name]
    model = model_of(real)
    # three quarters and an eighth of the window, which is what the authors of DCA take
    patch_model(model, "dca", on_existing="compose", **far(model))
    assert describe(model).effective["chunk_size"] == 3 * after // 4
    unpatch_model(model)
    patch_model(model, "self_extend", factor=2, on_existing="compose", **far(model))
    # W = 1024 and the smallest G with W + (N - W) / G <= 2 L / 3, N = 2 L
    group = math.ceil((2 * after - 1024) / (2 * after / 3 - 1024))
    assert describe(model).effective["group"] == group
    assert model.config.max_position_embeddings == (after - 1024) * group + 1024
    unpatch_model(model)
    schemes = advise(model.config, 4 * after).schemes
    assert {"dca", "self_extend"} <= {one.scheme for one in schemes if one.obstacle is None and one.untrained == "yes"}


@pytest.mark.parametrize("given", [{}, {KEY: 131072}, {KEY: 8192}])
def test_llama31_takes_the_chunk_that_fits_its_window(given, tmp_path):
    model = model_of(LLAMA31)
    patch_model(model, "dca", on_existing="compose", chunk_size=98304, **given)
    assert describe(model).effective["chunk_size"] == 98304
    rotary = model.model.position_schemes.original["rotary_emb"]
    assert torch.allclose(model.model.position_schemes.scheme[0].inv_freq, rotary.inv_freq, rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path)
    ids = tokens(1, 20)
    assert torch.equal(logits(load_patched(tmp_path), ids), logits(model, ids))
    unpatch_model(model)
    with pytest.raises(OptionError, match="at most 131072"):
        patch_model(model, "dca", on_existing="compose", chunk_size=131073, **given)


def small_gemma() -> Any:
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    return families.build("gemma3_text", rope_parameters=rope)  # 64 tokens with the factor, 8 before it


def test_dca_over_a_window_that_counts_the_factor_changes_what_lies_beyond_its_chunk():
    model, ids = small_gemma(), tokens(2, 100)
    native = logits(model, ids)
    patch_model(model, "dca", on_existing="compose", **far(model))
    assert describe(model).effective["chunk_size"] == 48  # 3 x 64 / 4
    changed = (logits(model, ids) - native).abs().amax(dim=(0, 2))
    assert changed[:48].max() < 1e-5 and changed[56:].max() > 1e-2


@pytest.mark.parametrize("name", ["Gemma 3 4B", "Llama 3.1", "DeepSeek-V3", "Qwen3 by its card", "Vicuna 16k"])
def test_replace_starts_from_the_unscaled_window_and_base(name):
    """Transformers' own YaRN from that window."""
    real, before, _ = WINDOWS[name]
    model = model_of(real)
    kind = "full_attention" if far(model) else None
    theta = model.config.rope_parameters[kind]["rope_theta"] if kind else model.config.rope_parameters["rope_theta"]
    patch_model(model, "yarn", factor=4, on_existing="replace", **far(model))
    config = copy.deepcopy(model.config)
    config.layer_types = None
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": theta, KEY: before}
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    scheme = describe(model)
    ours = torch.tensor(scheme.effective["wavelengths_in_tokens"])
    assert torch.allclose(2 * math.pi / expected, ours, rtol=1e-3)
    assert scheme.effective["attention_factor"] == pytest.approx(factor)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_qwen3_is_extended_from_what_it_was_trained_on(family, caplog):
    model = model_of({**QWEN3, "model_type": family})
    with caplog.at_level(logging.INFO, "pe_patch"):
        patch_model(model, "yarn", factor=4)
    assert "32,768 tokens (the model card of Qwen3" in caplog.text
    expected = model_of({**QWEN3, "model_type": family, "rope_scaling": CARD}).model.rotary_emb
    assert torch.equal(model.model.rotary_emb.inv_freq, expected.inv_freq)
    assert model.config.max_position_embeddings == 131072 and model.config.rope_parameters[KEY] == 32768


def test_the_loaded_model_decides_on_the_temperature_underneath():
    """`attn_factor` is not read by Transformers, which multiplies by 0.1 ln 4 + 1."""
    model = model_of(R1_QWEN3)
    native = logits(model, tokens(1, 30))
    patch_model(model, "rerope", window=40, on_existing="compose")
    assert describe(model).effective["attention_factor"] == pytest.approx(0.1 * math.log(4) + 1)
    assert error(logits(model, tokens(1, 30)), native) < 1e-5


@pytest.mark.parametrize("family", ["llama", "llama4_text", "deepseek_v2", "cohere", "gpt_oss", "gpt_neox"])
def test_within_the_near_window_a_composed_scheme_is_the_model_itself(family):
    """Whatever Transformers does with YaRN's factor: on cos and sin, into the softmax scale, or, as Llama 4 normalises
    what is rotated, nothing."""
    config = families.build(family).config
    kept = {
        key: value for key, value in config.rope_parameters.items() if key in ("rope_theta", "partial_rotary_factor")
    }
    config.rope_parameters = {**kept, "rope_type": "yarn", "factor": 4.0, KEY: 16}
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tokens(2, 12)
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    native = logits(model, ids)
    patch_model(model, "rerope", window=14, on_existing="compose")
    assert error(logits(model, ids), native) < 1e-5


NOTHING = {
    "self_extend by 1": ("self_extend", {"factor": 1.0}),
    "groups of one": ("self_extend", {"group": 1}),
    "no room for groups": ("self_extend", {"group": 8, "window": 131072}),
    "leaky by 1": ("leaky_rerope", {"k": 1}),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_nothing_over_a_scaling_is_refused(name):
    scheme, options = NOTHING[name]
    model = model_of(LLAMA31)
    with pytest.raises(NoEffectError, match=r"changes nothing up to .* tokens"):
        patch_model(model, scheme, on_existing="compose", **options)
    assert not hasattr(model.config, "pe_patch")


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("lm_infinite", {}), ("rerope", {}), ("string", {}), ("clipped_rope", {"dims": 2}), ("rope_alibi", {}),
     ("dca", {"chunk_size": 131072}), ("self_extend", {"group": 2, "log_scaling": True})],
)  # fmt: skip
def test_what_changes_something_is_not(scheme, options):
    patch_model(model_of(LLAMA31), scheme, on_existing="compose", **options)


def test_a_window_that_two_readings_fit_is_asked_for(tmp_path, capsys):
    model = model_of({"model_type": "llama", **LINEAR})
    with pytest.raises(OptionError, match=rf"{KEY}=4096 or {KEY}=16384"):
        patch_model(model, "yarn", factor=4, on_existing="replace")
    with pytest.raises(OptionError, match=rf"{KEY}=16384 or {KEY}=65536"):
        patch_model(model, "dca", on_existing="compose")
    for given, window in ((4096, 16384), (16384, 16384), (65536, 65536)):
        patch_model(model, "dca", on_existing="compose", **{KEY: given})
        assert describe(model).effective["trained_window"] == window
        unpatch_model(model)
    patch_model(model, "yarn", factor=4, on_existing="replace", **{KEY: 4096})
    assert describe(model).effective["effective_window"] == 16384
    unpatch_model(model)
    patch_model(model, "alibi", on_existing="replace")  # which needs no window
    with pytest.raises(OptionError, match="trained_length=16384 or trained_length=65536"):
        advise(CONFIG_MAPPING["llama"].from_dict(tiny({"model_type": "llama", **LINEAR})), 131072)
    settled = advise(
        CONFIG_MAPPING["llama"].from_dict(tiny({"model_type": "llama", **LINEAR})), 131072, trained_length=16384
    )
    assert (settled.case.facts.original, settled.case.facts.window) == (4096, 16384)


@pytest.mark.parametrize("given", ["4k", 0, -5, 2.5, True, float("nan"), float("inf"), [4096]])
def test_a_window_that_is_none_is_refused(given):
    with pytest.raises(OptionError, match=KEY):
        patch_model(model_of(LLAMA31), "dca", on_existing="compose", **{KEY: given})


@pytest.mark.parametrize("family", sorted(set(families.LANGUAGE_MODELS) - {"bloom"}))
def test_a_window_raised_after_building_is_not_believed(family, caplog):
    model = families.build(family)
    model.config.max_position_embeddings = 2048
    _, base = find_stack(model, None)
    window = trained_window(base, base.config)
    assert window.length == families.WINDOW and "built with" in window.source and "2,048" in window.source


def test_a_raised_window_gives_the_model_of_the_built_one(caplog):
    model, ids = build("llama"), tokens(2, 60)
    model.config.max_position_embeddings = 2048
    [finding] = examine(model)
    assert finding.code == "window_raised" and "32 tokens" in finding.in_effect
    patch_model(model, "yarn", factor=8)
    assert "2048" in caplog.text and "32 tokens" in caplog.text
    parameters = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, KEY: 32}
    expected = build("llama", rope_parameters=parameters, max_position_embeddings=256)
    assert error(logits(model, ids), logits(expected, ids)) < 1e-5
    assert model.config.max_position_embeddings == 256


@pytest.mark.parametrize("on_existing", ["replace", "compose"])
@pytest.mark.parametrize("change", [{"factor": 4.0}, {"rope_theta": 1e6}, {KEY: 4096}])
def test_a_scaling_changed_after_building_is_not_believed(change, on_existing):
    model = model_of(LLAMA31)
    model.config.rope_parameters = {**model.config.rope_parameters, **change}
    with pytest.raises(UnsupportedError, match="load the model again"):
        patch_model(model, "dca", on_existing=on_existing)


@pytest.mark.parametrize("value", [None, 0, -1])
def test_a_window_that_no_config_names_is_no_fact(value, tmp_path, capsys):
    """LlamaConfig fills in 2,048."""
    whole = tiny({"model_type": "llama", "rope_theta": 1e4}) | (
        {} if value is None else {"max_position_embeddings": value}
    )
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(OptionError, match="give trained_length=<tokens>, for example trained_length=4096"):
        advise(str(tmp_path), 8192)
    assert advise(str(tmp_path), 8192, trained_length=256).case.facts.window == 256
    findings = [finding for finding in examine(tmp_path) if finding.code == "window_unknown"]
    assert len(findings) == 1 and findings[0].severity == "error" and "4096" in findings[0].remedy
    assert diagnose(tmp_path).effective["all"]["trained_window"] is None
    with pytest.raises(OptionError, match=f"give {KEY}=<tokens>"):
        patch_model(empty_model(str(tmp_path)), "yarn", factor=4)
    loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(OptionError, match=f"give {KEY}=<tokens>"):
        patch_model(loaded, "yarn", factor=4)
    patch_model(loaded, "yarn", factor=4, **{KEY: 256})
    assert describe(loaded).effective["effective_window"] == 1024


def test_qwen3s_card_is_no_fault(tmp_path):
    real = {**QWEN3, "rope_scaling": CARD}
    assert read({**real, "hidden_size": 64}).options["factor"] == 4.0
    (tmp_path / "config.json").write_text(json.dumps(tiny(real)))
    assert [finding.severity for finding in examine(tmp_path)] == ["note"]  # the window was left as it was
    with pytest.raises(OptionError, match=r"is 1\.25"):
        read({**real, "model_type": "llama"})


def test_the_windows_that_dialects_know_are_the_authors():
    for (family, maximum), length in UNSCALED_MAXIMA.items():
        config = CONFIG_MAPPING[family](max_position_embeddings=maximum)
        word = author_facts(config, maximum, {"rope_type": "default", "rope_theta": 1e4})
        assert word is not None and word.trained_length == length
