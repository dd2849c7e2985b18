"""The frequencies of every rotary scheme are those of its authors and of its paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from pe_patch.schemes.rotary import Rotary

from . import goldens, oracles
from .rotary_cases import CASES, Draw, build, close, shape


def from_golden(name: str, entry: dict[str, Any], **options: Any) -> Rotary:
    said = entry["params"]
    window = said.get("original_max_position_embeddings", said.get("orig", said.get("max_position_embeddings", 8192)))
    return build(name, shape(said.get("dim", said.get("head_dim")), float(said["base"]), window), **options)


GOLDEN_OPTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "rope/inv_freq/": ("rope", lambda said: {}),
    "prope/": ("proportional", lambda said: {"partial_rotary_factor": said["p"]}),
    "linear/": ("linear", lambda said: {"factor": said["factor"]}),
    "ntk/": ("ntk", lambda said: {"factor": said["alpha"]}),
    "dynamic_ntk/": ("dynamic_ntk", lambda said: {"factor": said["factor"]}),
    "yarn/dim": ("yarn", lambda said: {key: said[key] for key in ("factor", "beta_fast", "beta_slow")}),
    "dynamic_yarn/": ("dynamic_yarn", lambda said: {}),
    "llama3/": (
        "llama3",
        lambda said: {key: said[key] for key in ("factor", "low_freq_factor", "high_freq_factor")},
    ),
    "llama4_scout/": (
        "llama3",
        lambda said: {key: said[key] for key in ("factor", "low_freq_factor", "high_freq_factor")},
    ),
    "resonance/": ("resonance", lambda said: {}),
    "resonance_yarn/": ("resonance", lambda said: {"over": {"scheme": "yarn", "factor": said["factor"]}}),
    "cope_clipped/": ("clipped_rope", lambda said: {"dims": said["clip_low_n"]}),
}
GOLDEN_KEYS = [(prefix, key) for prefix in GOLDEN_OPTIONS for key in goldens.load(prefix)]
FREQUENCY_FIELDS = (
    "inv_freq",
    "inv_freq_f32",
    "inv_freq_hf_f32",
    "inv_freq_f32_hf",
    "inv_freq_scaled_hf_f32",
    "inv_freq_cope_f32",
)


@pytest.mark.parametrize(("prefix", "key"), GOLDEN_KEYS)
def test_the_authors_own_numbers(prefix: str, key: str) -> None:
    entry = goldens.load(key)[key]
    name, options_of = GOLDEN_OPTIONS[prefix]
    scheme = from_golden(name, entry, **options_of(entry["params"]))
    inv_freq, attention_factor = scheme.frequencies(entry["params"].get("seq_len"))
    fields = [field for field in FREQUENCY_FIELDS if field in entry]
    assert fields
    for field in fields:
        close(inv_freq[: len(entry[field])], entry[field])
    assert not inv_freq[len(entry[fields[0]]) :].any()  # only p-RoPE's list is cut, and what is cut stands still
    for field in ("attention_factor", "attention_factor_hf"):
        assert attention_factor == pytest.approx(entry.get(field, attention_factor), rel=1e-12)
    if "wavelengths" in entry:
        close(2 * math.pi / inv_freq.double(), entry["wavelengths"])
    if "inv_freq_hf_truncate_false_f32" in entry:
        loose = from_golden(name, entry, truncate=False, **options_of(entry["params"]))
        close(loose.inv_freq, entry["inv_freq_hf_truncate_false_f32"])


def test_the_authors_own_longrope() -> None:
    entry = goldens.load("longrope/")["longrope/llama3_8b_longrope2_su"]
    said = entry["params"]
    factor = said["max_position_embeddings"] / said["orig"]
    scheme = from_golden("longrope", entry, long_factor=entry["long_factor"], factor=factor)
    for field in ("inv_freq_f32", "inv_freq_hf_long_f32"):
        close(scheme.frequencies(said["orig"] + 1)[0], entry[field])
    close(scheme.frequencies(said["orig"])[0], entry["inv_freq_hf_short_f32"])
    assert scheme.attention_scaling == pytest.approx(entry["attention_factor"], rel=1e-12)
    expected, attention = oracles.longrope(128, said["base"], entry["long_factor"], factor, said["orig"])
    assert expected == pytest.approx(entry["inv_freq_f64"], rel=1e-9)
    assert attention == pytest.approx(entry["attention_factor"], rel=1e-9)


def test_yarn_attention_factors_of_transformers_and_deepseek() -> None:
    for factor, row in goldens.load("yarn/")["yarn/attention_factor_table"]["value"].items():
        for said, expected in row.items():
            if said.startswith("softmax_scale_mult"):
                continue  # DeepSeek's own multiplier of the softmax scale
            pairs = [] if said == "default" else [part.split("=") for part in said.split(",")]
            options = {key: float(value) for key, value in pairs}
            scheme = build("yarn", None, factor=float(factor), **options)
            assert scheme.attention_scaling == pytest.approx(expected, rel=1e-12), (factor, said)
            assert oracles.yarn_attention(float(factor), **options) == pytest.approx(expected, rel=1e-12)


ORACLES_OF_GOLDENS: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    "rope/inv_freq/": lambda p: oracles.rope(p["dim"], p["base"]),
    "ntk/": lambda p: oracles.ntk(p["dim"], p["base"], p["alpha"]),
    "dynamic_ntk/": lambda p: oracles.dynamic_ntk(
        p["dim"], p["base"], p["factor"], p["max_position_embeddings"], p["seq_len"]
    ),
    "yarn/dim": lambda p: oracles.yarn_frequencies(
        p["dim"], p["base"], p["factor"], p["original_max_position_embeddings"]
    ),
    "dynamic_yarn/": lambda p: oracles.dynamic_yarn(p["dim"], p["base"], p["orig"], p["seq_len"])[0],
    "llama3/": lambda p: oracles.by_turns(p["dim"], p["base"], p["factor"], 8192, 1, 4),
}


@pytest.mark.parametrize("prefix", ORACLES_OF_GOLDENS)
def test_the_oracles_are_the_authors_in_float64(prefix: str) -> None:
    for key, entry in goldens.load(prefix).items():
        assert ORACLES_OF_GOLDENS[prefix](entry["params"]) == pytest.approx(entry["inv_freq_f64"], rel=1e-9), key


@pytest.mark.parametrize("seed", range(CASES))
def test_the_papers_in_float64(seed: int) -> None:
    draw = Draw(seed)
    r, theta, s, window = draw.width, draw.theta, draw.factor, draw.window
    beyond = draw.random.randrange(window + 1, 30 * window)
    low, high = draw.random.uniform(0.5, 2), draw.random.uniform(2, 40)
    stretch = draw.numbers(1, 20)
    part, dims = draw.random.uniform(2 / r, 1), draw.random.randint(2, draw.pairs)
    by_scheme: dict[str, tuple[dict[str, Any], list[float], float]] = {
        "rope": ({}, oracles.rope(r, theta), 1.0),
        "linear": ({"factor": s}, oracles.linear(r, theta, s), 1.0),
        "ntk": ({"factor": s}, oracles.ntk(r, theta, s), 1.0),
        "dynamic_ntk": ({"factor": s}, oracles.dynamic_ntk(r, theta, s, window, beyond), 1.0),
        "ntk_by_parts": (
            {"factor": s, "alpha": low, "beta": high},
            oracles.by_turns(r, theta, s, window, low, high),
            1.0,
        ),
        "llama3": (
            {"factor": s, "low_freq_factor": low, "high_freq_factor": high},
            oracles.by_turns(r, theta, s, window, low, high),
            1.0,
        ),
        "yarn": (
            {"factor": s, "beta_fast": 20, "beta_slow": 2, "truncate": False},
            oracles.yarn_frequencies(r, theta, s, window, 20, 2, truncate=False),
            oracles.yarn_attention(s),
        ),
        "dynamic_yarn": ({"factor": s}, *oracles.dynamic_yarn(r, theta, window, beyond, cap=s)),
        "longrope": ({"long_factor": stretch, "factor": s}, *oracles.longrope(r, theta, stretch, s, window)),
        "proportional": (
            {"partial_rotary_factor": part, "factor": s},
            oracles.proportional(r, theta, part, s),
            1.0,
        ),
        "clipped_rope": (
            {"dims": dims, "over": {"scheme": "ntk", "factor": s}},
            oracles.clipped(oracles.ntk(r, theta, s), dims),
            1.0,
        ),
    }
    for name, (options, frequencies, attention) in by_scheme.items():
        ours, factor = build(name, draw.shape, **options).frequencies(beyond)
        try:
            close(ours, frequencies, 3e-6)  # float32 loses a few bits where a ramp is steep
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        assert factor == pytest.approx(attention, rel=1e-12), name


@pytest.mark.parametrize("seed", range(CASES))
def test_resonance_in_float64(seed: int) -> None:
    draw = Draw(seed)
    ours, factor = build("resonance", draw.shape, over={"rope_type": "yarn", "factor": draw.factor}).frequencies()
    plain = oracles.yarn_frequencies(draw.width, draw.theta, draw.factor, draw.window)
    for k, (mine, expected) in enumerate(zip(ours.tolist(), oracles.resonance(plain), strict=True)):
        wavelength = oracles.TURN / plain[k]
        if abs(wavelength % 1 - 0.5) > 1e-6 * wavelength:  # float32 cannot tell which way the others round
            assert mine == pytest.approx(expected, rel=1e-6), k
    assert factor == pytest.approx(oracles.yarn_attention(draw.factor), rel=1e-12)
