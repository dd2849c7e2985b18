"""Plan a patch: decide where the schemes act, and collect every swap that puts them there. The model stays unchanged.

Read `plan` first. The rest of the file follows its order: the places at which a scheme acts, the native positions, the
scores of each layer, and the forwards.

Attributes that a patch adds to modules:

- `pe_patch` (base model): the `Patch`.
- `pe_runtime` (base model): what the replaced forward needs.
- `pe_base` (outer and base model): the base model.
- `pe_scheme` (every attention): the scheme at the scores, or None. The attention function reads it.
- `pe_layer` (every attention): the index of the layer.
- `pe_config` (every attention whose forward is replaced): the config of the patched model.
- `pe_rotary` (a chosen layer, if only some layers rotate otherwise): its rotary module.
- `pe_norm_after_rotation` (an attention): the norm to apply after a rotation at the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import compat
from ..adapters import Adapter
from ..adapters.adapter import PatchedPositionTable, PatchedRotaryEmbedding, PerLayerTypeRotary, table_rows
from ..adapters.trained_window import TrainedWindow, table_window
from ..adapters.vision import zero_positions
from ..attention.interface import Backend, backend_for, check_backend
from ..attention.parallel import broadcast_parameters
from ..core.positions import Positions
from ..core.scheme import AttentionShape, Scheme, overrides
from ..core.swaps import Chain, Swap, bind, finally_do
from ..errors import OptionError, UnsupportedError
from ..mla.conversion import Conversion, convert_model, loss, smallest_rank
from ..mla.protocol import ProjectionScheme, converts, keeps_rotation, replaces_projections
from ..mla.replacement import native_latent_swaps, replacement_swaps, skip_static_cache_allocation
from ..schemes.registry import SCHEMES
from ..schemes.rotary import Rotary, Rotation
from .config import (
    SchemeByLayerType,
    cache_specification,
    config_references,
    config_swaps,
    copy_configs,
    models_around,
    record_of,
    redirect,
)
from .forward import (
    Runtime,
    base_forward,
    before_prompt,
    count_from_first,
    hand_down_position_ids,
    keep_cache,
    layer_rotation,
    mark_guessing,
    read_prompt_first,
    refuse_paging,
    set_attn_implementation,
    vision_forward,
)
from .patch import Patch, PositionSchemes, Settings
from .saving import saving_swaps
from .targets import Target

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine, Output

ROTARY_MODULES = (PatchedRotaryEmbedding, PerLayerTypeRotary)

SchemeByLayer = dict[int, Scheme]
"""The scheme of each chosen layer, by layer index. All have the same class and options; sizes and weights may
differ. Where only class and options matter, the first one represents all."""


def plan(target: Target, scheme_by_layer: SchemeByLayer, window: TrainedWindow, settings: Settings) -> Patch:
    """Return the patch that puts built schemes into a model, without applying it.

    For a conversion with `max_loss`, the search for the latent rank applies trial patches and undoes them.

    Args:
        target: the layers to patch.
        scheme_by_layer: the scheme of each of them.
        window: the trained window that the schemes extend from.
        settings: the arguments of `patch_model`.

    Raises:
        PePatchError: the patch is not possible. The model is unchanged.
    """
    scheme = next(iter(scheme_by_layer.values()))
    target = _with_own_attention(target, scheme)
    for each in scheme_by_layer.values():
        if isinstance(each, ProjectionScheme):
            each.restored = settings.restored
    _check_score_method(target)
    places = places_of(target, scheme, settings.keep_native)
    everywhere = settings.layers is None and not settings.restored  # the record has no layers where all were chosen
    _check_layer_types(_by_layer_type(target, scheme_by_layer), places, everywhere)
    backend = _backend(settings.backend, target, scheme)

    def collect(modules: dict[int, nn.Module]) -> Patch:
        return _collect(target, scheme_by_layer, window, settings, places, backend, modules)

    if not places.replaces_projections:
        return collect({})
    conversion = convert_model(target.model, target.base, target.adapter, scheme_by_layer)
    if conversion.latents:
        return _narrowest(target.model, scheme_by_layer, conversion, collect)
    return collect(conversion.modules)


def _with_own_attention(target: Target, scheme: Scheme) -> Target:
    """Return the target with the adapter that a scheme at the scores needs.

    Raises:
        UnsupportedError: this model of the family cannot be patched.
    """
    adapter = target.adapter
    reason = adapter.refuses(target.base.config) if adapter.refuses is not None else None
    if reason is not None:
        raise UnsupportedError(f"{type(target.base).__name__} cannot be patched here, since this model {reason}.")
    if adapter.at_scores is None or not (_acts_at_scores(adapter, scheme) or scheme.scorer is not None):
        return target
    return replace(target, adapter=adapter.at_scores)


def _acts_at_scores(adapter: Adapter, scheme: Scheme) -> bool:
    """Return whether a scheme acts in the attention function, on queries and on the keys of the cache."""
    overrides_score_hook = any(overrides(scheme, hook) for hook in ("encode", "bias", "attend"))
    return overrides_score_hook and (converts(scheme) or adapter.rotary is None or not scheme.rotates_early)


def _check_score_method(target: Target) -> None:
    """Raise `UnsupportedError` if the installed Transformers lacks the method that a row replaces."""
    if target.adapter.score_method is None:
        return
    name, attention = target.adapter.score_method[0], next(iter(target.attentions.values()))
    if not hasattr(attention, name):
        raise UnsupportedError(
            f"{type(attention).__name__} of transformers {compat.INSTALLED} has no method {name!r}, which pe_patch "
            "replaces. Install transformers 5.23 or older for this family."
        )


def _by_layer_type(target: Target, scheme_by_layer: SchemeByLayer) -> SchemeByLayerType:
    return {target.layer_types[index]: scheme for index, scheme in scheme_by_layer.items()}


def _backend(name: str | None, target: Target, scheme: Scheme) -> Backend:
    """Return the backend with this name, or the default one, once it supports the scheme.

    Raises:
        OptionError: a backend was chosen for a family that does not call the attention interface.
    """
    if name is not None and not target.adapter.calls_interface:
        raise OptionError(
            f"backend={name!r} does not apply: {type(target.base).__name__} computes attention in its own code. Leave "
            "backend= out."
        )
    if target.adapter.eager_only and name not in (None, "eager"):
        raise OptionError(
            f"backend={name!r} does not apply: {type(target.base).__name__} only has eager attention. Leave backend= "
            "out."
        )
    if target.adapter.eager_only:
        name = "eager"
    # A family with a `forward` (BLOOM) has only an eager attention in Transformers; `adapters/bloom.py` also runs SDPA.
    native_backend = compat.attention_implementation(target.base.config) if target.adapter.forward is None else "sdpa"
    backend = backend_for(name or native_backend)
    check_backend(backend, scheme)
    return backend


def _narrowest(
    model: PreTrainedModel,
    scheme_by_layer: dict[int, Any],
    conversion: Conversion,
    collect: Callable[[dict[int, nn.Module]], Patch],
) -> Patch:
    """Return the patch with the smallest latent rank that keeps the loss on held-out tokens within `loss_bound`."""
    scheme = next(iter(scheme_by_layer.values()))
    before = loss(model, conversion.rows)

    def loss_at(rank: int) -> float:
        patch = collect(conversion.at(scheme_by_layer, rank))

        def patched_loss() -> float:
            patch.apply()
            return loss(model, conversion.rows)

        return finally_do(patch.undo, patched_loss)

    rank = smallest_rank(scheme.rank, before * (1 + scheme.loss_bound), loss_at)
    return collect(conversion.at(scheme_by_layer, rank))


def _collect(
    target: Target,
    scheme_by_layer: SchemeByLayer,
    window: TrainedWindow,
    settings: Settings,
    places: Places,
    backend: Backend,
    modules: dict[int, nn.Module],
) -> Patch:
    """Collect every swap of a patch.

    Args:
        target: the layers to patch.
        scheme_by_layer: the scheme of each of them.
        window: the trained window that the schemes extend from.
        settings: the arguments of `patch_model`.
        places: where the schemes act.
        backend: the attention implementation.
        modules: for each layer, the module that replaces its projections; empty for most schemes.
    """
    model, base, adapter, attentions = target.model, target.base, target.adapter, target.attentions
    config, first = base.config, scheme_by_layer[target.layers[0]]
    schemes = list(dict.fromkeys(scheme_by_layer.values()))
    scheme_by_layer_type = _by_layer_type(target, scheme_by_layer)
    models = [model, *models_around(model)]
    configs = copy_configs(base, models)
    native_swaps, original = _native_swaps(target, scheme_by_layer, places)
    swaps = list(native_swaps)
    if modules:
        arguments = compat.argument_names(type(attentions[target.layers[0]]).forward)
        replacing, replaced = replacement_swaps(attentions, adapter, first, modules, arguments)
        original |= replaced if cast(ProjectionScheme, first).keep_original else {}
        swaps += replacing
        if hasattr(model, compat.STATIC_CACHE_SHAPE):
            swaps.append(bind(model, compat.STATIC_CACHE_SHAPE, skip_static_cache_allocation))
    elif places.converts:
        swaps += native_latent_swaps({index: attentions[index] for index in scheme_by_layer}, first)
    scores = _score_schemes(target, scheme_by_layer, places)
    config_copy = next(each.copy for each in configs if each.original is config)
    for index, attention in attentions.items():
        swaps.append(Swap.of(attention, "pe_scheme", scores[index], direct=True))
        swaps.append(Swap.of(attention, "pe_layer", index, direct=True))
        if adapter.forward is not None or adapter.score_method is not None:
            swaps.append(Swap.of(attention, "pe_owner", base, direct=True))
        if adapter.forward is not None:
            swaps.append(Swap.of(attention, "pe_config", config_copy, direct=True))
            swaps.append(bind(attention, "forward", WithoutInner(adapter.forward)))
        if adapter.score_method is not None:
            name, method = adapter.score_method
            swaps.append(bind(attention, name, WithoutInner(method)))
    listed = set(attentions.values())
    for module in base.modules():  # cross-attentions and the like, which stay as they are
        if "Attention" in type(module).__name__ and module not in listed:
            swaps.append(Swap.of(module, "pe_left_out", True, direct=True))
    record = record_of(
        first, None if target.everywhere else target.layers, settings.submodule, settings.keep_native, settings.strict
    )
    specification = cache_specification(config, record, scheme_by_layer_type)
    swaps += _forward_swaps(target, first, places, scores, settings, specification, native_swaps)
    swaps.append(Swap.of(base, "position_schemes", PositionSchemes(schemes, original).train(base.training)))
    implementation = backend.implementation if adapter.calls_interface else compat.attention_implementation(config)
    swaps += redirect(config_swaps(model, base, adapter, scheme_by_layer_type, record, implementation), configs)
    taken = {(id(swap.owner), swap.attribute) for swap in swaps}  # PhiMoE's rotary module keeps another
    swaps += [swap for swap in config_references(models, configs) if (id(swap.owner), swap.attribute) not in taken]
    swaps += saving_swaps(model, base)
    frozen = [p for module in original.values() for p in module.parameters() if p.requires_grad]
    if adapter.vision_encoder is not None and not places.keep_native:
        table = adapter.vision_encoder.native_table(base)
        frozen += [table] if table.requires_grad else []
    return Patch(
        model=model,
        base=base,
        path=target.path,
        adapter=adapter,
        shape=target.shape(target.layers[0]),
        scheme_by_layer=scheme_by_layer,
        scheme_by_layer_type=scheme_by_layer_type,
        settings=settings,
        swaps=swaps,
        frozen=frozen,
        configs=configs,
        window=window,
    )


@dataclass(frozen=True)
class Places:
    """The places of a model at which a scheme acts.

    In the order of a forward pass: input embeddings, projections, rotary module, cache, scores.
    """

    rotates: bool
    """The scheme rotates queries and keys."""
    at_rotary_module: bool
    """It does so through the model's rotary module, before the cache."""
    at_scores: bool
    """Its `encode`, `bias` or `attend` runs in the attention function, on queries and on the keys of the cache."""
    embeds: bool
    """It adds to the input embeddings."""
    converts: bool
    """It computes the weights of new projections from the trained ones."""
    replaces_projections: bool
    """It replaces the projections of the attention."""
    keep_native: bool
    """The native positions remain, and the scheme adds to them."""


