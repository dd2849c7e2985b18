"""Patch a model, undo the patch, or do both around a `with` block.

`patch_model` takes five steps: `resolve` the layers (`targets.py`), `build` their schemes (`build.py`), `plan` every
change (`plan.py`), apply them all or none (`patch.py`), and verify the result.

Where a static rotary scheme acts: `_rotary_swaps` in `plan.py` replaces the model's rotary module by a
`PatchedRotaryEmbedding` (`adapters/adapter.py`), which returns the scheme's cos and sin. They meet queries and keys
in Transformers' own `apply_rotary_pos_emb`, which the family's attention calls before the keys enter the cache. No code
of this library runs there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.adapter import TABLE, PatchedRotaryEmbedding, PerLayerTypeRotary, frequencies_of
from ..core.checks import check_choice, check_flag, check_length
from ..core.scheme import Scheme, overrides
from ..core.swaps import Swap, with_swaps
from ..errors import AlreadyPatchedError, NoEffectError, OptionError, PePatchError
from ..mla.protocol import converts
from ..schemes.rotary import Rotary, Rotation, Scaled
from .build import EXISTING, build, factor_reaching
from .inference import infer_missing
from .patch import ModelLock, Patch, Settings
from .peft import detach, wrapper_swaps
from .plan import plan
from .probe import arguments, check_rotation
from .targets import Layers, resolve, unwrap

logger = logging.getLogger("pe_patch")

Model = TypeVar("Model", bound=nn.Module)


def find_patch(model: Any) -> Patch | None:
    """Return the patch of a model, or None; the model may be wrapped.

    An interrupted patch has `whole=False`.
    """
    unwrapped = unwrap(model)
    return next((m.__dict__["pe_patch"] for m in unwrapped.modules() if "pe_patch" in m.__dict__), None)


def patch_model(
    model: Model,
    scheme: str | Scheme | type[Scheme] | Mapping[str, object],
    *,
    target_length: int | None = None,
    on_existing: str = "error",
    backend: str | None = None,
    adapter: Adapter | None = None,
    layers: Layers = None,
    submodule: str | None = None,
    keep_native: bool = False,
    strict: bool = False,
    key_copies: bool = True,
    **options: object,
) -> Model:
    """Replace the positional logic of a loaded model in place, and return the model.

    Args:
        model: a PreTrainedModel, or a PEFT, accelerate or torch.compile wrapper around one.
        scheme: a scheme with its options such as `YaRN(factor=4)`, a name in `SCHEMES` or `ALIASES`, a `Scheme` class,
            or a dict in any known config format.
        target_length: the length to reach, in tokens, instead of the option `factor`, which becomes this length over
            the trained window. A typed scheme goes with it as a class: `patch_model(model, YaRN, target_length=32768)`.
        on_existing: how to treat a scaling in the config or an earlier patch. "error" raises, "replace" starts from
            the original window and theta, "compose" builds on the scaling if the scheme supports that.
        backend: "eager", "sdpa", "flex" or "flash". None keeps the model's attention implementation, or uses "sdpa" if
            the family only has an eager one.
        adapter: the description of a family that is not in `ADAPTERS`.
        layers: the layers to patch, as indices, a slice or a predicate of the index; None for all. The other layers
            keep their native positions.
        submodule: path of the attention stack to patch, for a model that has several; None for the only one, or the
            only decoder, which is the language model of a vision-language model.
        keep_native: add to the native positions instead of replacing them.
        strict: raise instead of warning when a sequence is longer than the effective window.
        key_copies: keep copies of the cached keys as the scheme encodes them, so that generation encodes each key
            once. False saves their memory, which `describe` states, and encodes all keys at every step. It matters for
            schemes that act at the scores; the copies belong to the cache.
        **options: options of the scheme.

    Returns:
        The same object.

    Raises:
        PePatchError: the patch is not possible. The model is unchanged.
    """
    check_length("patch_model", "target_length", target_length)
    check_choice("patch_model", "on_existing", on_existing, EXISTING)
    check_flag("patch_model", "keep_native", keep_native)
    check_flag("patch_model", "strict", strict)
    check_flag("patch_model", "key_copies", key_copies)
    settings = Settings(on_existing, backend, adapter, layers, submodule, keep_native, strict, key_copies)
    _patch_or_leave(model, scheme, options, settings, target_length)
    return model


def restore_patch(model: Any, scheme: str, options: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Apply a saved patch to a model that is being loaded.

    A scheme that converts projections does not read the original ones, since the checkpoint may not have them.

    Args:
        model: the model.
        scheme: name of the scheme in the record.
        options: its options in the record.
        arguments: other arguments of `patch_model`; missing ones get its defaults, with `on_existing="replace"`.
    """
    _patch_or_leave(model, scheme, options, Settings(**{"on_existing": "replace", **arguments}, restored=True))


