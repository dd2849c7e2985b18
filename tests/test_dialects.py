"""What a config says is read in every dialect, and what contradicts itself is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pe_patch.core.scheme import AttentionShape
from pe_patch.errors import OptionError, PePatchError, UnknownNameError, UnsupportedError
from pe_patch.schemes.config_formats import Specification, read
from pe_patch.schemes.registry import SCHEMES

from .real_configs import LONG, REAL, SHORT


@pytest.mark.parametrize("model", REAL)
def test_real_configs(model: str) -> None:
    config, expected = REAL[model]
    assert read(config) == expected


@pytest.mark.parametrize("model", REAL)
def test_real_configs_build(model: str) -> None:
    reading = read(REAL[model][0])
    shape = AttentionShape(32, 4, 4, 8, 8, 0, 10000.0, 4096, 2)
    for one in [reading] if isinstance(reading, Specification) else reading.values():
        SCHEMES[one.scheme](shape, **one.options)


SMALL: list[tuple[dict[str, Any], Specification]] = [
    ({"rope_type": "default"}, Specification("rope")),
    ({"type": "none"}, Specification("rope")),
    ({"rope_theta": 1e6}, Specification("rope", {"theta": 1e6})),
    ({"type": "linear", "rope_type": "linear", "factor": 2}, Specification("linear", {"factor": 2})),
    ({"type": "su", "rope_type": "longrope", "long_factor": LONG}, Specification("longrope", {"long_factor": LONG})),
    ({"rope_type": "deepseek_yarn", "factor": 2}, Specification("yarn", {"factor": 2})),
    ({"rope_type": "yarn", "factor": 2, "beta_fast": None}, Specification("yarn", {"factor": 2})),
    ({"scheme": "self_extend", "group": 8}, Specification("self_extend", {"group": 8})),
    (
        {"scheme": "resonance", "over": {"scheme": "ntk", "factor": 2}},
        Specification("resonance", {"over": {"scheme": "ntk", "factor": 2}}),
    ),
    ({"version": 1, "scheme": "yarn", "options": {"factor": 4}}, Specification("yarn", {"factor": 4})),
    (
        {"model_type": "llama", "rope_scaling": None, "pe_patch": {"version": 1, "scheme": "alibi", "options": {}}},
        Specification("alibi"),
    ),
    (
        {"type": "dynamic-yarn", "original_max_position_embeddings": 2048},
        Specification("dynamic_yarn", {"original_max_position_embeddings": 2048}),
    ),
    (
        {
            "max_position_embeddings": 8192,
            "rope_scaling": {"type": "dynamic-yarn", "finetuned": True, "original_max_position_embeddings": 2048},
        },
        Specification("dynamic_yarn", {"expected_length": 8192, "original_max_position_embeddings": 2048}),
    ),
    (
        {"rope_type": "yarn", "factor": 4, "attn_factor": 1.0, "extrapolation_factor": 1.0},
        Specification("yarn", {"factor": 4}),
    ),
    (
        {"rope_type": "yarn", "factor": 4, "attn_factor": 1.1, "attention_factor": 1.1},
        Specification("yarn", {"factor": 4, "attention_factor": 1.1}),
    ),
    (
        {"text_config": {"rope_theta": 5e5, "model_type": "llama"}, "model_type": "llava"},
        Specification("rope", {"theta": 5e5}),
    ),
    # 128000 / 4096 = 31.25, which a trainer had rounded up
    (
        {
            "max_position_embeddings": 128000,
            "rope_scaling": {"type": "yarn", "factor": 32, "original_max_position_embeddings": 4096},
        },
        Specification("yarn", {"factor": 32, "original_max_position_embeddings": 4096}),
    ),
    (
        {"max_position_embeddings": 131072, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096}},
        Specification("yarn", {"factor": 32.0, "original_max_position_embeddings": 4096}),
    ),
]


@pytest.mark.parametrize(("config", "expected"), SMALL)
def test_dialects(config: dict[str, Any], expected: Specification) -> None:
    before = repr(config)
    assert read(config) == expected
    assert repr(config) == before


def test_attn_factor_multiplies_the_temperature_as_its_authors_code_has_it() -> None:
    read_back = read({"rope_type": "yarn", "factor": 16, "attn_factor": 0.5})
    assert isinstance(read_back, Specification)
    assert read_back.options["attention_factor"] == pytest.approx(0.5 * 1.2772588722239782, rel=1e-12)


def test_layers_without_positions() -> None:
    assert read({"full_attention": None, "sliding_attention": {"rope_type": "default"}}) == {
        "full_attention": Specification("nope"),
        "sliding_attention": Specification("rope"),
    }


YARN = {"rope_type": "yarn", "factor": 4.0}
BAD: list[tuple[Any, type[PePatchError], str]] = [
    ({**YARN, "beta_fsat": 3}, OptionError, "beta_fsat.*beta_fast"),
    ({**YARN, "low_freq_factor": 3}, OptionError, "low_freq_factor"),
    ({"rope_type": "linear", "factor": 2, "beta_fast": 3}, OptionError, "Its keys are: factor, orig"),
    ({"rope_type": "linear", "type": "yarn", "factor": 2}, OptionError, "Contradiction.*linear.*yarn"),
    ({**YARN, "attention_factor": 1.0, "attn_factor": 2.0}, OptionError, "Contradiction.*attention_factor"),
    ({**YARN, "attn_factor": 2.0, "mscale": 1.0}, OptionError, "attn_factor"),
    ({**YARN, "extrapolation_factor": 2.0}, UnsupportedError, "extrapolation_factor"),
    ({**YARN, "theta": 1.0, "rope_theta": 2.0}, OptionError, "Contradiction.*theta"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, OptionError, "Contradiction"),
    ({"rope_theta": 1e4, "rotary_emb_base": 1e6, "model_type": "x"}, OptionError, "Contradiction"),
    ({"rotary_pct": 0.25, "partial_rotary_factor": 0.5}, OptionError, "Contradiction"),
    ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": YARN}, OptionError, "rope_scaling differ"),
    (
        {"max_position_embeddings": 32768, "rope_scaling": {**YARN, "original_max_position_embeddings": 4096}},
        OptionError,
        "is 8",
    ),
    ({**YARN, "max_position_embeddings": 32768, "original_max_position_embeddings": 4096}, OptionError, "is 8"),
    (
        {"original_max_position_embeddings": 2048, "rope_scaling": {**YARN, "original_max_position_embeddings": 4096}},
        OptionError,
        "4096",
    ),
    ({"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT[1:]}, OptionError, "3 entries.*4"),
    (
        {"rope_type": "longrope", "long_factor": LONG, "short_mscale": 1.0, "long_mscale": 1.2},
        UnsupportedError,
        "mscale",
    ),
    (
        {
            "rope_type": "longrope",
            "long_factor": LONG,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
            "attention_factor": 2.0,
        },
        OptionError,
        "mscale",
    ),
    ({"factor": 4.0}, OptionError, "rope_type"),
    ({"factor": 4.0, "max_position_embeddings": 4096, "rope_theta": 1e4}, OptionError, "rope_type"),
    ({"rope_type": "yran", "factor": 2}, UnknownNameError, "yran.*'yarn'"),
    ({"rope_type": "mrope", "mrope_section": [16, 24, 24]}, UnsupportedError, "mrope"),
    ({"type": "default", "mrope_section": [16, 24, 24]}, UnsupportedError, "mrope_section"),
    ({"rope_type": "pe_patch"}, UnsupportedError, "load_patched"),
    ({"rope_theta": 1e4, "rope_ratio": 50, "model_type": "chatglm"}, UnsupportedError, "rope_ratio"),
    ({"scheme": "yarn", "rope_type": "linear", "factor": 2}, OptionError, "Contradiction.*scheme"),
    ({"scheme": 3}, OptionError, "scheme"),
    ({"full_attention": YARN, "rope_theta": 1e4}, OptionError, "rope_theta.*layer type"),
    ({"model_type": "gpt2", "n_positions": 1024}, OptionError, "nothing of rotary"),
    ({}, OptionError, "not empty"),
    ("yarn", OptionError, "dict"),
]


@pytest.mark.parametrize(("config", "error", "says"), BAD)
def test_unknown_and_contradictory_keys_are_refused(config: Any, error: type[PePatchError], says: str) -> None:
    with pytest.raises(error, match=says):
        read(config)


def test_reading_a_config_needs_no_torch() -> None:
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('pe_patch'); package.__path__ = ['pe_patch']; sys.modules['pe_patch'] = package\n"
        "import pe_patch.schemes.config_formats\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