def places_of(target: Target, scheme: Scheme, keep_native: bool) -> Places:
    """Return the places at which a scheme acts.

    Args:
        target: the layers to patch.
        scheme: the scheme, built for the model.
        keep_native: add the scheme to the native positions.

    Raises:
        UnsupportedError: the family has no place for the scheme.
        OptionError: `keep_native` or `layers` does not apply to the scheme.
    """
    adapter, converting, replacing = target.adapter, converts(scheme), replaces_projections(scheme)
    rotates = overrides(scheme, "angles") or isinstance(scheme, Rotation)
    at_rotary_module = adapter.rotary is not None and scheme.rotates_early
    at_scores = _acts_at_scores(adapter, scheme)
    embeds = overrides(scheme, "embed")
    _check_hooks(scheme, rotates, at_rotary_module or at_scores, replacing)
    if adapter.own_bias and (scheme.name != adapter.native or keep_native):
        raise UnsupportedError(
            f"{scheme.name!r} would stand beside the relative bias of {type(target.base).__name__}'s attentions, which "
            f"no scheme replaces. Use {adapter.native!r}, which extends the table of positions and leaves the bias."
        )
    if (at_scores or scheme.scorer is not None) and not adapter.calls_interface:
        raise UnsupportedError(
            f"{scheme.name!r} acts at the scores, and {type(target.base).__name__} computes attention in its own code "
            "instead of calling the attention interface. Use a static rotary scheme if it rotates, a scheme that adds "
            "to the embeddings, or 'nope'."
        )
    if (at_scores or scheme.scorer is not None) and not adapter.forwards_kwargs:
        raise UnsupportedError(
            f"{scheme.name!r} needs the positions at the scores, and this family drops keywords on the way there. "
            "Use a static rotary scheme, an embedding or 'nope' instead."
        )
    if at_scores and rotates and adapter.bars_rotation_at_scores is not None:
        raise UnsupportedError(
            f"{scheme.name!r} rotates at the scores, and this family {adapter.bars_rotation_at_scores}. Use a static "
            "rotary scheme instead."
        )
    if embeds and not adapter.takes_embeddings and (adapter.learned is None or keep_native):
        raise UnsupportedError(
            f"{scheme.name!r} adds to the input embeddings, and this family changes `inputs_embeds` in its own way. "
            "Use a scheme that acts in the attention, such as 'alibi' or 'yarn'."
        )
    if keep_native and rotates and (adapter.rotary is not None or adapter.still_rotation is not None):
        raise OptionError(f"keep_native=True would rotate twice: this family rotates, and so does {scheme.name!r}.")
    if keep_native and converting:
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
    if not target.everywhere and adapter.vision_encoder is not None and not keep_native:
        raise OptionError(
            f"layers= would remove the learned table from all layers and give {scheme.name!r} to some of them: patch "
            "all layers, or give keep_native=True to keep the table."
        )
    if not target.everywhere and (embeds or adapter.learned):
        raise OptionError(
            f"layers= does not apply to {scheme.name!r} here: the positions at the input embeddings reach all layers. "
            "Leave layers= out."
        )
    return Places(rotates, at_rotary_module, at_scores, embeds, converting, replacing, keep_native)


