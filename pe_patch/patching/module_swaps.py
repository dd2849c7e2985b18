"""The joints of a model that a scheme takes over, as swaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import compat
from ..adapters import Adapter
from ..adapters.adapter import NoTable, RotaryJoint, TypedJoint
from ..adapters.trained_window import table_window
from ..adapters.vision import no_table
from ..attention.parallel import broadcast_parameters
from ..core.scheme import Scheme
from ..core.swaps import Chain, Swap, bind
from ..errors import OptionError, UnsupportedError
from ..mla.protocol import converts, keeps_rotation
from ..schemes.registry import SCHEMES
from ..schemes.rope import Rotary
from .compatibility import Plan
from .forward import (
    Runtime,
    base_forward,
    hand_over_positions,
    keep_cache,
    layer_rotation,
    read_prompt_first,
    refuse_paging,
    refuse_prefill_chunks,
    set_attn_implementation,
    tower_forward,
)
from .stacked import Stacked

LayerSchemes = list[Scheme | Stacked | None]
"""What acts on the scores of each layer."""
JOINTS = (RotaryJoint, TypedJoint)


class WithoutInner:
    """A family's attention forward, which replaces the native one rather than calling it."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, module: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(module, *args, **kwargs)


def native_swaps(
    base: Any, adapter: Adapter, own: dict[int, Scheme], plan: Plan, keep_native: bool
) -> tuple[list[Swap], dict[str, nn.Module]]:
    """Take over, or silence, the rotation or the learned table that the family has."""
    swaps: list[Swap] = []
    original: dict[str, nn.Module] = {}
    stays = converts(next(iter(own.values()))) and not plan.turns
    if adapter.rotary is not None and not keep_native and not stays:
        swaps = _rotary_swaps(base, adapter, own, plan, original)
    if adapter.folds_scale and not keep_native and not stays:
        chosen = [(attention, own[i]) for i, attention in enumerate(adapter.attentions(base)) if i in own]
        swaps += [Swap.of(each, "scaling", adapter.softmax_scale(each, scheme), direct=True) for each, scheme in chosen]
    if adapter.norm_after_rotation is not None and plan.at_scores and not keep_native:
        swaps += _norm_swaps(adapter, {i: each for i, each in enumerate(adapter.attentions(base)) if i in own}, own)
    if adapter.learned is not None and not keep_native:
        table = getattr(base, adapter.learned)
        own[0].adopt(table.weight[adapter.learned_offset :])
        swaps.append(Swap.of(base, adapter.learned, NoTable(table.weight.shape[1])))
        original[adapter.learned] = table
    if adapter.tower is not None and not keep_native:
        swaps.append(bind(getattr(base, adapter.tower.embeddings), "interpolate_pos_encoding", no_table))
    return swaps, original


def _norm_swaps(adapter: Adapter, attentions: dict[int, Any], own: dict[int, Scheme]) -> list[Swap]:
    """Hold the norm that follows the rotation back until `Rotary` has rotated at the scores.

    Schemes that rotate pairs by several positions do without: a norm without weights and a rotation may change places.
    """
    name, swaps = str(adapter.norm_after_rotation), []
    for index, attention in attentions.items():
        norm = getattr(attention, name, None)
        if norm is not None and type(own[index]).attend is Rotary.attend:
            swaps.append(Swap.of(attention, name, nn.Identity()))
            swaps.append(Swap.of(attention, "pe_norm_after_rotation", norm, direct=True))
    return swaps


