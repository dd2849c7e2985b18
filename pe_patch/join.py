"""What changes when a scheme meets a model: the only file that knows both sides."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import resolve
from .adapters import Adapter
from .adapters.adapter import NoTable, TypedJoint
from .adapters.vision import no_table
from .attention import Backend, backend_for, check_backend
from .configuration import Kinds, config_swaps, record_of, save_swaps
from .errors import OptionError, UnsupportedError
from .forward import (
    Runtime,
    base_forward,
    hand_over_positions,
    layer_rotation,
    read_prompt_first,
    refuse_paging,
    set_attn_implementation,
    tower_forward,
)
from .rotation import Rotation
from .scheme import AttentionShape, Scheme, Stacked, overrides
from .schemes import SCHEMES
from .schemes.find import find_scheme
from .schemes.grid import GridScheme
from .swaps import Chain, Swap, apply_all, bind, undo_all

LayerSchemes = list[Scheme | Stacked | None]
"""What acts on the scores of each layer."""


@dataclass
class Patch:
    """What one call of `patch_model` did to one model; lives on the base model."""

    head: PreTrainedModel
    base: PreTrainedModel
    path: str
    adapter: Adapter
    shape: AttentionShape
    own: dict[int, Scheme]
    """The scheme of each chosen layer."""
    kinds: Kinds
    keep_native: bool
    arguments: dict[str, Any]
    swaps: list[Swap]
    frozen: list[nn.Parameter]
    """Native parameters that a scheme has put out of use."""

    @property
    def layers(self) -> list[int]:
        return list(self.own)

    @property
    def scheme(self) -> Scheme:
        return self.own[self.layers[0]]

    def apply(self) -> None:
        """Make every swap, or none if one fails."""
        apply_all(self.swaps)
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def undo(self) -> None:
        """Put everything back."""
        undo_all(self.swaps)
        for parameter in self.frozen:
            parameter.requires_grad_(True)


class PositionSchemes(nn.Module):
    """The schemes of a patched model, and the native modules that they replaced, registered once on the base model."""

    def __init__(self, schemes: list[Scheme], original: dict[str, nn.Module]) -> None:
        super().__init__()
        self.scheme = nn.ModuleList(schemes)
        self.original = nn.ModuleDict(original)


@dataclass
class _Plan:
    """Where a scheme acts in this family."""

    turns: bool
    at_joint: bool
    at_scores: bool
    embeds: bool


def _plan(adapter: Adapter, scheme: Scheme, keep_native: bool, chosen: list[int], count: int) -> _Plan:
    turns = overrides(scheme, "angles") or isinstance(scheme, Rotation)
    at_joint = adapter.rotary is not None and scheme.rotates_early
    at_scores = not at_joint and any(overrides(scheme, rung) for rung in ("encode", "bias", "attend"))
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
    return _Plan(turns, at_joint, at_scores, embeds)


def _check_tower(adapter: Adapter, cls: type[Scheme], config: Any) -> None:
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
    if overrides(scheme, "replace"):
        raise UnsupportedError(f"{scheme.name!r} replaces the attention module, which is not done yet; use 'attend'.")
    if turns and not acts:
        raise UnsupportedError(
            f"{scheme.name!r} says its rotation in 'angles' alone, and this family has no place for that before the "
            "cache. Derive it from pe_patch.rotation.Rotary, which also rotates at the scores."
        )


def _build(
    cls: type[Scheme], base: PreTrainedModel, adapter: Adapter, chosen: list[int], options: dict[str, Any]
) -> dict[int, Scheme]:
    """The scheme of each chosen layer: one for all of them, one for each base of rotation, or one for each layer."""
    kinds = adapter.kinds(base, base.config)
    shapes: dict[str | None, AttentionShape] = {}
    made: dict[Any, Scheme] = {}
    own: dict[int, Scheme] = {}
    for index in chosen:
        kind = kinds[index]
        if kind not in shapes:
            shapes[kind] = adapter.shape(base, base.config, index)
        key = index if cls.per_layer else shapes[kind] if issubclass(cls, Rotation) else None
        if key not in made:
            made[key] = cls(shapes[kind], **options).to(*resolve.home(base)).train(base.training)
        own[index] = made[key]
    return own


def _check_kinds(kinds: Kinds, plan: _Plan, everywhere: bool) -> None:
    """Raise where layer types that rotate by different bases would be changed together and nobody asked for it."""
    rotations = {kind: scheme for kind, scheme in kinds.items() if isinstance(scheme, Rotation)}
    if len({scheme.theta for scheme in rotations.values()}) < 2:
        return
    told = " and ".join(f"its {kind} layers by the base {scheme.theta:g}" for kind, scheme in rotations.items())
    farthest = max(rotations, key=lambda kind: rotations[kind].theta)
    remedy = f"layers=lambda i: model.config.layer_types[i] == {farthest!r}"
    name = rotations[farthest].name
    if plan.at_scores:
        raise UnsupportedError(
            f"This family turns {told}, and {name!r} rotates at the scores, where all layers share their angles: give "
            f"one layer type, for example {remedy}."
        )
    native = all(
        torch.equal(scheme.inv_freq, scheme.plain_frequencies(scheme.shape.rope_theta)) and scheme.attention_factor == 1
        for scheme in rotations.values()
    )
    if everywhere and not native:
        raise OptionError(
            f"This family turns {told}, and {name!r} would change them all. Choose those that look far, {remedy}, or "
            "name every layer to have each changed from its own base."
        )


def collect(head: PreTrainedModel, scheme: Any, options: dict[str, Any], given: dict[str, Any]) -> Patch:
    """Everything that will change, with nothing changed yet; every error is raised here."""
    path, base = resolve.find_stack(head, given["submodule"])
    config = base.config
    adapter = resolve.find_adapter(base, given["adapter"])
    attentions, kinds = adapter.attentions(base), adapter.kinds(base, config)
    chosen = resolve.find_layers(given["layers"], len(attentions))
    shape = adapter.shape(base, config, chosen[0])
    cls, options = find_scheme(scheme, options, shape)
    _check_tower(adapter, cls, config)
    options = resolve.settle_existing(config, cls, options, given["on_existing"], {kinds[index] for index in chosen})
    own = _build(cls, base, adapter, chosen, options)
    schemes, by_kind = list(dict.fromkeys(own.values())), {kinds[index]: own[index] for index in chosen}
    plan = _plan(adapter, schemes[0], given["keep_native"], chosen, len(attentions))
    _check_kinds(by_kind, plan, given["layers"] is None)
    backend = _backend(given["backend"], base, adapter, schemes[0])

    swaps, original = _native_swaps(base, adapter, own, plan, given["keep_native"])
    scores = _at_scores(adapter, own, plan, given["keep_native"], attentions)
    for index, (attention, layer_scheme) in enumerate(zip(attentions, scores, strict=True)):
        swaps.append(Swap.of(attention, "pe_scheme", layer_scheme, direct=True))
        swaps.append(Swap.of(attention, "pe_layer", index, direct=True))
        if adapter.forward is not None:
            swaps.append(Swap.of(attention, "pe_config", config, direct=True))
            swaps.append(bind(attention, "forward", _WithoutInner(adapter.forward)))
    swaps += _forward_swaps(head, base, adapter, schemes[0], plan, scores, given["strict"], given["keep_native"])
    swaps.append(Swap.of(base, "position_schemes", PositionSchemes(schemes, original)))
    record = record_of(schemes[0], chosen if len(chosen) < len(attentions) else None, given)
    swaps += config_swaps(head, base, adapter, by_kind, record, backend.implementation)
    swaps += save_swaps(head, base, adapter, by_kind, record)
    frozen = [p for module in original.values() for p in module.parameters() if p.requires_grad]
    if adapter.tower is not None and not given["keep_native"]:
        table = adapter.tower.native_table(base)
        frozen += [table] if table.requires_grad else []
    patch = Patch(head, base, path, adapter, shape, own, by_kind, given["keep_native"], given, swaps, frozen)
    swaps.append(Swap.of(base, "pe_patch", patch, direct=True))
    return patch


def _backend(name: str | None, base: PreTrainedModel, adapter: Adapter, scheme: Scheme) -> Backend:
    own = base.config._attn_implementation if adapter.forward is None else "sdpa"  # ours lifts BLOOM's limit to eager
    backend = backend_for(name or own)
    check_backend(backend, scheme)
    return backend


class _WithoutInner:
    """A family's attention forward, which replaces the native one rather than calling it."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, module: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(module, *args, **kwargs)