def _check_hooks(scheme: Scheme, rotates: bool, has_place: bool, replaces: bool) -> None:
    """Raise `UnsupportedError` if a hook that the scheme overrides would never run."""
    if not isinstance(scheme, ProjectionScheme) and callable(getattr(type(scheme), "replace", None)):
        raise UnsupportedError(
            f"{scheme.name!r} overrides `replace`, which only a ProjectionScheme has: derive it from "
            "pe_patch.mla.protocol.ProjectionScheme."
        )
    if replaces and not overrides(scheme, "attend"):
        raise UnsupportedError(
            f"{scheme.name!r} overrides `replace` but not `attend`: a scheme that replaces the projections must "
            "override `attend`, which uses what they cache."
        )
    if rotates and not has_place:
        raise UnsupportedError(
            f"{scheme.name!r} only overrides `angles`, but this family has no rotary module. Derive the scheme from "
            "pe_patch.schemes.rotary.Rotary, which also rotates at the scores."
        )


def _check_layer_types(schemes: SchemeByLayerType, places: Places, everywhere: bool) -> None:
    """Raise if one scheme would change layer types with different rotary bases and the user did not choose the layers.

    Args:
        schemes: the scheme of each layer type.
        places: the places at which they act.
        everywhere: the user patches now, and did not give `layers=`.

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
    if places.at_scores:
        raise UnsupportedError(
            f"This family rotates {bases}, and {name!r} rotates at the scores, where all layers share their angles: "
            f"choose one layer type, for example {remedy}."
        )
    rotates_natively = all(
        torch.equal(scheme.inv_freq, scheme.plain_frequencies(scheme.shape.rope_theta))
        and scheme.attention_scaling == 1
        for scheme in rotations.values()
    )
    if everywhere and not rotates_natively:
        raise OptionError(
            f"This family rotates {bases}, and {name!r} would change them all. Choose the layers with the largest "
            f"base, {remedy}, or list every layer in layers= to change each from its own base."
        )


class WithoutInner:
    """Wrap a function so that `Bound` calls it without the native forward, which it replaces."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, module: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(module, *args, **kwargs)


