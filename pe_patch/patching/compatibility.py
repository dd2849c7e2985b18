"""Decide at which places of a model a scheme acts, and raise if the family or the options do not allow it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..adapters import Adapter
from ..core.scheme import Scheme, overrides
from ..errors import OptionError, UnsupportedError
from ..mla.protocol import ProjectionScheme, converts, replaces_projections
from ..schemes.grid import GridScheme
from ..schemes.registry import SCHEMES
from ..schemes.rope import Rotation
from .config import SchemeByLayerType


@dataclass
class Plan:
    """The places of a model at which a scheme acts."""

    rotates: bool
    """The scheme rotates queries and keys."""
    at_rotary_module: bool
    """It does so through the model's rotary module, before the cache."""
    at_scores: bool
    """Its `encode`, `bias` or `attend` runs in the attention function, on queries and on the keys of the cache."""
    embeds: bool
    """It adds to the input embeddings."""


def make_plan(adapter: Adapter, scheme: Scheme, keep_native: bool, chosen: list[int], count: int) -> Plan:
    """Return the places at which a scheme acts.

    Args:
        adapter: the description of the family.
        scheme: the scheme, built for the model.
        keep_native: add the scheme to the native positions.
        chosen: indices of the layers to patch.
        count: number of layers of the model.

    Raises:
        UnsupportedError: the family has no place for the scheme.
        OptionError: `keep_native` or `layers` does not apply to the scheme.
    """
    rotates = overrides(scheme, "angles") or isinstance(scheme, Rotation)
    at_rotary_module = adapter.rotary is not None and scheme.rotates_early
    acts = any(overrides(scheme, hook) for hook in ("encode", "bias", "attend"))
    at_scores = acts and (converts(scheme) or not at_rotary_module)
    embeds = overrides(scheme, "embed")
    _check_hooks(adapter, scheme, rotates, at_rotary_module or at_scores)
    if (at_scores or scheme.scorer is not None) and not adapter.carries:
        raise UnsupportedError(
            f"{scheme.name!r} needs the positions at the scores, and this family drops keywords on the way there. "
            "Use a static rotary scheme, an embedding or 'nope' instead."
        )
    if at_scores and rotates and adapter.late_norm:
        raise UnsupportedError(
            f"{scheme.name!r} rotates at the scores, and this family normalises queries and keys after rotating. "
            "Use a static rotary scheme instead."
        )
    if keep_native and rotates and adapter.rotary is not None:
        raise OptionError(f"keep_native=True would rotate twice: this family rotates, and so does {scheme.name!r}.")
    if keep_native and converts(scheme):
        raise OptionError(
            f"keep_native=True does not apply to {scheme.name!r}, which keeps the model's rotation anyway; leave it "
            "out."
        )
    if keep_native and scheme.mechanism == "none":
        raise OptionError(
            f"keep_native=True leaves {scheme.name!r} nothing to do, since it removes the native positions; leave it "
            "out."
        )
    if keep_native and adapter.learned and scheme.name == "learned":
        raise OptionError("keep_native=True would add two learned tables; leave it out.")
    if len(chosen) < count and adapter.tower is not None and not keep_native:
        raise OptionError(
            f"layers= would remove the learned table from all layers and give {scheme.name!r} to some of them: patch "
            "all layers, or give keep_native=True to keep the table."
        )
    if len(chosen) < count and (embeds or adapter.learned):
        raise OptionError(
            f"layers= does not apply to {scheme.name!r} here: the positions at the input embeddings reach all layers. "
            "Leave layers= out."
        )
    return Plan(rotates, at_rotary_module, at_scores, embeds)


def check_modality(adapter: Adapter, cls: type[Scheme], config: Any) -> None:
    """Raise `UnsupportedError` for a text scheme on a vision encoder, or a scheme for images on a text model."""
    for_images = issubclass(cls, GridScheme)
    if adapter.tower is not None and not for_images:
        able = ", ".join(name for name, known in SCHEMES.items() if issubclass(known, GridScheme))
        raise UnsupportedError(
            f"{cls.name!r} is for text, and {config.model_type} reads images: use one of {able}, or choose the text "
            "model with submodule=."
        )
    if adapter.tower is None and for_images:
        raise UnsupportedError(
            f"{cls.name!r} needs a grid of image patches, and {config.model_type} reads text: use 'rope' or 'alibi', "
            "or choose a vision encoder with submodule=."
        )


def _check_hooks(adapter: Adapter, scheme: Scheme, rotates: bool, acts: bool) -> None:
    """Raise `UnsupportedError` if a hook that the scheme overrides would never run."""
    if not isinstance(scheme, ProjectionScheme) and callable(getattr(type(scheme), "replace", None)):
        raise UnsupportedError(
            f"{scheme.name!r} overrides `replace`, which only a ProjectionScheme has: derive it from "
            "pe_patch.mla.protocol.ProjectionScheme."
        )
    if replaces_projections(scheme) and not overrides(scheme, "attend"):
        raise UnsupportedError(
            f"{scheme.name!r} overrides `replace` but not `attend`: a scheme that replaces the projections must "
            "override `attend`, which uses what they cache."
        )
    if rotates and not acts:
        raise UnsupportedError(
            f"{scheme.name!r} only overrides `angles`, but this family has no rotary module. Derive the scheme from "
            "pe_patch.schemes.rope.Rotary, which also rotates at the scores."
        )


def check_layer_types(schemes: SchemeByLayerType, plan: Plan, everywhere: bool) -> None:
    """Raise if one scheme would change layer types with different rotary bases and the user did not choose the layers.

    Args:
        schemes: the scheme of each layer type.
        plan: the places at which they act.
        everywhere: the user did not give `layers=`.

    Raises:
        UnsupportedError: the scheme rotates at the scores, where all layers share their angles.
        OptionError: the scheme would change every layer type.
    """
    rotations = {layer_type: scheme for layer_type, scheme in schemes.items() if isinstance(scheme, Rotation)}
    if len({scheme.base for scheme in rotations.values()}) < 2:
        return
    bases = " and ".join(
        f"its {layer_type} layers by the base {scheme.base:g}" for layer_type, scheme in rotations.items()
    )
    farthest = max(rotations, key=lambda layer_type: rotations[layer_type].base)
    remedy = f"layers=lambda i: model.config.layer_types[i] == {farthest!r}"
    name = rotations[farthest].name
    if plan.at_scores:
        raise UnsupportedError(
            f"This family rotates {bases}, and {name!r} rotates at the scores, where all layers share their angles: "
            f"choose one layer type, for example {remedy}."
        )
    native = all(
        torch.equal(scheme.inv_freq, scheme.plain_frequencies(scheme.shape.rope_theta))
        and scheme.attention_scaling == 1
        for scheme in rotations.values()
    )
    if everywhere and not native:
        raise OptionError(
            f"This family rotates {bases}, and {name!r} would change them all. Choose the layers with the largest "
            f"base, {remedy}, or list every layer in layers= to change each from its own base."
        )
