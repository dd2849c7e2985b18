"""Healthy configs, and faulty ones with a check that the fault is real and the config after the remedy."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from .families import COMMON, GROUPED, LANGUAGE_MODELS, SIZES

DROP = object()
ONES, RISING = [1.0] * 8, [1.0, 1.1, 1.2, 2.0, 3.0, 4.0, 4.0, 4.0]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"type": "longrope", "short_factor": ONES, "long_factor": RISING}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}


def settings(family: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a tiny model with a window of 256 tokens; `DROP` removes a key."""
    whole = COMMON | SIZES.get(family, GROUPED) | {"model_type": family, "max_position_embeddings": 256} | changes
    return {key: value for key, value in whole.items() if value is not DROP}


def llama(scaling: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return settings("llama", rope_theta=5e5, **({"rope_scaling": scaling} if scaling else {}), **changes)


def phi3(**changes: Any) -> dict[str, Any]:
    return settings("phi3", head_dim=DROP, original_max_position_embeddings=64, rope_scaling=LONGROPE | changes)


def gemma(full: dict[str, Any], **beside: Any) -> dict[str, Any]:
    return settings("gemma3_text", rope_parameters={"full_attention": full, "sliding_attention": SLIDING, **beside})


def deepseek(family: str, **mscale: float) -> dict[str, Any]:
    return settings(family, rope_theta=1e4, rope_scaling=YARN | mscale)


def pictures(text: dict[str, Any], **top: Any) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision | {"image_size": 28, "patch_size": 14},
    } | top


