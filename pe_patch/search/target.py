"""The attention shape of the searched model and its target length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.scheme import AttentionShape
from ..errors import AlreadyPatchedError, OptionError, UnsupportedError
from ..patching import targets
from ..patching.api import find_patch
from ..patching.inference import adapter_for
from ..schemes.registry import SCHEMES


@dataclass(frozen=True)
class Target:
    """An attention shape and the length that it must reach."""

    shape: AttentionShape
    length: int
    """The target length in tokens."""
    factor: float
    """s, the length over the trained window."""
    attention_factor: float
    """The factor on cos and sin."""

    @property
    def window(self) -> int:
        """The trained window in tokens."""
        return self.shape.trained_length

    def options(self, factors: Sequence[float]) -> dict[str, Any]:
        """Return the options of `longrope` with these long factors; short sequences are not rescaled."""
        return {
            "long_factor": list(factors),
            "short_factor": [1.0] * len(factors),
            "factor": self.factor,
            "attention_factor": self.attention_factor,
            "original_max_position_embeddings": self.window,
        }


def make_target(model: Any, length: int, attention_factor: float | None) -> Target:
    """Return the target of a search.

    Args:
        model: an unpatched rotary model.
        length: the target length in tokens.
        attention_factor: the factor on cos and sin; None takes LongRoPE's formula.

    Raises:
        AlreadyPatchedError: if the model is patched.
        UnsupportedError: if the model has no rotation, or several different ones.
        OptionError: if the length lies within the trained window, or the window is unknown.
    """
    shape = rotary_shape(model)
    factor = factor_for(length, shape.trained_length)
    longrope: Any = SCHEMES["longrope"]
    ones = [1.0] * (shape.rotary_dim // 2)
    scheme = longrope(shape, long_factor=ones, factor=factor, attention_factor=attention_factor)
    return Target(shape, length, factor, scheme.attention_scaling)


def rotary_shape(model: Any) -> AttentionShape:
    """Return the attention shape of a rotary model whose layers all use the same frequencies; raise otherwise."""
    patch = find_patch(model)
    if patch is not None:
        raise AlreadyPatchedError(
            f"This model is patched with {patch.scheme.name!r}. Call unpatch_model(model) first, or load the original."
        )
    base, adapter = adapter_for(targets.unwrap(model))
    if adapter.native != "rope" or adapter.rotary is None:
        raise UnsupportedError(
            f"{base.config.model_type} has {adapter.native!r} positions and no frequencies to rescale; search is for "
            "rotary models."
        )
    shapes = [adapter.shape(base, base.config, layer) for layer in adapter.attentions(base)]
    rotations = {(shape.rope_theta, shape.rotary_dim, shape.trained_length) for shape in shapes}
    if len(rotations) > 1:
        bases = ", ".join(f"{theta:g}" for theta, *_ in sorted(rotations))
        raise UnsupportedError(
            f"Layers of {base.config.model_type} use different frequencies (bases {bases}); one list of factors does "
            "not fit all of them."
        )
    if shapes[0].trained_length < 1:
        raise OptionError(
            "The model's config does not state the trained window. Set max_position_embeddings in the config."
        )
    return shapes[0]


def factor_for(length: int, window: int) -> float:
    """Return s, the length over the trained window, rounded up so that the scaled window holds the length.

    Raises:
        OptionError: if the window already holds the length.
    """
    if length <= window:
        raise OptionError(
            f"length={length} lies within the trained window of {window} tokens, which needs no rescaling. Give a "
            "greater length."
        )
    factor = length / window
    while int(factor * window) < length:  # rounding may make the scaled window one token too short
        factor = math.nextafter(factor, math.inf)
    return factor