def _native_swaps(
    target: Target, scheme_by_layer: SchemeByLayer, places: Places
) -> tuple[list[Swap], dict[str, nn.Module]]:
    """Return the swaps that replace or switch off the native positions, and the modules that they replace.

    Args:
        target: the layers to patch.
        scheme_by_layer: the scheme of each of them.
        places: where the schemes act.
    """
    base, attentions = target.base, target.attentions
    adapter: Adapter = target.adapter
    swaps: list[Swap] = []
    original: dict[str, nn.Module] = {}
    if places.keep_native:
        return swaps, original
    if places.rotates or not places.converts:
        if adapter.rotary is not None:
            swaps = _rotary_swaps(target, scheme_by_layer, places, original)
        if adapter.scaling_includes_mscale:
            for index, scheme in scheme_by_layer.items():
                attention: Any = attentions[index]
                swaps.append(Swap.of(attention, "scaling", adapter.softmax_scale(attention, scheme), direct=True))
    if adapter.still_rotation is not None:
        for index in scheme_by_layer:
            name, still = adapter.still_rotation(attentions[index])
            attention = attentions[index]
            swaps.append(
                bind(attention, name, WithoutInner(still)) if callable(still)
                else Swap.of(attention, name, still, direct=True)
            )  # fmt: skip
    if adapter.norm_after_rotation is not None and places.at_scores:
        swaps += _norm_swaps(adapter, {index: attentions[index] for index in scheme_by_layer}, scheme_by_layer)
    if adapter.learned is not None:
        holder, name, table = adapter.learned_table(base)
        rows = table_rows(table)
        next(iter(scheme_by_layer.values())).init_from_table(rows[adapter.learned_offset :])
        swaps.append(Swap.of(holder, name, PatchedPositionTable(base, rows.shape[1])))
        original[name] = table
    if adapter.vision_encoder is not None:
        swaps.append(bind(getattr(base, adapter.vision_encoder.embeddings), "interpolate_pos_encoding", zero_positions))
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
    target: Target, scheme_by_layer: SchemeByLayer, places: Places, original: dict[str, nn.Module]
) -> list[Swap]:
    """Return the swaps that make chosen layers rotate by their schemes, and add replaced modules to `original`.

    If all layers that share the rotary module are chosen and rotate alike, one module replaces it. Otherwise each
    chosen layer gets a rotary module of its scheme.
    """
    base, adapter, layer_types = target.base, target.adapter, target.layer_types
    assert adapter.rotary is not None
    native_rotary = adapter.rotary_module(base)
    key_by_layer = {
        index: (scheme if places.at_rotary_module else None, layer_types[index])
        for index, scheme in scheme_by_layer.items()
    }
    modules = {key: adapter.rotary_embedding(base, *key) for key in dict.fromkeys(key_by_layer.values())}
    if adapter.rotary_per_attention:
        attentions = {index: target.attentions[index] for index in scheme_by_layer}
        natives = {index: getattr(each, adapter.rotary) for index, each in attentions.items()}
        original |= {f"{adapter.rotary}_{index}": native for index, native in natives.items()}
        original[adapter.rotary] = native_rotary
        return [Swap.of(each, adapter.rotary, modules[key_by_layer[index]]) for index, each in attentions.items()]
    chosen_types = {layer_type for _, layer_type in modules}
    one_module_per_type = len(chosen_types) == len(modules)
    whole_types_chosen = all(i in scheme_by_layer for i in target.attentions if layer_types[i] in chosen_types)
    if one_module_per_type and whole_types_chosen:
        by_type = {layer_type: module for (_, layer_type), module in modules.items()}
        original[adapter.rotary] = native_rotary
        per_type = PerLayerTypeRotary({str(each): module for each, module in by_type.items()}, native_rotary)
        return [Swap.of(base, adapter.rotary, per_type if adapter.rotary_per_layer_type else by_type[None])]
    if adapter.attentions_per_layer > 1:
        raise OptionError(
            f"layers= does not apply to {next(iter(scheme_by_layer.values())).name!r} here: the "
            f"{adapter.attentions_per_layer} attentions of a layer share their rotation. Leave layers= out."
        )
    swaps = []
    for index, key in key_by_layer.items():
        layer = adapter.block(base, index)
        swaps.append(Swap.of(layer, "pe_rotary", modules[key], direct=True))
        swaps.append(bind(layer, "forward", layer_rotation))
    return swaps