def _patch_or_leave(
    model: Any, scheme: Any, options: dict[str, Any], settings: Settings, target_length: int | None = None
) -> None:
    """Patch the model completely, or leave it as it was: native or under the earlier patch."""
    unwrapped = unwrap(model)
    with ModelLock(unwrapped):
        earlier = _earlier_patch(unwrapped, settings.on_existing)
        if earlier is None:
            _patch_native(model, unwrapped, scheme, options, settings, target_length)
            return
        state = earlier.current()
        try:
            earlier.undo()
            _patch_native(model, unwrapped, scheme, options, settings, target_length)
        except BaseException:
            current = find_patch(unwrapped)
            if current is None or current is earlier:  # else the new patch is complete: keep it
                earlier.put(*state)
            raise


def _patch_native(
    model: Any, unwrapped: Any, scheme: Any, options: dict[str, Any], settings: Settings, target_length: int | None
) -> None:
    """Patch an unpatched model completely, or leave it unpatched."""
    try:
        infer_missing(unwrapped, settings)
        target = resolve(unwrapped, settings.adapter, settings.layers, settings.submodule)
        if target_length is not None:
            options = {
                **options,
                "factor": factor_reaching(target_length, scheme, options, target, settings.on_existing),
            }
        scheme_by_layer, window = build(scheme, options, target, settings.on_existing)
        patch = plan(target, scheme_by_layer, window, settings)
        if target.users_adapter:
            check_rotation(patch)
        patch.swaps += wrapper_swaps(model)
        patch.apply()
        _verify(patch, probe=target.users_adapter)
        _announce(patch)
        patch.release_originals()
    except BaseException:
        current = find_patch(unwrapped)
        if current is not None and current.undoable:  # else `release_originals` has run: the patch is complete
            current.undo()
        raise


def _earlier_patch(model: Any, on_existing: str) -> Patch | None:
    """Return the patch to replace, or None. Undo an interrupted one first.

    Raises:
        AlreadyPatchedError: the model is patched and `on_existing` is not "replace".
    """
    earlier = find_patch(model)
    if earlier is None:
        return None
    if not earlier.whole:
        earlier.undo()
        return None
    if on_existing != "replace":
        remedy = "unpatch_model(model) first, or on_existing='replace'."
        if not earlier.undoable:
            remedy = "its original weights were not kept, so load the original model for another patch."
        raise AlreadyPatchedError(f"This model is already patched with {earlier.scheme.name!r}: {remedy}")
    return earlier


def unpatch_model(model: Model) -> Model:
    """Undo the patch of a model bit for bit, and return the same object.

    If an earlier call was interrupted, this call finishes its work.

    Raises:
        PePatchError: the model is not patched, or `keep_original=False` discarded its original weights.
    """
    unwrapped = unwrap(model)
    with ModelLock(unwrapped):
        patch = find_patch(unwrapped)
        if patch is None:
            raise PePatchError("This model carries no patch.")
        patch.undo()
        detach(model)
    return model