def _native_swaps(
    base: Any, adapter: Adapter, own: dict[int, Scheme], plan: _Plan, keep_native: bool
) -> tuple[list[Swap], dict[str, nn.Module]]:
    """Take over, or silence, the rotation or the learned table that the family has."""
    swaps: list[Swap] = []
    original: dict[str, nn.Module] = {}
    if adapter.rotary is not None and not keep_native:
        swaps = _rotary_swaps(base, adapter, own, plan, original)
    if adapter.folds_scale and not keep_native:
        chosen = [(attention, own[i]) for i, attention in enumerate(adapter.attentions(base)) if i in own]
        swaps += [Swap.of(each, "scaling", adapter.softmax_scale(each, scheme), direct=True) for each, scheme in chosen]
    if adapter.learned is not None and not keep_native:
        table = getattr(base, adapter.learned)
        own[0].adopt(table.weight[adapter.learned_offset :])
        swaps.append(Swap.of(base, adapter.learned, NoTable(table.weight.shape[1])))
        original[adapter.learned] = table
    if adapter.tower is not None and not keep_native:
        swaps.append(bind(getattr(base, adapter.tower.embeddings), "interpolate_pos_encoding", no_table))
    return swaps, original


def _rotary_swaps(
    base: Any, adapter: Adapter, own: dict[int, Scheme], plan: _Plan, original: dict[str, nn.Module]
) -> list[Swap]:
    """One joint in the place of the rotary module where the layers that share it are all chosen and turn alike; else
    one before each chosen layer."""
    assert adapter.rotary is not None
    native, kinds = getattr(base, adapter.rotary), adapter.kinds(base, base.config)
    turning = {index: (scheme if plan.at_joint else None, kinds[index]) for index, scheme in own.items()}
    joints = {key: adapter.joint(base, *key) for key in dict.fromkeys(turning.values())}
    touched = {kind for _, kind in joints}
    if len(touched) == len(joints) and all(i in own for i, kind in enumerate(kinds) if kind in touched):
        by_kind = {kind: joint for (_, kind), joint in joints.items()}
        original[adapter.rotary] = native
        whole = TypedJoint({str(kind): joint for kind, joint in by_kind.items()}, native)
        return [Swap.of(base, adapter.rotary, whole if adapter.typed else by_kind[None])]
    swaps, layers = [], adapter.blocks(base)
    for index, key in turning.items():
        swaps.append(Swap.of(layers[index], "pe_joint", joints[key], direct=True))
        swaps.append(bind(layers[index], "forward", layer_rotation))
    return swaps


