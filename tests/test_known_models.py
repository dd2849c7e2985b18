"""What is said about the best-known models of 2026, by the positional values of their config.json, written by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from transformers import PreTrainedConfig

from pe_patch import describe, patch_model
from pe_patch.advice import advise
from pe_patch.doctor.examination import diagnose

from .model_types.tiny import tiny, tiny_config


@dataclass(frozen=True)
class Known:
    """A model, and what an expert would say about it."""

    family: str
    maximum: int
    """`max_position_embeddings`."""
    theta: float
    scaling: dict[str, Any] = field(default_factory=dict)
    """The scaling of its rotary parameters; by layer type, for a family with several."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other values of the config."""
    window: int = 0
    """The length that the model reads, in tokens, if that is not `maximum`."""
    original: int = 0
    """The length before the scaling, if it has one."""
    layers: tuple[int, ...] = ()
    """The layers to scale, if not all, of the four of the tiny model."""

    def config(self) -> PreTrainedConfig:
        """The config of a tiny model with these values."""
        rope = {"rope_type": "default", "rope_theta": self.theta, **self.scaling}
        given = {} if "rope_parameters" in self.settings else {"rope_parameters": rope}
        return tiny_config(self.family, max_position_embeddings=self.maximum, **given, **self.settings)


def yarn(factor: float, original: int, **others: Any) -> dict[str, Any]:
    """A YaRN scaling as configs write it."""
    return {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": 32.0,
        "beta_slow": 1.0, **others,
    }  # fmt: skip


MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
MODELS = {
    "Llama 3.3 70B": Known(
        "llama", 131072, 5e5,
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        original=8192,
    ),
    "Llama 4 Scout": Known(
        "llama4_text", 10485760, 5e5,
        {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
         "original_max_position_embeddings": 8192},
        {"no_rope_layers": [1, 1, 1, 0]}, original=8192,
    ),
    "Qwen3 8B": Known("qwen3", 40960, 1e6, window=32768),
    "Qwen3 30B-A3B": Known("qwen3_moe", 40960, 1e6, window=32768),
    "Qwen3-Next 80B-A3B": Known("qwen3_next", 262144, 1e7, {"partial_rotary_factor": 0.25}),
    "Qwen2.5 7B Instruct": Known("qwen2", 32768, 1e6),
    "Gemma 3 27B": Known(
        "gemma3_text", 131072, 1e6, settings={
            "sliding_window": 1024, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": LOCAL,
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        }, original=16384, layers=(3,),
    ),
    "Gemma 3n E4B": Known(
        "gemma3n_text", 32768, 1e6, settings={
            "rope_parameters": {
                "sliding_attention": LOCAL, "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        }, layers=(1, 4),
    ),
    "gpt-oss 20B": Known("gpt_oss", 131072, 150000.0, yarn(32.0, 4096, truncate=False), original=4096),
    "DeepSeek-V3.2": Known("deepseek_v32", 163840, 10000.0, yarn(40.0, 4096, **MSCALE), original=4096),
    "GLM-4.6": Known("glm4_moe", 202752, 1e6, {"partial_rotary_factor": 0.5}),
    "Kimi K2 0905": Known(
        "deepseek_v3", 262144, 50000.0, yarn(64.0, 4096, **MSCALE) | {"beta_fast": 1.0}, original=4096
    ),
    "MiniMax-M2": Known("minimax_m2", 196608, 5e6, {"partial_rotary_factor": 0.5}),
    "Ministral 3 8B": Known(
        "ministral3", 262144, 1e6, yarn(16.0, 16384, **MSCALE, llama_4_scaling_beta=0.1), original=16384
    ),
    "SmolLM3 3B": Known("smollm3", 65536, 5e6, settings={"no_rope_layers": [1, 1, 1, 0]}),
    "OLMo 3 7B": Known(
        "olmo3", 65536, 5e5, settings={
            "sliding_window": 4096, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                "full_attention": {"rope_theta": 5e5, **yarn(8.0, 8192, attention_factor=1.2079441541679836)},
            },
        }, original=8192, layers=(3,),
    ),
    "LFM2 1.2B": Known("lfm2", 128000, 1e6),
    "Falcon-H1 7B": Known("falcon_h1", 262144, 1e11),
    "ERNIE 4.5 0.3B": Known("ernie4_5", 131072, 5e5),
    "Seed-OSS 36B": Known("seed_oss", 524288, 1e7),
    "Mistral Small 3.2 24B": Known("mistral", 131072, 1e9, settings={"sliding_window": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_advice_knows_the_windows(name):
    known = MODELS[name]
    window = known.window or known.maximum
    facts = advise(known.config(), 2 * window).case.facts
    assert (facts.window, facts.original) == (window, known.original or window)
    assert facts.layers == known.layers


SAID = {"Llama 4 Scout": "beyond", "DeepSeek-V3.2": "indexer"}
"""Models for which nothing works without training, and why."""


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SAID])
def test_advice_extends_from_the_window_that_the_authors_state(name):
    known = MODELS[name]
    window = known.window or known.maximum
    choice = advise(known.config(), 2 * window).choice
    assert choice.untrained is not None and choice.trained is not None
    assert choice.trained.scheme == "yarn"
    options = choice.trained.options
    assert options.get("layers", []) == list(known.layers)
    composed = options.get("on_existing") == "compose"
    start = options.get("original_max_position_embeddings", known.original or window)
    assert options["factor"] * (window if composed else start) == pytest.approx(2 * window)


@pytest.mark.parametrize("name", MODELS)
def test_the_doctor_finds_nothing_wrong(name, tmp_path):
    """A config as its authors wrote it, and as Transformers writes it again."""
    MODELS[name].config().save_pretrained(tmp_path)
    assert diagnose(tmp_path).findings == []


@pytest.mark.parametrize("name", ["Qwen3 8B", "OLMo 3 7B", "GLM-4.6", "Ministral 3 8B"])
def test_a_patch_starts_from_the_same_window(name):
    known = MODELS[name]
    rope = known.config().rope_parameters
    model = tiny(known.family, max_position_embeddings=known.maximum, rope_parameters=rope, **{
        key: value for key, value in known.settings.items() if key != "rope_parameters"
    })  # fmt: skip
    chosen = {"layers": list(known.layers)} if known.layers else {}
    patch_model(model, "yarn", factor=2.0, on_existing="replace", **chosen)
    start = known.original or known.window or known.maximum
    assert describe(model).effective["effective_window"] == 2 * start