@contextmanager
def patched(
    model: Model, scheme: str | Scheme | type[Scheme] | Mapping[str, object], **arguments: Any
) -> Iterator[Model]:
    """Patch a model for a `with` block, and undo the patch at its end, also after an exception.

    With `on_existing="replace"` the earlier patch of the model, if any, is restored at the end.

    Args:
        model: as for `patch_model`.
        scheme: as for `patch_model`.
        **arguments: the keyword arguments of `patch_model`.

    Raises:
        OptionError: `keep_original=False`, which cannot be undone.
        PePatchError: the patch is not possible. The model is unchanged.
    """
    if arguments.get("keep_original") is False:
        raise OptionError(
            "keep_original=False cannot be undone, but patched() undoes the patch: leave it out, or use patch_model."
        )
    before, failed = find_patch(model), False
    state = before.current() if before is not None and before.whole else None

    def undo() -> None:
        unwrapped = unwrap(model)
        if failed or find_patch(unwrapped) is before:
            return
        with ModelLock(unwrapped):
            patch = find_patch(unwrapped)
            if patch is not None:
                patch.undo()
            if before is not None and state is not None:
                before.put(*state)

    try:
        try:
            try:
                patch_model(model, scheme, **arguments)
            except Exception:  # the model is unchanged, or another thread has patched it since
                failed = True
                raise
            yield model
        finally:
            undo()
    except BaseException:  # again, since an interrupt may have cut the undo short
        undo()
        raise


def _verify(patch: Patch, probe: bool) -> None:
    """Raise `NoEffectError` unless the scheme is in place in every chosen layer.

    Args:
        patch: a patch that has been applied.
        probe: also run the model once, to check that each chosen layer calls the attention interface.
    """
    base, adapter, converted = patch.base, patch.adapter, converts(patch.scheme)
    for index in patch.layers if converted else ():
        if not hasattr(adapter.attentions(base)[index], patch.scheme.name):
            raise NoEffectError(f"Layer {index} of {type(base).__name__} was not replaced by {patch.scheme.name!r}.")
    rotates = overrides(patch.scheme, "angles") or not converted
    if adapter.rotary is not None and not patch.keep_native and rotates:
        layer_types = adapter.layer_types(base, base.config)
        in_module = {scheme for scheme in set(patch.scheme_by_layer.values()) if scheme.rotates_early}
        for index, scheme in patch.scheme_by_layer.items():
            own = adapter.block(base, index).__dict__
            module = own["pe_rotary"] if "pe_rotary" in own else adapter.rotary_module(base, index)
            module = module.by_type[str(layer_types[index])] if isinstance(module, PerLayerTypeRotary) else module
            expected = scheme if scheme in in_module else None
            if not isinstance(module, PatchedRotaryEmbedding) or module.__dict__["scheme"] is not expected:
                raise NoEffectError(f"Layer {index} of {type(base).__name__} does not rotate by {patch.scheme.name!r}.")
    if not probe or not adapter.calls_interface:
        return
    attentions = adapter.attentions(base)
    reached: list[tuple[nn.Module, Any, bool | None]] = []

    @torch.no_grad()
    def run() -> None:
        base(**arguments(base), use_cache=False)

    with_swaps([Swap.of(attention, "pe_probe", reached, direct=True) for attention in attentions.values()], run)
    for index in patch.layers:
        if not any(module is attentions[index] for module, *_ in reached):
            raise NoEffectError(
                f"Layer {index} ({type(attentions[index]).__name__}) does not call the attention interface, so "
                f"{patch.scheme.name!r} would have no effect there. Give the adapter a `forward` for this family."
            )


def _distinct_layers(patch: Patch) -> list[int]:
    """Return one layer for each scheme and layer type: all others rotate like one of them."""
    layer_types = patch.adapter.layer_types(patch.base, patch.base.config)
    return list({(id(scheme), layer_types[index]): index for index, scheme in patch.scheme_by_layer.items()}.values())


def _is_native(patch: Patch, index: int) -> bool:
    """Return whether a layer rotates exactly as it did before the patch."""
    scheme = patch.scheme_by_layer[index]
    return isinstance(scheme, Rotation) and scheme.changes_nothing and _rotates_as_built(patch, index)


