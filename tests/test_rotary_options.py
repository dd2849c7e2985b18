"""What the options of rotary schemes do, what asks for nothing and changes nothing, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pe_patch.errors import OptionError, UnknownNameError

from . import oracles
from .rotary_cases import build, close, shape, transformers_says

IDENTITIES: list[tuple[str, dict[str, Any]]] = [
    ("rope", {}),
    ("linear", {"factor": 1}),
    ("ntk", {"factor": 1}),
    ("ntk_by_parts", {"factor": 1}),
    ("llama3", {"factor": 1}),
    ("yarn", {"factor": 1}),
    ("yarn", {"factor": 1.0, "mscale": 0.7, "mscale_all_dim": 0.5}),
    ("proportional", {"partial_rotary_factor": 1}),
    ("longrope", {"long_factor": [1.0] * 64}),
    ("longrope", {"long_factor": [1] * 64, "factor": 1}),
]


@pytest.mark.parametrize(("name", "options"), IDENTITIES)
def test_nothing_asked_changes_no_bit(name: str, options: dict[str, Any]) -> None:
    scheme = build(name, **options)
    plain, _ = transformers_says({"rope_type": "default", "rope_theta": 10000.0}, 128, 4096)
    for length in (None, 1, 4096, 4097, 100000):
        inv_freq, factor = scheme.frequencies(length)
        assert torch.equal(inv_freq, plain)
        assert factor == 1.0
    assert not scheme.length_dependent
    assert scheme.effective_window == 4096


AUTO = ("linear", "ntk", "ntk_by_parts", "yarn", "llama3")
LENGTH_DEPENDENT: list[tuple[str, dict[str, Any]]] = [
    *((name, {"factor": "auto"}) for name in AUTO),
    ("dynamic_ntk", {}),
    ("dynamic_ntk", {"factor": 2.3}),
    ("dynamic_yarn", {}),
    ("dynamic_yarn", {"factor": 3, "attention_factor": 1.3}),
    ("yarn", {"factor": "auto", "attention_factor": 1.3}),
]


@pytest.mark.parametrize(("name", "options"), LENGTH_DEPENDENT)
def test_within_the_window_no_bit_changes(name: str, options: dict[str, Any]) -> None:
    scheme = build(name, **options)
    plain, _ = transformers_says({"rope_type": "default", "rope_theta": 10000.0}, 128, 4096)
    assert scheme.length_dependent
    for length in (None, 1, 4095, 4096):
        assert torch.equal(scheme.frequencies(length)[0], plain)
        assert scheme.frequencies(length)[1] == 1.0
    assert not torch.equal(scheme.frequencies(4097)[0], plain)


@pytest.mark.parametrize("name", AUTO)
def test_an_automatic_factor_grows_in_powers_of_two(name: str) -> None:
    scheme = build(name, factor="auto")
    regimes = {1: 4096, 4096: 4096, 4097: 8192, 8192: 8192, 8193: 16384, 100000: 131072}
    assert {length: scheme.regime(length) for length in regimes} == regimes
    assert scheme.effective_window is None
    assert scheme.native() is None
    for length, regime in regimes.items():
        fixed = build(name, factor=regime / 4096)
        assert torch.equal(scheme.frequencies(length)[0], fixed.frequencies()[0])
        assert scheme.frequencies(length)[1] == fixed.frequencies()[1]


def test_expected_length_starts_where_it_says() -> None:
    scheme = build("dynamic_ntk", expected_length=10000)
    close(scheme.inv_freq, oracles.dynamic_ntk(128, 10000.0, 1, 4096, 10000))
    assert scheme.regime(5) == 10000 and scheme.effective_window == 10000 and scheme.native() is None
    long = build("longrope", long_factor=[2.0] * 64, expected_length=8192)
    close(long.inv_freq, [w / 2 for w in oracles.rope(128, 10000.0)])
    assert not long.length_dependent and long.effective_window == 8192


WINDOWS: list[tuple[str, dict[str, Any], int | None]] = [
    ("rope", {}, 4096),
    ("linear", {"factor": 2.5}, 10240),
    ("dynamic_ntk", {}, None),
    ("dynamic_ntk", {"factor": 2}, 8192),
    ("dynamic_yarn", {}, None),
    ("dynamic_yarn", {"factor": 3, "expected_length": 20000}, 20000),
    ("longrope", {"long_factor": [2.0] * 64}, 4096),
    ("longrope", {"long_factor": [2.0] * 64, "factor": 32}, 131072),
    ("proportional", {"partial_rotary_factor": 0.5, "factor": 2}, 8192),
    ("resonance", {"over": {"scheme": "yarn", "factor": 4}}, 16384),
    ("clipped_rope", {}, 4096),
    ("yarn", {"factor": 4, "original_max_position_embeddings": 1024}, 4096),
]


@pytest.mark.parametrize(("name", "options", "window"), WINDOWS)
def test_effective_window(name: str, options: dict[str, Any], window: int | None) -> None:
    assert build(name, **options).effective_window == window


def test_equal_bounds_are_a_step() -> None:
    steps: list[tuple[str, dict[str, Any]]] = [
        ("llama3", {"low_freq_factor": 2, "high_freq_factor": 2}),
        ("ntk_by_parts", {"alpha": 2, "beta": 2}),
    ]
    for name, options in steps:
        inv_freq = build(name, factor=16, **options).inv_freq
        close(inv_freq, oracles.by_turns(128, 10000.0, 16, 4096, 2, 2))
        assert inv_freq.isfinite().all()


def test_a_scheme_over_another_keeps_its_length_dependence() -> None:
    for over in ("dynamic_yarn", {"scheme": "yarn", "factor": "auto"}, {"type": "dynamic", "factor": 2.0}):
        scheme = build("resonance", over=over)
        assert scheme.length_dependent
        assert not torch.equal(scheme.frequencies(4096)[0], scheme.frequencies(8192)[0])
    assert build("resonance", over={"scheme": "yarn", "factor": "auto"}).regime(5000) == 8192
    nested = build("clipped_rope", dims=4, over={"scheme": "resonance", "over": "rope"})
    close(nested.inv_freq, oracles.clipped(oracles.resonance(oracles.rope(128, 10000.0)), 4), 2e-6)
    assert build("resonance", theta=500000.0).base == 500000.0
    assert build("resonance", over={"rope_type": "default", "rope_theta": 1e6}).base == 1e6


SIXTY_FOUR = [2.0] * 64
BAD: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"factor": bad}, "factor") for name in AUTO for bad in (0.5, "4", math.nan, math.inf, None, True, [4])),
    ("linear", {}, "factor"),
    ("linear", {"factor": "Auto"}, "auto"),
    ("linear", {"facto": 4}, "'factor'"),
    ("dynamic_ntk", {"factor": "auto"}, "factor"),
    ("dynamic_ntk", {"factor": 0.9}, "factor"),
    ("dynamic_ntk", {"expected_length": 0}, "expected_length"),
    ("dynamic_ntk", {"expected_length": 1.5}, "expected_length"),
    ("dynamic_yarn", {"factor": 0.5}, "factor"),
    ("dynamic_yarn", {"expected_length": "long"}, "expected_length"),
    ("ntk_by_parts", {"factor": 2, "alpha": 33}, "alpha"),
    ("ntk_by_parts", {"factor": 2, "alpha": 0}, "alpha"),
    ("yarn", {"factor": 2, "beta_fast": 1, "beta_slow": 2}, "beta_slow"),
    ("yarn", {"factor": 2, "beta_slow": 0}, "beta_slow"),
    ("yarn", {"factor": 2, "attention_factor": -1}, "attention_factor"),
    ("yarn", {"factor": 2, "attention_factor": "big"}, "attention_factor"),
    ("yarn", {"factor": 2, "mscale": math.nan}, "mscale"),
    ("yarn", {"factor": 2, "truncate": "false"}, "truncate"),
    ("llama3", {"factor": 2, "low_freq_factor": 5}, "low_freq_factor"),
    ("llama3", {"factor": 2, "high_freq_factor": 0}, "high_freq_factor"),
    ("longrope", {}, "long_factor"),
    ("longrope", {"long_factor": SIXTY_FOUR[1:]}, "63"),
    ("longrope", {"long_factor": 2.0}, "long_factor"),
    ("longrope", {"long_factor": "2" * 64}, "long_factor"),
    ("longrope", {"long_factor": [*SIXTY_FOUR[1:], -1.0]}, r"long_factor\[63\]"),
    ("longrope", {"long_factor": SIXTY_FOUR, "short_factor": [0.0] * 64}, "short_factor"),
    ("longrope", {"long_factor": SIXTY_FOUR, "factor": 0.5}, "factor"),
    ("proportional", {"partial_rotary_factor": 0}, "partial_rotary_factor"),
    ("proportional", {"partial_rotary_factor": 1.1}, "partial_rotary_factor"),
    ("proportional", {"partial_rotary_factor": 0.001}, "nope"),
    ("proportional", {"partial_rotary_factor": 0.5, "factor": "auto"}, "factor"),
    ("clipped_rope", {"dims": 1}, "dims"),
    ("clipped_rope", {"dims": 2.5}, "dims"),
    ("clipped_rope", {"over": "alibi"}, "alibi"),
    ("resonance", {"over": "sinusoidal"}, "sinusoidal"),
    ("resonance", {"over": 3}, "over"),
    ("resonance", {"over": {"scheme": "yarn"}}, "factor"),
    ("resonance", {"over": {"rope_type": "default", "rope_theta": 5.0}, "theta": 6.0}, "theta"),
    ("resonance", {"over": {"full_attention": {"rope_type": "default"}}}, "layer type"),
]


@pytest.mark.parametrize(("name", "options", "says"), BAD)
def test_bad_options_teach(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        build(name, **options)


def test_an_unknown_scheme_underneath_names_the_near_one() -> None:
    with pytest.raises(UnknownNameError, match="'yarn'"):
        build("resonance", over="yarm")


@pytest.mark.parametrize(("name", "options"), [("ntk", {"factor": 2}), ("dynamic_ntk", {})])
def test_a_base_cannot_change_for_one_pair(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="linear"):
        build(name, shape(2), **options)


def test_clipping_all_must_be_asked_for() -> None:
    with pytest.raises(OptionError, match="dims"):
        build("clipped_rope", shape(40))
    assert build("clipped_rope", shape(42)).inv_freq[0] == 1.0
    close(
        build("clipped_rope", shape(16), dims=20).inv_freq, oracles.clipped(oracles.rope(16, 10000.0), 8), relative=2e-6
    )
