"""List the windows that authors state for their models if the config states another one, or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AuthorsWord:
    """Facts that a model's authors state besides its config."""

    said: str
    """A sentence with the value in the config and the value that the authors state."""
    source: str
    """A short form of the sentence, for a table or a log line."""
    trained_length: int | None = None
    """The window before any scaling, in tokens; None if it can be computed from the config."""
    maximum_is_scaled: bool = False
    """`max_position_embeddings` is the window after the scaling, so that it includes the factor."""
    recommended: str | None = None
    """Name of the scheme that the authors recommend without training; None if they recommend none."""
    recommended_length: int = 0
    """The length in tokens up to which they recommend it."""


Maximum = int | None
"""The `max_position_embeddings` that the model was built with."""
Parameters = dict[str, Any]
"""The rotary parameters of the layers in question."""


def _unscaled(parameters: Parameters) -> bool:
    return parameters.get("rope_type", "default") in ("default", None)


def _theta(parameters: Parameters) -> float:
    return float(parameters.get("rope_theta") or 0)


def _is_mistral_1(config: Any, maximum: Maximum, parameters: Parameters) -> bool:
    # The sliding window of 4096 may have been lifted. Versions 0.2 and 0.3 have a base of 1e6.
    return (
        config.model_type == "mistral"
        and maximum == 32768
        and _theta(parameters) == 1e4
        and (_unscaled(parameters) or parameters.get("original_max_position_embeddings") in (None, 8192))
    )


def _is_qwen3(config: Any, maximum: Maximum, parameters: Parameters) -> bool:
    return config.model_type in ("qwen3", "qwen3_moe") and maximum == 40960 and _unscaled(parameters)


def _is_qwen25(config: Any, maximum: Maximum, parameters: Parameters) -> bool:
    return config.model_type == "qwen2" and maximum == 32768 and _theta(parameters) == 1e6 and _unscaled(parameters)


def _is_bloom(config: Any, maximum: Maximum, parameters: Parameters) -> bool:
    # The released models, BLOOM and BLOOMZ, share one vocabulary; another vocabulary means another model.
    return config.model_type == "bloom" and config.vocab_size == 250880 and maximum is None


def _is_gemma3(config: Any, maximum: Maximum, parameters: Parameters) -> bool:
    return config.model_type == "gemma3_text" and parameters.get("rope_type") == "linear"


KNOWN: tuple[tuple[Callable[[Any, Maximum, Parameters], bool], AuthorsWord], ...] = (
    (
        _is_mistral_1,
        AuthorsWord(
            "The config allows 32,768 tokens; Transformers' page of the model says it was trained on 8,192, and YaRN's "
            "authors extend it from there (arXiv 2309.00071).",
            "Transformers' page of Mistral 7B v0.1; its config says 32,768",
            trained_length=8192,
        ),
    ),
    (
        _is_qwen3,
        AuthorsWord(
            "The config allows 40,960 tokens: the 32,768 that the model was trained on and 8,192 more for a prompt. "
            "Its authors' model card counts from 32,768 and recommends YaRN of factor 4 for 131,072.",
            "the model card of Qwen3; its config says 40,960, which adds 8,192 for a prompt",
            trained_length=32768,
            recommended="yarn",
            recommended_length=131072,
        ),
    ),
    (
        _is_qwen25,
        AuthorsWord(
            "Its authors' model card recommends YaRN of factor 4 over 32,768 tokens for 131,072.",
            "the model card of Qwen2.5, and its config",
            trained_length=32768,
            recommended="yarn",
            recommended_length=131072,
        ),
    ),
    (
        _is_bloom,
        AuthorsWord(
            "The config names no window; the model was trained on 2,048 tokens (arXiv 2211.05100).",
            "BLOOM's paper, arXiv 2211.05100; its config names none",
            trained_length=2048,
        ),
    ),
    (
        _is_gemma3,
        AuthorsWord(
            "Its authors trained it on 32,768 tokens and rescaled its far-reaching layers to the window that the "
            "config names (Gemma Team 2025, arXiv 2503.19786), which therefore counts the factor.",
            "Gemma 3's report, arXiv 2503.19786",
            maximum_is_scaled=True,
        ),
    ),
)


def authors_word(config: Any, maximum: Maximum, parameters: Parameters) -> AuthorsWord | None:
    """Return the facts that the authors state about this model, or None if they state nothing beyond its config.

    Args:
        config: the config of the language model.
        maximum: the `max_position_embeddings` that the model was built with; None if it has none.
        parameters: the rotary parameters of the layers in question.
    """
    return next((word for fits, word in KNOWN if fits(config, maximum, parameters)), None)
