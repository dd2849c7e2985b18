"""The model that factors are searched for: what its attention is like, and how far it is to reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.scheme import AttentionShape
from ..errors import AlreadyPatchedError, OptionError, UnsupportedError
from ..patching import targets
from ..patching.api import find_patch
from ..schemes.registry import SCHEMES


@dataclass(frozen=True)
class Target:
    """How far a model with such an attention is to reach: `factor` s is the length over the trained window."""

    shape: AttentionShape
    length: int
    factor: float
    attention_factor: float

    @property
    def window(self) -> int:
        return self.shape.trained_length

    def options(self, factors: Sequence[float]) -> dict[str, Any]:
        """What `patch_model(model, "longrope", **options)` takes; within the trained window nothing is rescaled."""
        return {
            "long_factor": list(factors),
            "short_factor": [1.0] * len(factors),
            "factor": self.factor,
            "attention_factor": self.attention_factor,
            "original_max_position_embeddings": self.window,
        }


def make_target(model: Any, length: int, attention_factor: float | None) -> Target:
    """What a search aims at; a model or a length that it is not for raises."""
    shape = rotary_shape(model)
    factor = factor_for(length, shape.trained_length)
    scheme: Any = SCHEMES["longrope"]
    ones = [1.0] * (shape.rotary_dim // 2)
    made = scheme(shape, long_factor=ones, factor=factor, attention_factor=attention_factor)
    return Target(shape, length, factor, made.attention_scaling)


def rotary_shape(model: Any) -> AttentionShape:
    """The attention of a rotary model all of whose layers turn by the same frequencies; anything else raises."""
    patch = find_patch(model)
    if patch is not None:
        raise AlreadyPatchedError(
            f"This model is patched with {patch.scheme.name!r}: unpatch_model(model) first, or load the original."
        )
    _, base = targets.find_stack(targets.unwrap(model), None)
    adapter = targets.find_adapter(base, None)
    if adapter.native != "rope" or adapter.rotary is None:
        raise UnsupportedError(
            f"{base.config.model_type} has {adapter.native!r} positions and no rotation whose frequencies could be "
            "rescaled; a search is for rotary models."
        )
    count = len(adapter.attentions(base))
    shapes = [adapter.shape(base, base.config, layer) for layer in range(count)]
    rotations = {(shape.rope_theta, shape.rotary_dim, shape.trained_length) for shape in shapes}
    if len(rotations) > 1:
        told = ", ".join(f"{theta:g}" for theta, *_ in sorted(rotations))
        raise UnsupportedError(
            f"Layers of {base.config.model_type} turn by different frequencies (bases {told}); one list of factors "
            "does not fit them all."
        )
    if shapes[0].trained_length < 1:
        raise OptionError("The model's config does not say which window it was trained for (max_position_embeddings).")
    return shapes[0]


def factor_for(length: int, window: int) -> float:
    """s, the length over the trained window; an `OptionError` where the window holds the length."""
    if length <= window:
        raise OptionError(
            f"length={length} lies within the trained window of {window} tokens, where nothing needs rescaling: "
            "give the length that it is to reach."
        )
    factor = length / window
    while int(factor * window) < length:  # else the effective window would fall short by a token
        factor = math.nextafter(factor, math.inf)
    return factor
