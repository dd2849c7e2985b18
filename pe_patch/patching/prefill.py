"""Check that a model may read a text in parts."""

from __future__ import annotations

from typing import Any

from ..core.checks import check_length
from ..errors import OptionError
from .api import find_patch

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary types of Transformers whose frequencies depend on the length of a forward pass."""


def follows_length(model: Any) -> bool:
    """Return whether the encoding of a text depends on the length of the pass that reads it."""
    patch = find_patch(model)
    if patch is not None:
        return patch.scheme.length_dependent
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return any(rope.get("rope_type") in LENGTH_DEPENDENT_ROPE for rope in by_layer_type)


def check_prefill_chunk(model: Any, chunk: int | None) -> None:
    """Check the number of tokens that one pass over a text reads.

    Raises:
        OptionError: it is not a whole number above zero, or the model would encode the text differently in parts.
    """
    check_length("prefill", "prefill_chunk", chunk)
    if chunk is None or not follows_length(model):
        return
    patch = find_patch(model)
    name = "this model's rotary scaling" if patch is None else repr(patch.scheme.name)
    remedy = (
        "Leave it out" if patch is None else "Give the scheme a fixed factor or an expected_length, or leave it out"
    )
    raise OptionError(
        f"prefill_chunk={chunk} reads a text in parts, and {name} encodes a text by the length of its first pass, so "
        f"the logits would change. {remedy}."
    )