def _at_scores(
    adapter: Adapter, own: dict[int, Scheme], plan: _Plan, keep_native: bool, attentions: list[Any]
) -> LayerSchemes:
    """For each layer what acts on its scores, or None where Transformers' own attention is all there is."""
    first = next(iter(own.values()))
    if plan.turns and all(adapter.rests(attentions[index]) for index in own):
        raise OptionError(
            f"layers= chooses layers that do not rotate in this family ({list(own)}), so {first.name!r} would have no "
            "effect there."
        )
    native = SCHEMES["alibi"](first.shape) if adapter.alibi else None
    result: LayerSchemes = []
    for index, attention in enumerate(attentions):
        if index not in own:
            result.append(native)
            continue
        scheme = own[index] if plan.at_scores and not (plan.turns and adapter.rests(attention)) else None
        scorer = own[index].scorer
        if native is not None and keep_native:
            if scorer is not None or (scheme is not None and (scheme.own_scores or not plan.turns)):
                raise UnsupportedError(
                    f"{first.name!r} cannot be added to this family's own ALiBi; leave keep_native out."
                )
            scorer = native
        result.append(Stacked(scheme, scorer) if scheme is not None and scorer is not None else scheme or scorer)
    return result


def _forward_swaps(
    head: Any,
    base: Any,
    adapter: Adapter,
    scheme: Scheme,
    plan: _Plan,
    scores: list[Scheme | Stacked | None],
    strict: bool,
    keep_native: bool,
) -> list[Swap]:
    """Bind the forward that finds the positions, and what hands them down where the family drops keywords."""
    runtime = Runtime(
        scheme=scheme,
        embeds=plan.embeds,
        multiplier=float(getattr(base, adapter.embedding_multiplier)) if adapter.embedding_multiplier else 1.0,
        scores=any(layer is not None for layer in scores),
        carry=adapter.carry,
        arguments=[name for name in list(inspect.signature(type(base).forward).parameters)[1:] if name != "kwargs"],
        window=scheme.effective_window,
        strict=strict,
        patch=adapter.tower.patch(base.config) if adapter.tower else None,
        keep_native=keep_native,
    )
    forward = base_forward if adapter.tower is None else tower_forward
    swaps = [Swap.of(base, "pe_runtime", runtime), bind(base, "forward", forward)]
    for owner in {id(head): head, id(base): base}.values():
        swaps.append(Swap.of(owner, "pe_base", base, direct=True))
        swaps.append(bind(owner, "set_attn_implementation", set_attn_implementation))
    if hasattr(head, "init_continuous_batching"):
        swaps.append(bind(head, "init_continuous_batching", refuse_paging))
    if adapter.build_bias is not None:
        swaps.append(Swap.of(base, "pe_positions", None))
        swaps.append(bind(base, adapter.build_bias[0], _WithoutInner(adapter.build_bias[1])))
    before_head = [read_prompt_first] if scheme.length_dependent else []
    if adapter.carry is not None and head is not base:
        swaps.append(Swap.of(base, "pe_position_ids", None))
        before_head.append(hand_over_positions)
    if before_head and head is not base:
        swaps.append(bind(head, "forward", Chain(*before_head)))
    return swaps
