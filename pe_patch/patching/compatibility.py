"""Where a scheme acts in a family, or why it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..adapters import Adapter
from ..core.scheme import Scheme, overrides
from ..errors import OptionError, UnsupportedError
from ..mla.protocol import converts, replaces_projections
from ..schemes.grid import GridScheme
from ..schemes.registry import SCHEMES
from ..schemes.rope import Rotation
from .config import Kinds


@dataclass
class Plan:
    """Where a scheme acts in this family."""

    turns: bool
    at_joint: bool
    at_scores: bool
    embeds: bool


def make_plan(adapter: Adapter, scheme: Scheme, keep_native: bool, chosen: list[int], count: int) -> Plan:
    turns = overrides(scheme, "angles") or isinstance(scheme, Rotation)
    at_joint = adapter.rotary is not None and scheme.rotates_early
    acts = any(overrides(scheme, rung) for rung in ("encode", "bias", "attend"))
    at_scores = acts and (converts(scheme) or not at_joint)
    embeds = overrides(scheme, "embed")
    _check_rungs(adapter, scheme, turns, at_joint or at_scores)
    if (at_scores or scheme.scorer is not None) and not adapter.carries:
        raise UnsupportedError(
            f"{scheme.name!r} needs the positions at the scores, and this family drops keywords on the way there. "
            "Static rotary schemes, embeddings and 'nope' work on it."
        )
    if at_scores and turns and adapter.late_norm:
        raise UnsupportedError(
            f"{scheme.name!r} rotates at the scores, and this family normalises queries and keys after rotating. "
            "Static rotary schemes work on it."
        )
    if keep_native and turns and adapter.rotary is not None:
        raise OptionError(
            f"keep_native=True would rotate twice: this family rotates already, and so does {scheme.name!r}."
        )
    if keep_native and converts(scheme):
        raise OptionError(f"keep_native=True has no meaning for {scheme.name!r}, which keeps the model's own rotation.")
    if keep_native and scheme.mechanism == "none":
        raise OptionError(f"keep_native=True leaves {scheme.name!r} nothing to do: it takes the native positions away.")
    if keep_native and adapter.learned and scheme.name == "learned":
        raise OptionError("keep_native=True would add two learned tables; leave it out.")
    if len(chosen) < count and adapter.tower is not None and not keep_native:
        raise OptionError(
            f"layers= takes the learned table away from all layers and gives {scheme.name!r} to some: give "
            "keep_native=True, which leaves the table, or all layers."
        )
    if len(chosen) < count and (embeds or adapter.learned):
        raise OptionError(
            f"layers= has no meaning for {scheme.name!r} here: what is added to the input embeddings reaches them all."
        )
    return Plan(turns, at_joint, at_scores, embeds)


def check_tower(adapter: Adapter, cls: type[Scheme], config: Any) -> None:
    """Raise where a scheme for text meets a tower that reads images, or the other way round."""
    flat = issubclass(cls, GridScheme)
    if adapter.tower is not None and not flat:
        able = ", ".join(name for name, known in SCHEMES.items() if issubclass(known, GridScheme))
        raise UnsupportedError(
            f"{cls.name!r} is for text, and {config.model_type} reads images: use one of {able}, or choose the text "
            "tower with submodule=."
        )
    if adapter.tower is None and flat:
        raise UnsupportedError(
            f"{cls.name!r} goes by a grid of image patches, and {config.model_type} reads text: use 'rope' or 'alibi', "
            "or choose a vision tower with submodule=."
        )


def _check_rungs(adapter: Adapter, scheme: Scheme, turns: bool, acts: bool) -> None:
    """Raise where a rung that the scheme overrides would never be called."""
    if replaces_projections(scheme) and not overrides(scheme, "attend"):
        raise UnsupportedError(
            f"{scheme.name!r} replaces the projections and does not say in 'attend' what becomes of what they cache."
        )
    if turns and not acts:
        raise UnsupportedError(
            f"{scheme.name!r} says its rotation in 'angles' alone, and this family has no place for that before the "
            "cache. Derive it from pe_patch.schemes.rope.Rotary, which also rotates at the scores."
        )


def check_kinds(kinds: Kinds, plan: Plan, everywhere: bool) -> None:
    """Raise where layer types that rotate by different bases would be changed together and nobody asked for it."""
    rotations = {kind: scheme for kind, scheme in kinds.items() if isinstance(scheme, Rotation)}
    if len({scheme.base for scheme in rotations.values()}) < 2:
        return
    told = " and ".join(f"its {kind} layers by the base {scheme.base:g}" for kind, scheme in rotations.items())
    farthest = max(rotations, key=lambda kind: rotations[kind].base)
    remedy = f"layers=lambda i: model.config.layer_types[i] == {farthest!r}"
    name = rotations[farthest].name
    if plan.at_scores:
        raise UnsupportedError(
            f"This family turns {told}, and {name!r} rotates at the scores, where all layers share their angles: give "
            f"one layer type, for example {remedy}."
        )
    native = all(
        torch.equal(scheme.inv_freq, scheme.plain_frequencies(scheme.shape.rope_theta))
        and scheme.attention_scaling == 1
        for scheme in rotations.values()
    )
    if everywhere and not native:
        raise OptionError(
            f"This family turns {told}, and {name!r} would change them all. Choose those that look far, {remedy}, or "
            "name every layer to have each changed from its own base."
        )