LayerSchemes = dict[int, "Scheme | RotationWithBias | None"]
"""The scheme that acts on the scores of each layer, by layer index; None for Transformers' own attention."""


def _score_schemes(target: Target, scheme_by_layer: SchemeByLayer, places: Places) -> LayerSchemes:
    """Return for each layer the scheme that acts on its scores, or None for Transformers' own attention.

    Raises:
        OptionError: the scheme rotates, and the chosen layers of this family do not.
        UnsupportedError: `keep_native` would add a second bias to the family's ALiBi.
    """
    adapter, attentions, first = target.adapter, target.attentions, next(iter(scheme_by_layer.values()))
    if places.rotates and all(adapter.skips_rope(attentions[index]) for index in scheme_by_layer):
        raise OptionError(
            f"layers= chooses layers that do not rotate in this family ({list(scheme_by_layer)}), so {first.name!r} "
            "would have no effect there."
        )
    family_alibi = SCHEMES["alibi"](first.shape) if adapter.alibi else None
    result: LayerSchemes = {}
    for index, attention in attentions.items():
        if index not in scheme_by_layer:
            result[index] = family_alibi
            continue
        scheme = (
            scheme_by_layer[index]
            if places.at_scores and not (places.rotates and adapter.skips_rope(attention))
            else None
        )
        scorer = scheme_by_layer[index].scorer
        if family_alibi is not None and places.keep_native:
            if scorer is not None or (scheme is not None and (scheme.own_scores is not None or not places.rotates)):
                raise UnsupportedError(
                    f"{first.name!r} cannot be added to the ALiBi of this family; leave keep_native out."
                )
            scorer = family_alibi
        result[index] = (
            RotationWithBias(scheme, scorer) if scheme is not None and scorer is not None else scheme or scorer
        )
    return result