def _rotates_as_built(patch: Patch, index: int) -> bool:
    """Return whether a layer rotates by the frequencies and the factor of the module that the patch replaced."""
    base, adapter, scheme = patch.base, patch.adapter, patch.scheme_by_layer[index]
    if not isinstance(scheme, Rotation):
        return False
    if adapter.rotary is None:  # the family rotates by a table in each attention, or not at all
        return adapter.still_rotation is not None and scheme.changes_nothing
    native: Any = base.get_submodule("position_schemes").original
    rotary: Any = native[adapter.rotary] if adapter.rotary in native else adapter.rotary_module(base)
    layer_type = adapter.layer_types(base, base.config)[index]
    factor = getattr(rotary, "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling", 1.0)
    built = frequencies_of(rotary, layer_type)[0]
    if built.is_meta:  # no values to compare
        return scheme.changes_nothing
    # Frequencies that were read from a table of sines and cosines are rounded.
    tolerance = 1e-6 if hasattr(rotary, TABLE) else 0.0
    same = torch.allclose(built.float().cpu(), scheme.inv_freq, rtol=tolerance, atol=tolerance)
    return factor == scheme.attention_scaling and same


def _changes_short_texts(patch: Patch) -> bool:
    """Return whether a rotary model now rotates texts within its trained window in another way than in training."""
    scheme = patch.scheme
    if patch.adapter.native != "rope" or not isinstance(scheme, Rotary) or not scheme.rotates_early:
        return False
    return not all(_rotates_as_built(patch, index) for index in _distinct_layers(patch))


def _trains(patch: Patch) -> bool:
    """Return whether the model is in training mode. A model built without weights is so by default, and does not."""
    weight = next(patch.base.parameters(), None)
    return patch.base.training and weight is not None and not weight.is_meta


def _unchanged_alternative(scheme: Scheme) -> str:
    """Return the schemes that leave short texts as they are, for a warning."""
    first = "factor='auto'" if isinstance(scheme, Scaled) else "'dynamic_yarn'"
    return f"{first}, 'dca' or 'self_extend', which change nothing within that window but run only with pe_patch"


def _gentler(scheme: Scheme) -> str:
    """Return how a scheme that servers read would change short texts less, for a warning; empty if it would not."""
    if scheme.name == "yarn" and "attention_factor" not in scheme.options:
        return " For a server, 'llama3' or attention_factor=1 changes them less."
    return ""


def _announce(patch: Patch) -> None:
    """Log what was patched, and warn if the patch changes nothing or needs training."""
    scheme, adapter = patch.scheme, patch.adapter
    options = ", ".join(f"{key}={value}" for key, value in scheme.recorded.items() if not isinstance(value, list))
    logger.info(
        "patched %d of %d attention layers of %s with %s(%s); trained window: %s",
        len(patch.layers), len(adapter.attentions(patch.base)), type(patch.model).__name__, scheme.name, options,
        patch.window.in_words(patch.composed),
    )  # fmt: skip
    if patch.window.raised:
        logger.warning(
            "max_position_embeddings=%s was written into the config after the model was built for %s tokens. That does "
            "not change the model: its trained window is taken to be %s.",
            patch.window.config_maximum, patch.window.maximum, patch.window.in_words(patch.composed),
        )  # fmt: skip
    if scheme.name != adapter.native and all(_is_native(patch, index) for index in _distinct_layers(patch)):
        logger.warning(
            "%r with these options is what %s already does, so no logit changes.",
            scheme.name,
            type(patch.base).__name__,
        )
    beyond_rotation = scheme.own_scores is not None or scheme.scorer is not None
    rotates = overrides(scheme, "angles") or isinstance(scheme, Rotation)
    same = scheme.name == adapter.native or converts(scheme)
    if adapter.native == "rope" and not same:
        same = rotates and (scheme.training_free or not beyond_rotation)
    if not same:
        verb = "is added to" if patch.keep_native else "replaces"
        logger.warning(
            "%r %s the %r that this %s was trained with; it must be trained before its output means anything.",
            scheme.name, verb, adapter.native, patch.base.config.model_type,
        )  # fmt: skip
    elif not patch.settings.restored and not _trains(patch) and _changes_short_texts(patch):
        logger.warning(
            "%r changes every text, also within the trained window of %s tokens, so an untrained model reads short "
            "texts less well, and a small one may lose its chat. Train it with the scheme, or use %s.%s",
            scheme.name, patch.window.length or "?", _unchanged_alternative(scheme), _gentler(scheme),
        )  # fmt: skip
