"""What changes when a scheme meets a model: the only file that knows both sides."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from . import resolve
from .adapters import Adapter
from .adapters.adapter import NoTable, RotaryJoint
from .attention import Backend, backend_for, check_backend
from .configuration import config_swaps, record_of, save_swaps
from .errors import OptionError, UnsupportedError
from .forward import (
    Runtime,
    base_forward,
    hand_over_positions,
    layer_rotation,
    read_prompt_first,
    refuse_paging,
    set_attn_implementation,
)
from .rotation import Rotary
from .scheme import AttentionShape, Scheme, Stacked, overrides
from .schemes import SCHEMES
from .schemes.find import find_scheme
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
    schemes: list[Scheme]
    layers: list[int]
    keep_native: bool
    arguments: dict[str, Any]
    swaps: list[Swap]
    frozen: list[nn.Parameter]
    """Native parameters that a scheme has put out of use."""

    @property
    def scheme(self) -> Scheme:
        return self.schemes[0]

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
    turns = overrides(scheme, "angles")
    # What changes the scores besides rotating rotates there too: the joint is for a rotation and nothing else.
    beside = any(
        getattr(type(scheme), rung) not in (getattr(Scheme, rung), getattr(Rotary, rung))
        for rung in ("encode", "bias", "attend")
    )
    at_joint = turns and adapter.rotary is not None and not scheme.length_dependent and not beside
    at_scores = not at_joint and any(overrides(scheme, rung) for rung in ("encode", "bias", "attend"))
    embeds = overrides(scheme, "embed")
    _check_rungs(adapter, scheme, turns, at_joint or at_scores)
    if at_scores and not adapter.carries:
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
    if len(chosen) < count and (embeds or adapter.learned):
        raise OptionError(
            f"layers= has no meaning for {scheme.name!r} here: what is added to the input embeddings reaches them all."
        )
    return _Plan(turns, at_joint, at_scores, embeds)


def _check_rungs(adapter: Adapter, scheme: Scheme, turns: bool, acts: bool) -> None:
    """Raise where a rung that the scheme overrides would never be called."""
    if overrides(scheme, "replace"):
        raise UnsupportedError(f"{scheme.name!r} replaces the attention module, which is not done yet; use 'attend'.")
    if turns and not acts:
        raise UnsupportedError(
            f"{scheme.name!r} says its rotation in 'angles' alone, and this family has no place for that before the "
            "cache. Derive it from pe_patch.rotation.Rotary, which also rotates at the scores."
        )


def _build(cls: type[Scheme], shape: AttentionShape, options: dict[str, Any], base: PreTrainedModel) -> list[Scheme]:
    schemes = [cls(shape, **options) for _ in range(shape.num_layers if cls.per_layer else 1)]
    for scheme in schemes:
        scheme.to(*resolve.home(base)).train(base.training)
    return schemes


def collect(head: PreTrainedModel, scheme: Any, options: dict[str, Any], given: dict[str, Any]) -> Patch:
    """Everything that will change, with nothing changed yet; every error is raised here."""
    path, base = resolve.find_stack(head, given["submodule"])
    config = base.config
    adapter = resolve.find_adapter(base, given["adapter"])
    shape = adapter.shape(base, config)
    cls, options = find_scheme(scheme, options, shape)
    options = resolve.settle_existing(config, cls, options, given["on_existing"])
    attentions = adapter.attentions(base)
    chosen = resolve.find_layers(given["layers"], len(attentions))
    schemes = _build(cls, shape, options, base)
    plan = _plan(adapter, schemes[0], given["keep_native"], chosen, len(attentions))
    backend = _backend(given["backend"], base, adapter, schemes[0])

    swaps, original = _native_swaps(base, adapter, schemes[0], plan, given["keep_native"], chosen, len(attentions))
    scores = _at_scores(adapter, schemes, plan, given["keep_native"], chosen, attentions)
    for index, (attention, layer_scheme) in enumerate(zip(attentions, scores, strict=True)):
        swaps.append(Swap.of(attention, "pe_scheme", layer_scheme, direct=True))
        swaps.append(Swap.of(attention, "pe_layer", index, direct=True))
        if adapter.forward is not None:
            swaps.append(Swap.of(attention, "pe_config", config, direct=True))
            swaps.append(bind(attention, "forward", _WithoutInner(adapter.forward)))
    swaps += _forward_swaps(head, base, adapter, schemes[0], plan, scores, given["strict"])
    swaps.append(Swap.of(base, "position_schemes", PositionSchemes(schemes, original)))
    record = record_of(schemes[0], chosen if len(chosen) < len(attentions) else None, given)
    swaps += config_swaps(head, base, adapter, schemes[0], record, backend.implementation)
    swaps += save_swaps(head, base, adapter, schemes[0], record)
    frozen = [p for module in original.values() for p in module.parameters() if p.requires_grad]
    patch = Patch(head, base, path, adapter, shape, schemes, chosen, given["keep_native"], given, swaps, frozen)
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
    base: Any, adapter: Adapter, scheme: Scheme, plan: _Plan, keep_native: bool, chosen: list[int], count: int
) -> tuple[list[Swap], dict[str, nn.Module]]:
    """Take over, or silence, the rotation or the learned table that the family has."""
    swaps: list[Swap] = []
    original: dict[str, nn.Module] = {}
    if adapter.rotary is not None and not keep_native:
        native = getattr(base, adapter.rotary)
        joint = RotaryJoint(scheme if plan.at_joint else None, adapter.layout, 2 * native.inv_freq.shape[-1])
        if len(chosen) == count:
            swaps.append(Swap.of(base, adapter.rotary, joint))
            original[adapter.rotary] = native
        else:
            attentions = adapter.attentions(base)
            for index in chosen:
                swaps.append(Swap.of(attentions[index], "pe_joint", joint, direct=True))
                swaps.append(bind(attentions[index], "forward", layer_rotation))
    if adapter.learned is not None and not keep_native:
        table = getattr(base, adapter.learned)
        scheme.adopt(table.weight[adapter.learned_offset :])
        swaps.append(Swap.of(base, adapter.learned, NoTable(table.weight.shape[1])))
        original[adapter.learned] = table
    return swaps, original


def _at_scores(
    adapter: Adapter, schemes: list[Scheme], plan: _Plan, keep_native: bool, chosen: list[int], attentions: list[Any]
) -> LayerSchemes:
    """For each layer what acts on its scores, or None where Transformers' own attention is all there is."""
    native = SCHEMES["alibi"](schemes[0].shape) if adapter.alibi else None
    result: LayerSchemes = []
    for index, attention in enumerate(attentions):
        own = schemes[index] if len(schemes) > 1 else schemes[0]
        if index not in chosen:
            result.append(native)
        elif not plan.at_scores or (plan.turns and adapter.rotates and not getattr(attention, adapter.rotates)):
            result.append(native if keep_native else None)
        elif native is None or not keep_native:
            result.append(own)
        elif plan.turns:
            result.append(Stacked(own, native))
        else:
            raise UnsupportedError(f"{own.name!r} cannot be added to this family's own ALiBi; leave keep_native out.")
    return result


def _forward_swaps(
    head: Any,
    base: Any,
    adapter: Adapter,
    scheme: Scheme,
    plan: _Plan,
    scores: list[Scheme | Stacked | None],
    strict: bool,
) -> list[Swap]:
    """Bind the forward that finds the positions, and what hands them down where the family drops keywords."""
    runtime = Runtime(
        scheme=scheme,
        embeds=plan.embeds,
        scores=any(layer is not None for layer in scores),
        carry=adapter.carry,
        arguments=[name for name in list(inspect.signature(type(base).forward).parameters)[1:] if name != "kwargs"],
        window=scheme.effective_window,
        strict=strict,
    )
    swaps = [Swap.of(base, "pe_runtime", runtime), bind(base, "forward", base_forward)]
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