@dataclass
class RotationWithBias:
    """Two schemes in one layer: the first encodes queries and keys, the second acts on their scores.

    A rotation is added to a family's native ALiBi in this way. No other schemes stack.
    """

    encoder: Scheme
    """The scheme that encodes queries and keys."""
    scorer: Scheme
    """The scheme that acts on their scores."""
    calls_modules: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The names of both schemes, for messages."""
        return f"{self.encoder.name} + {self.scorer.name}"

    @property
    def shape(self) -> AttentionShape:
        """Sizes of the layer."""
        return self.encoder.shape

    @property
    def shares_heads(self) -> bool:
        return self.encoder.shares_heads and self.scorer.shares_heads

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of both schemes."""
        return chain(self.encoder.parameters(), self.scorer.parameters())

    def __call__(self, hook: str, *arguments: Any) -> Any:
        """Call a hook by its name."""
        return getattr(self, hook)(*arguments)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        """Return the attention of the encoder, which calls that of the scorer."""
        through = cast("AttentionEngine", _SchemeEngine(engine, self.scorer))
        return self.encoder("attend", query, key, value, positions, through)


@dataclass
class _SchemeEngine:
    """An engine that computes attention by the `attend` of another scheme."""

    engine: AttentionEngine
    scorer: Scheme

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Any = None) -> Any:
        return self.scorer("attend", query, key, value, positions, self.engine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def _forward_swaps(
    target: Target,
    scheme: Scheme,
    places: Places,
    scores: LayerSchemes,
    settings: Settings,
    specification: str,
    native: list[Swap],
) -> list[Swap]:
    """Return the swaps of the forwards, which compute positions and pass them to the layers.

    They also guard features of generation that would bypass the scheme.
    """
    model, base, adapter = target.model, target.base, target.adapter
    keep_native = places.keep_native
    cache_argument = None
    if adapter.vision_encoder is None:
        cache_argument = compat.check_text_forward(type(base), needs_position_ids=adapter.rotary is not None)
    runtime = Runtime(
        scheme=scheme,
        embeds=places.embeds,
        table_width=scheme.shape.added_size if adapter.learned and not keep_native else None,
        table_rows=_rows(adapter, base) if adapter.learned and not keep_native else 0,
        has_token_types=any(name.rpartition(".")[2] == "token_type_ids" for name, _ in base.named_buffers()),
        first_position_id=adapter.first_position_id,
        multiplier=float(getattr(base, adapter.embedding_multiplier)) if adapter.embedding_multiplier else 1.0,
        scores=any(layer is not None for layer in scores.values()),
        rotates_at_scores=places.rotates and places.at_scores,
        pass_positions=adapter.pass_positions,
        arguments=compat.argument_names(type(base).forward),
        cache_argument=cache_argument,
        model_arguments=compat.argument_names(type(model).forward),
        model_cache_argument=compat.cache_argument(type(model).forward),
        specification=specification,
        window=scheme.effective_window,
        strict=settings.strict,
        key_copies=settings.key_copies and scheme.remembers and not converts(scheme),
        patch=adapter.vision_encoder.patch(base.config) if adapter.vision_encoder else None,
        keep_native=keep_native,
        native_table=table_window(base) if keep_native and adapter.vision_encoder is None else None,
        layers=adapter.count(base),
        forwards_kwargs=adapter.forwards_kwargs,
        calls_interface=adapter.calls_interface,
        eager_only=adapter.eager_only,
        unsplittable=_why_unsplittable(adapter, scheme, places),
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
    score_schemes = {id(each): each for each in scores.values() if each is not None}.values()
    broadcast_parameters(score_schemes, target.attentions[target.layers[0]])
    forward: Callable[..., Any] = base_forward if adapter.vision_encoder is None else vision_forward
    if adapter.wrap_base_forward is not None:
        forward = Chain(forward, adapter.wrap_base_forward)
    swaps = [Swap.of(base, "pe_runtime", runtime), bind(base, "forward", forward)]
    for owner in {id(model): model, id(base): base}.values():
        swaps.append(Swap.of(owner, "pe_base", base, direct=True))
        if adapter.calls_interface:
            swaps.append(bind(owner, "set_attn_implementation", set_attn_implementation))
    if adapter.drops_cache_at_window and target.everywhere and not keep_native and not keeps_rotation(scheme):
        swaps.append(bind(model, "prepare_inputs_for_generation", keep_cache))
    if hasattr(model, "init_continuous_batching"):
        swaps.append(bind(model, "init_continuous_batching", refuse_paging))
    if adapter.first_position_id and hasattr(model, compat.GENERATION_POSITIONS) and not keep_native:
        swaps.append(bind(model, compat.GENERATION_POSITIONS, count_from_first))
    if adapter.replace_bias_builder is not None:
        swaps.append(bind(base, adapter.replace_bias_builder[0], WithoutInner(adapter.replace_bias_builder[1])))
    if scheme.length_dependent and hasattr(model, compat.PREFILL):
        swaps.append(bind(model, compat.PREFILL, before_prompt))
        swaps.append(bind(model, compat.GUESSING, mark_guessing))
    before_model = [read_prompt_first] if scheme.length_dependent else []
    takes_positions = "position_ids" in compat.argument_names(type(model).forward)
    if adapter.pass_positions is not None and model is not base and not takes_positions:
        before_model.append(hand_down_position_ids)
    if before_model and model is not base:
        swaps.append(bind(model, "forward", Chain(*before_model)))
    return swaps


def _rows(adapter: Adapter, base: nn.Module) -> int:
    """Return the number of positions in the family's table."""
    return len(table_rows(adapter.learned_table(base)[2])) - adapter.learned_offset


def _window(config: Any, layer_type: str, attribute: str) -> int | None:
    """Return the number of tokens within which layers of one type attend; None if the model has no such layers."""
    layer_types, size = getattr(config, "layer_types", None), getattr(config, attribute, None)
    return size if isinstance(size, int) and (layer_types is None or layer_type in layer_types) else None


def _why_unsplittable(adapter: Adapter, scheme: Scheme, places: Places) -> str | None:
    """Return why Ulysses cannot split sequences of this family over processes, or None if it can."""
    if adapter.vision_encoder is not None:
        return "a vision encoder has no sequence to split"
    if places.converts or scheme.shape.latent_rank:
        return "it moves heads between processes, and this attention has latents that all heads share"
    if adapter.forward is not None or adapter.score_method is not None or not adapter.calls_interface:
        return "this family does not call the attention interface, which Ulysses replaces"
    return (
        None
        if adapter.forwards_kwargs
        else "this family drops the keywords that carry positions and masks to its layers"
    )
