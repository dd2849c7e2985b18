"""What the authors of a model say of its window where its config says something else, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AuthorsWord:
    """What is known of a model besides its config."""

    trained_length: int
    """The window it was trained for, in tokens."""
    said: str
    """A sentence: what the config says, and who says otherwise."""
    recommended: str | None = None
    """The scheme that its authors recommend without training."""
    recommended_length: int = 0
    """The length up to which they do."""


def _unscaled(config: Any) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_type", "default") == "default"


def _theta(config: Any) -> float:
    return float((getattr(config, "rope_parameters", None) or {}).get("rope_theta") or 0)


def _is_mistral_1(config: Any) -> bool:
    # the window of 4096 may have been lifted; versions 0.2 and 0.3 turn by a base of 1e6
    return config.model_type == "mistral" and config.max_position_embeddings == 32768 and _theta(config) == 1e4


def _is_qwen3(config: Any) -> bool:
    return config.model_type in ("qwen3", "qwen3_moe") and config.max_position_embeddings == 40960 and _unscaled(config)


def _is_qwen25(config: Any) -> bool:
    window = getattr(config, "max_position_embeddings", None)
    return config.model_type == "qwen2" and window == 32768 and _theta(config) == 1e6 and _unscaled(config)


def _is_bloom(config: Any) -> bool:
    return config.model_type == "bloom" and not getattr(config, "seq_length", None)


KNOWN: tuple[tuple[Callable[[Any], bool], AuthorsWord], ...] = (
    (
        _is_mistral_1,
        AuthorsWord(
            8192,
            "The config allows 32,768 tokens; Transformers' page of the model says it was trained on 8,192, and YaRN's "
            "authors extend it from there (arXiv 2309.00071).",
        ),
    ),
    (
        _is_qwen3,
        AuthorsWord(
            32768,
            "The config allows 40,960 tokens: the 32,768 that the model was trained on and 8,192 more for a prompt. "
            "Its authors' model card counts from 32,768 and recommends YaRN of factor 4 for 131,072.",
            recommended="yarn",
            recommended_length=131072,
        ),
    ),
    (
        _is_qwen25,
        AuthorsWord(
            32768,
            "Its authors' model card recommends YaRN of factor 4 over 32,768 tokens for 131,072.",
            recommended="yarn",
            recommended_length=131072,
        ),
    ),
    (
        _is_bloom,
        AuthorsWord(2048, "The config names no window; the model was trained on 2,048 tokens (arXiv 2211.05100)."),
    ),
)


def authors_word(config: Any) -> AuthorsWord | None:
    """The entry of this model, or None: its config is all that is known."""
    return next((word for fits, word in KNOWN if fits(config)), None)
