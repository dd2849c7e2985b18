"""Return the swaps that put a scheme into the modules of a model: rotary module, tables, scores and forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import compat
from ..adapters import Adapter
from ..adapters.adapter import PatchedRotaryEmbedding, PerLayerTypeRotary, ZeroPositionEmbedding
from ..adapters.trained_window import table_window
from ..adapters.vision import zero_positions
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
    hand_down_position_ids,
    keep_cache,
    layer_rotation,
    read_prompt_first,
    refuse_paging,
    refuse_prefill_chunks,
    set_attn_implementation,
    vision_forward,
)
from .stacked import Stacked

LayerSchemes = list[Scheme | Stacked | None]
"""The scheme that acts on the scores of each layer; None for Transformers' own attention."""
ROTARY_MODULES = (PatchedRotaryEmbedding, PerLayerTypeRotary)


class WithoutInner:
    """Wrap a function so that `Bound` calls it without the native forward, which it replaces."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, module: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(module, *args, **kwargs)


def native_swaps(
    base: Any, adapter: Adapter, scheme_by_layer: dict[int, Scheme], plan: Plan, keep_native: bool
) -> tuple[list[Swap], dict[str, nn.Module]]:
    """Return the swaps that replace or switch off the native positions, and the modules that they replace.

    Args:
        base: the model that holds the layers.
        adapter: the description of its family.
        scheme_by_layer: the scheme of each chosen layer.
        plan: the places at which the scheme acts.
        keep_native: leave the native positions in place.
    """
    swaps: list[Swap] = []
    original: dict[str, nn.Module] = {}
    attentions = adapter.attentions(base)
    keeps_native_rotation = converts(next(iter(scheme_by_layer.values()))) and not plan.rotates
    if adapter.rotary is not None and not keep_native and not keeps_native_rotation:
        swaps = _rotary_swaps(base, adapter, scheme_by_layer, plan, original)
    if adapter.folds_scale and not keep_native and not keeps_native_rotation:
        for index, scheme in scheme_by_layer.items():
            attention: Any = attentions[index]
            swaps.append(Swap.of(attention, "scaling", adapter.softmax_scale(attention, scheme), direct=True))
    if adapter.norm_after_rotation is not None and plan.at_scores and not keep_native:
        swaps += _norm_swaps(adapter, {index: attentions[index] for index in scheme_by_layer}, scheme_by_layer)
    if adapter.learned is not None and not keep_native:
        table = getattr(base, adapter.learned)
        scheme_by_layer[0].init_from_table(table.weight[adapter.learned_offset :])
        swaps.append(Swap.of(base, adapter.learned, ZeroPositionEmbedding(table.weight.shape[1])))
        original[adapter.learned] = table
    if adapter.tower is not None and not keep_native:
        swaps.append(bind(getattr(base, adapter.tower.embeddings), "interpolate_pos_encoding", zero_positions))
    return swaps, original


def _norm_swaps(adapter: Adapter, attentions: dict[int, Any], scheme_by_layer: dict[int, Scheme]) -> list[Swap]:
    """Delay the norm that follows the rotation until `Rotary` has rotated at the scores.

    Schemes that rotate each pair by several positions do not need this: a norm without weights and a rotation commute.
    """
    name, swaps = str(adapter.norm_after_rotation), []
    for index, attention in attentions.items():
        norm = getattr(attention, name, None)
        if norm is not None and type(scheme_by_layer[index]).attend is Rotary.attend:
            swaps.append(Swap.of(attention, name, nn.Identity()))
            swaps.append(Swap.of(attention, "pe_norm_after_rotation", norm, direct=True))
    return swaps


def _rotary_swaps(
    base: Any, adapter: Adapter, scheme_by_layer: dict[int, Scheme], plan: Plan, original: dict[str, nn.Module]
) -> list[Swap]:
    """Return the swaps that make chosen layers rotate by their schemes, and add replaced modules to `original`.

    If all layers that share the rotary module are chosen and rotate alike, one module replaces it. Otherwise each
    chosen layer gets a rotary module of its scheme.
    """
    assert adapter.rotary is not None
    native, layer_types = getattr(base, adapter.rotary), adapter.layer_types(base, base.config)
    key_by_layer = {
        index: (scheme if plan.at_rotary_module else None, layer_types[index])
        for index, scheme in scheme_by_layer.items()
    }
    modules = {key: adapter.rotary_embedding(base, *key) for key in dict.fromkeys(key_by_layer.values())}
    touched = {layer_type for _, layer_type in modules}
    if len(touched) == len(modules) and all(
        i in scheme_by_layer for i, layer_type in enumerate(layer_types) if layer_type in touched
    ):
        by_type = {layer_type: module for (_, layer_type), module in modules.items()}
        original[adapter.rotary] = native
        whole = PerLayerTypeRotary({str(layer_type): module for layer_type, module in by_type.items()}, native)
        return [Swap.of(base, adapter.rotary, whole if adapter.typed else by_type[None])]
    swaps, layers = [], adapter.blocks(base)
    for index, key in key_by_layer.items():
        swaps.append(Swap.of(layers[index], "pe_rotary", modules[key], direct=True))
        swaps.append(bind(layers[index], "forward", layer_rotation))
    return swaps


def at_scores(
    adapter: Adapter, scheme_by_layer: dict[int, Scheme], plan: Plan, keep_native: bool, attentions: list[Any]
) -> LayerSchemes:
    """Return for each layer the scheme that acts on its scores, or None for Transformers' own attention.

    Raises:
        OptionError: the scheme rotates, and the chosen layers of this family do not.
        UnsupportedError: `keep_native` would add a second bias to the family's ALiBi.
    """
    first = next(iter(scheme_by_layer.values()))
    if plan.rotates and all(adapter.skips_rope(attentions[index]) for index in scheme_by_layer):
        raise OptionError(
            f"layers= chooses layers that do not rotate in this family ({list(scheme_by_layer)}), so {first.name!r} "
            "would have no effect there."
        )
    native = SCHEMES["alibi"](first.shape) if adapter.alibi else None
    result: LayerSchemes = []
    for index, attention in enumerate(attentions):
        if index not in scheme_by_layer:
            result.append(native)
            continue
        scheme = (
            scheme_by_layer[index] if plan.at_scores and not (plan.rotates and adapter.skips_rope(attention)) else None
        )
        scorer = scheme_by_layer[index].scorer
        if native is not None and keep_native:
            if scorer is not None or (scheme is not None and (scheme.own_scores or not plan.rotates)):
                raise UnsupportedError(
                    f"{first.name!r} cannot be added to the ALiBi of this family; leave keep_native out."
                )
            scorer = native
        result.append(Stacked(scheme, scorer) if scheme is not None and scorer is not None else scheme or scorer)
    return result


def forward_swaps(
    model: Any,
    base: Any,
    adapter: Adapter,
    scheme_by_layer: dict[int, Scheme],
    plan: Plan,
    scores: list[Scheme | Stacked | None],
    strict: bool,
    keep_native: bool,
    specification: str,
    native: list[Swap],
) -> list[Swap]:
    """Return the swaps of the forwards, which compute positions and pass them to the layers.

    They also guard features of generation that would bypass the scheme.
    """
    scheme = next(iter(scheme_by_layer.values()))
    cache_argument = None
    if adapter.tower is None:
        cache_argument = compat.check_decoder_forward(type(base), needs_position_ids=adapter.rotary is not None)
    runtime = Runtime(
        scheme=scheme,
        embeds=plan.embeds,
        multiplier=float(getattr(base, adapter.embedding_multiplier)) if adapter.embedding_multiplier else 1.0,
        scores=any(layer is not None for layer in scores),
        rotates_at_scores=plan.rotates and plan.at_scores,
        pass_positions=adapter.carry,
        arguments=compat.argument_names(type(base).forward),
        cache_argument=cache_argument,
        model_arguments=compat.argument_names(type(model).forward),
        model_cache_argument=compat.cache_argument(type(model).forward),
        specification=specification,
        window=scheme.effective_window,
        strict=strict,
        patch=adapter.tower.patch(base.config) if adapter.tower else None,
        keep_native=keep_native,
        native_table=table_window(base) if keep_native and adapter.tower is None else None,
        layers=len(adapter.attentions(base)),
        forwards_kwargs=adapter.carries,
        unsplittable=_why_unsplittable(adapter, scheme),
        sliding_window=_window(base.config, "sliding_attention", "sliding_window"),
        chunk=_window(base.config, "chunked_attention", "attention_chunk_size"),
        rotary=next(
            (
                (swap.attribute, type(swap.replacement))
                for swap in native
                if swap.owner is base and isinstance(swap.replacement, ROTARY_MODULES)
            ),
            None,
        ),
    )
    broadcast_parameters({id(each): each for each in scores if each is not None}.values(), adapter.attentions(base)[0])
    forward: Callable[..., Any] = base_forward if adapter.tower is None else vision_forward
    if adapter.keep_positions is not None:
        forward = Chain(forward, adapter.keep_positions)
    swaps = [Swap.of(base, "pe_runtime", runtime), bind(base, "forward", forward)]
    for owner in {id(model): model, id(base): base}.values():
        swaps.append(Swap.of(owner, "pe_base", base, direct=True))
        swaps.append(bind(owner, "set_attn_implementation", set_attn_implementation))
    everywhere = len(scheme_by_layer) == len(adapter.attentions(base))
    if adapter.drops_cache_at_window and everywhere and not keep_native and not keeps_rotation(scheme):
        swaps.append(bind(model, "prepare_inputs_for_generation", keep_cache))
    if hasattr(model, "init_continuous_batching"):
        swaps.append(bind(model, "init_continuous_batching", refuse_paging))
    if adapter.build_bias is not None:
        swaps.append(bind(base, adapter.build_bias[0], WithoutInner(adapter.build_bias[1])))
    if scheme.length_dependent and hasattr(model, compat.PREFILL):
        swaps.append(bind(model, compat.PREFILL, refuse_prefill_chunks))
    before_model = [read_prompt_first] if scheme.length_dependent else []
    if adapter.carry is not None and model is not base:
        before_model.append(hand_down_position_ids)
    if before_model and model is not base:
        swaps.append(bind(model, "forward", Chain(*before_model)))
    return swaps


def _window(config: Any, layer_type: str, attribute: str) -> int | None:
    """Return the number of tokens within which layers of one type attend; None if the model has no such layers."""
    layer_types, size = getattr(config, "layer_types", None), getattr(config, attribute, None)
    return size if isinstance(size, int) and (layer_types is None or layer_type in layer_types) else None


def _why_unsplittable(adapter: Adapter, scheme: Scheme) -> str | None:
    """Return why Ulysses cannot split sequences of this family over processes, or None if it can."""
    if adapter.tower is not None:
        return "a vision encoder has no sequence to split"
    if converts(scheme) or scheme.shape.latent_rank:
        return "it moves heads between processes, and this attention has latents that all heads share"
    if adapter.forward is not None:
        return "this family does not call the attention interface, which Ulysses replaces"
    return None if adapter.carries else "this family drops the keywords that carry positions and masks to its layers"