def _rotary_swaps(
    base: Any, adapter: Adapter, own: dict[int, Scheme], plan: Plan, original: dict[str, nn.Module]
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


def at_scores(
    adapter: Adapter, own: dict[int, Scheme], plan: Plan, keep_native: bool, attentions: list[Any]
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


def forward_swaps(
    head: Any,
    base: Any,
    adapter: Adapter,
    own: dict[int, Scheme],
    plan: Plan,
    scores: list[Scheme | Stacked | None],
    strict: bool,
    keep_native: bool,
    specification: str,
    native: list[Swap],
) -> list[Swap]:
    """Bind the forward that finds the positions, and what hands them down where the family drops keywords."""
    scheme = next(iter(own.values()))
    cache_argument = None
    if adapter.tower is None:
        cache_argument = compat.check_decoder_forward(type(base), needs_position_ids=adapter.rotary is not None)
    runtime = Runtime(
        scheme=scheme,
        embeds=plan.embeds,
        multiplier=float(getattr(base, adapter.embedding_multiplier)) if adapter.embedding_multiplier else 1.0,
        scores=any(layer is not None for layer in scores),
        rotates_at_scores=plan.turns and plan.at_scores,
        carry=adapter.carry,
        arguments=compat.argument_names(type(base).forward),
        cache_argument=cache_argument,
        head_arguments=compat.argument_names(type(head).forward),
        head_cache_argument=compat.cache_argument(type(head).forward),
        specification=specification,
        window=scheme.effective_window,
        strict=strict,
        patch=adapter.tower.patch(base.config) if adapter.tower else None,
        keep_native=keep_native,
        native_table=table_window(base) if keep_native and adapter.tower is None else None,
        layers=len(adapter.attentions(base)),
        carries=adapter.carries,
        whole=_why_whole(adapter, scheme),
        sliding_window=_window(base.config, "sliding_attention", "sliding_window"),
        chunk=_window(base.config, "chunked_attention", "attention_chunk_size"),
        rotary=next(
            (
                (swap.attribute, type(swap.replacement))
                for swap in native
                if swap.owner is base and isinstance(swap.replacement, JOINTS)
            ),
            None,
        ),
    )
    broadcast_parameters({id(one): one for one in scores if one is not None}.values(), adapter.attentions(base)[0])
    forward: Callable[..., Any] = base_forward if adapter.tower is None else tower_forward
    if adapter.keep_positions is not None:
        forward = Chain(forward, adapter.keep_positions)
    swaps = [Swap.of(base, "pe_runtime", runtime), bind(base, "forward", forward)]
    for owner in {id(head): head, id(base): base}.values():
        swaps.append(Swap.of(owner, "pe_base", base, direct=True))
        swaps.append(bind(owner, "set_attn_implementation", set_attn_implementation))
    everywhere = len(own) == len(adapter.attentions(base))
    if adapter.drops_cache_at_window and everywhere and not keep_native and not keeps_rotation(scheme):
        swaps.append(bind(head, "prepare_inputs_for_generation", keep_cache))
    if hasattr(head, "init_continuous_batching"):
        swaps.append(bind(head, "init_continuous_batching", refuse_paging))
    if adapter.build_bias is not None:
        swaps.append(bind(base, adapter.build_bias[0], WithoutInner(adapter.build_bias[1])))
    if scheme.length_dependent and hasattr(head, compat.PREFILL):
        swaps.append(bind(head, compat.PREFILL, refuse_prefill_chunks))
    before_head = [read_prompt_first] if scheme.length_dependent else []
    if adapter.carry is not None and head is not base:
        before_head.append(hand_over_positions)
    if before_head and head is not base:
        swaps.append(bind(head, "forward", Chain(*before_head)))
    return swaps


def _window(config: Any, layer_type: str, attribute: str) -> int | None:
    """Return the number of tokens within which layers of one type attend; None if the model has no such layers."""
    layer_types, size = getattr(config, "layer_types", None), getattr(config, attribute, None)
    return size if isinstance(size, int) and (layer_types is None or layer_type in layer_types) else None


def _why_whole(adapter: Adapter, scheme: Scheme) -> str | None:
    """Why the sequences of this family cannot be split over processes by Ulysses, or None."""
    if adapter.tower is not None:
        return "a tower that reads images has no sequence to split"
    if converts(scheme) or scheme.shape.latent_rank:
        return "it moves heads between processes, and this attention has latents that all heads share"
    if adapter.forward is not None:
        return "this family does not call its attention through the interface that Ulysses stands in"
    return None if adapter.carries else "this family drops the keywords that carry positions and masks to its layers"