HEALTHY = {
    **{f"{family} unchanged": settings(family) for family in LANGUAGE_MODELS},
    "llama, v4": llama(),
    "llama, v5": settings("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama3": llama(LLAMA3 | {"original_max_position_embeddings": 64}, max_position_embeddings=1024),
    "linear": llama({"type": "linear", "factor": 4.0}),
    "dynamic": llama({"type": "dynamic", "factor": 4.0}),
    "yarn": llama(YARN),
    "yarn with a base inside": settings("llama", rope_parameters=YARN | {"rope_theta": 5e5}),
    "yarn, old name of the type": llama({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "longrope": phi3(),
    "gemma3, v4": settings(
        "gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0}
    ),
    "gemma3, v5": gemma({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}),
    "multimodal gemma3": pictures(gemma({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6})),
    "gpt_neox": settings("gpt_neox", rotary_pct=0.25, rotary_emb_base=2e4),
    "gpt_neox, yarn": settings("gpt_neox", rotary_pct=0.5, rotary_emb_base=2e4, rope_scaling=YARN),
    "bloom": settings("bloom", max_position_embeddings=DROP),
    "deepseek_v2": deepseek("deepseek_v2", mscale=0.707, mscale_all_dim=0.707),
    "deepseek_v3": deepseek("deepseek_v3", mscale=1.0, mscale_all_dim=1.0),
    "qwen3": settings("qwen3", rope_theta=1e6, rope_scaling=None),
    "gpt_oss": settings("gpt_oss", rope_parameters=DROP, rope_theta=15e4, rope_scaling=YARN | {"truncate": False}),
    "mistral with a sliding window": settings("mistral", sliding_window=64),
}  # fmt: skip


def made(config: dict[str, Any]) -> Any:
    """Build the Transformers model of a config.json, from a copy because Transformers changes the dicts."""
    read = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(read).eval()


def native(config: dict[str, Any]) -> tuple[list[float], float]:
    """Return the frequencies and the factor on cos and sin of the rotary module that Transformers builds."""
    rotary = made(config).model.rotary_emb
    kind = "full_attention_" if hasattr(rotary, "full_attention_inv_freq") else ""
    return getattr(rotary, f"{kind}inv_freq").tolist(), getattr(rotary, f"{kind}attention_scaling")


def plain(base: float, width: int = 16) -> list[float]:
    return [base ** (-2 * k / width) for k in range(width // 2)]


def same(given: tuple[list[float], float], other: tuple[list[float], float]) -> bool:
    return given[0] == pytest.approx(other[0], rel=1e-5) and given[1] == pytest.approx(other[1], rel=1e-5)


def unscaled(base: float) -> Any:
    return lambda config: same(native(config), (plain(base), 1.0))


def as_if(other: dict[str, Any]) -> Any:
    """Return a check that Transformers builds the same rotation from another config."""
    return lambda config: same(native(config), native(other))


def refused(exception: str) -> Any:
    def check(config: dict[str, Any]) -> bool:
        with pytest.raises((KeyError, StrictDataclassError)) as caught:
            native(config)
        return exception in type(caught.value).__name__

    return check


def factor(expected: float) -> Any:
    return lambda config: math.isclose(native(config)[1], expected)


@dataclass
class Fault:
    config: dict[str, Any]
    real: Any
    """Returns whether Transformers shows the fault."""
    codes: set[str]
    says: str
    """A part of the first finding's `in_effect`."""
    cured: dict[str, Any]
    """The config after the remedy."""
    severity: str = "error"
    remedy: str = ""


GEMMA_LINEAR = gemma({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6})
FAULTS = {
    # 1: scaling ignored
    "another tool's factor": Fault(
        llama(YARN | {"attn_factor": 2.0}), factor(0.1 * math.log(4) + 1), {"attention_factor", "unread_key"}, "1.1386",
        settings("llama", rope_theta=5e5, rope_scaling=YARN | {"attention_factor": 0.1 * math.log(4) + 1}),
        remedy=str(2 * (0.1 * math.log(4) + 1))[:8],
    ),
    "scaling under another key": Fault(
        llama(rope_scalling=YARN), unscaled(5e5), {"unknown_key"}, "does not read", llama(YARN), remedy="'rope_scaling'"
    ),
    "scaling under a custom key": Fault(
        llama(positions=YARN), unscaled(5e5), {"unknown_key"}, "does not read",
        settings("llama", rope_theta=5e5, rope_parameters=YARN), remedy="'rope_parameters'",
    ),
    "nested in a family without layer types": Fault(
        settings("llama", rope_parameters={"full_attention": YARN | {"rope_theta": 5e5}}), unscaled(1e4),
        {"scaling_ignored", "theta_lost"}, "plain RoPE with base 10000", llama(YARN), remedy='"rope_theta": 500000',
    ),
    "flat in a family with layer types": Fault(
        settings("gemma3_text", rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}),
        unscaled(1e6), {"scaling_ignored"}, "plain RoPE with base 1000000", GEMMA_LINEAR, remedy='"full_attention": {',
    ),
    "beside layer types": Fault(
        gemma({"rope_type": "default", "rope_theta": 1e6}, rope_type="linear", factor=8.0), unscaled(1e6),
        {"scaling_ignored"}, "not read", GEMMA_LINEAR, remedy="Move the key",
    ),
    "truncate inside a layer type": Fault(
        gemma(YARN | {"rope_theta": 1e6, "truncate": False}), as_if(gemma(YARN | {"rope_theta": 1e6})),
        {"scaling_ignored"}, "pair 1", gemma(YARN | {"rope_theta": 1e6}, truncate=False),
        remedy='}, "truncate": false}',
    ),
    "without a type": Fault(
        llama({"factor": 4.0}), unscaled(5e5), {"scaling_ignored"}, "plain RoPE",
        llama({"rope_type": "linear", "factor": 4.0}), remedy='"rope_type"',
    ),
    "two types": Fault(
        llama({"rope_type": "default", "type": "yarn", "factor": 4.0}), unscaled(5e5), {"contradiction"},
        "'rope_type' wins", llama(YARN), remedy="Keep the value",
    ),
    "dynamic with a separate window": Fault(
        llama({"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}),
        as_if(llama({"type": "dynamic", "factor": 4.0})), {"scaling_ignored"}, "beyond 256 tokens",
        llama({"type": "dynamic", "factor": 4.0}, max_position_embeddings=64), remedy='"max_position_embeddings": 64',
    ),
    # 2: the base lost; 6: both dialects
    "two bases": Fault(
        settings("llama", rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 1e4}), unscaled(1e4),
        {"theta_lost"}, "base 10000", settings("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    ),
    "v4 scaling and v5 parameters": Fault(
        settings("llama", rope_scaling=YARN, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        as_if(settings("llama", rope_theta=1e4, rope_scaling=YARN)), {"two_dialects", "theta_lost"},
        "rope_scaling: Transformers takes it whole", settings("llama", rope_parameters=YARN | {"rope_theta": 5e5}),
        remedy="Remove rope_scaling",
    ),
    # 3: factor and windows
    "factor above the windows' ratio": Fault(
        llama(YARN | {"factor": 8.0}), as_if(llama(YARN | {"factor": 8.0}, max_position_embeddings=512)),
        {"factor_mismatch"}, "512 tokens", llama(YARN | {"factor": 8.0}, max_position_embeddings=512),
        remedy='"max_position_embeddings": 512',
    ),
    "factor below the windows' ratio": Fault(
        llama(YARN | {"factor": 2.0}), as_if(llama(YARN | {"factor": 2.0}, max_position_embeddings=128)),
        {"factor_mismatch"}, "128 tokens", llama(YARN), remedy='"factor": 4',
    ),
    # 4: the trained window
    "yarn without a window": Fault(
        llama({"rope_type": "yarn", "factor": 4.0}), as_if(llama(YARN | {"original_max_position_embeddings": 256})),
        {"window_missing"}, "takes 256", llama(YARN), remedy='"original_max_position_embeddings": 64',
    ),
    "llama3 without a window": Fault(
        llama(LLAMA3), as_if(llama(LLAMA3 | {"original_max_position_embeddings": 256})), {"window_missing"},
        "takes 256", llama(LLAMA3 | {"original_max_position_embeddings": 32}), remedy='_embeddings": 32',
    ),
    "longrope without a window": Fault(
        {key: value for key, value in phi3().items() if key != "original_max_position_embeddings"},
        as_if(phi3() | {"original_max_position_embeddings": 4096}), {"window_missing"}, "takes 4096", phi3(),
        remedy='"original_max_position_embeddings"',
    ),
    "trained longer than extended": Fault(
        llama(YARN | {"original_max_position_embeddings": 1024}),
        as_if(llama(YARN | {"original_max_position_embeddings": 1024}, max_position_embeddings=4096)),
        {"window_reversed"}, "1024 trained tokens",
        llama(YARN | {"original_max_position_embeddings": 256}, max_position_embeddings=1024),
        remedy='"original_max_position_embeddings": 256, "max_position_embeddings": 1024',
    ),
    # 5: keys
    "a misspelt key": Fault(
        llama(YARN | {"beta_fst": 8}), as_if(llama(YARN)), {"unknown_key"}, "beta_fast is 32, the default",
        llama(YARN | {"beta_fast": 8}), remedy='"beta_fast": 8',
    ),
    "a key of another scheme": Fault(
        llama({"rope_type": "linear", "factor": 4.0, "beta_fast": 8}),
        as_if(llama({"rope_type": "linear", "factor": 4.0})),
        {"unknown_key"}, "does not read", llama({"rope_type": "linear", "factor": 4.0}), remedy="Remove 'beta_fast'",
    ),
    # 7: types
    "a misspelt type": Fault(
        llama(YARN | {"rope_type": "yran"}), refused("KeyError"), {"unknown_type"}, "KeyError", llama(YARN),
        remedy="yarn",
    ),
    "a type of earlier versions": Fault(
        phi3(type="su"), refused("KeyError"), {"does_not_load"}, "KeyError", phi3(), remedy='"rope_type": "longrope"'
    ),
    "no factor": Fault(
        llama({"type": "yarn", "original_max_position_embeddings": 64}), refused("KeyError"), {"does_not_load"},
        "'factor'", llama(YARN), remedy="Correct",
    ),
    "a patch without its record": Fault(
        settings("llama", rope_parameters={"rope_type": "pe_patch", "rope_theta": 5e5}), refused("KeyError"),
        {"does_not_load"}, "KeyError", llama(), remedy="Restore config.pe_patch",
    ),
    # 9: temperatures and lists
    "mscale alone": Fault(
        llama(YARN | {"mscale": 0.5}), factor(0.1 * math.log(4) + 1), {"attention_factor"}, "times 1.1386",
        llama(YARN | {"mscale": 0.5, "attention_factor": 0.05 * math.log(4) + 1}), "warning",
        '"attention_factor": 1.0693',
    ),
    "mscale_all_dim alone": Fault(
        deepseek("deepseek_v3", mscale_all_dim=1.0), factor(0.1 * math.log(4) + 1), {"attention_factor"},
        "times 1.1386", deepseek("deepseek_v3", mscale=1.0, mscale_all_dim=1.0), "warning", "or give both",
    ),
    "an unusual attention factor": Fault(
        llama(YARN | {"attention_factor": 2.0}), factor(2.0), {"attention_factor"}, "1.1386", llama(YARN), "warning",
        "1.138629",
    ),
    "lists of another head": Fault(
        phi3(short_factor=ONES[:7], long_factor=RISING[:7]), refused("ValidationError"), {"list_faulty"}, "8 pairs",
        phi3(), remedy="Give 8 numbers",
    ),
    "entries below one": Fault(
        phi3(short_factor=[0.5, *ONES[1:]]), lambda config: native(config)[0][0] == 2.0, {"list_faulty"},
        "turns faster", phi3(), "warning", "1 or more",
    ),
    "a decreasing list": Fault(
        phi3(long_factor=[4.0, *ONES[1:]]), as_if(phi3()), {"list_faulty"}, "stretched less", phi3(), "warning",
        "published",
    ),
    # 10: lengths
    "a window with a decimal point": Fault(
        llama(max_position_embeddings=256.0), refused("ValidationError"), {"window_not_whole"}, "decimal point",
        llama(), remedy='"max_position_embeddings": 256.',
    ),
}  # fmt: skip
