"""The verbs: patch a model, undo it, do both for the length of a block."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.adapter import RotaryJoint, TypedJoint, frequencies_of
from ..core.checks import check_choice, check_flag
from ..core.scheme import Scheme, overrides
from ..core.swaps import Swap, with_swaps
from ..errors import AlreadyPatchedError, NoEffectError, OptionError, PePatchError
from ..mla.protocol import converts
from ..schemes.rope import Rotation
from . import targets
from .build import Patch, collect
from .existing import EXISTING
from .peft import wrapper_swaps
from .probe import prove
from .targets import Layers
from .turns import Turn

logger = logging.getLogger("pe_patch")

Model = TypeVar("Model")


def find_patch(model: Any) -> Patch | None:
    """The patch that a model (or whatever wraps it) carries, or None; one that was interrupted is not `whole`."""
    head = targets.unwrap(model)
    return next((m.__dict__["pe_patch"] for m in head.modules() if "pe_patch" in m.__dict__), None)


def patch_model(
    model: Model,
    scheme: str | Scheme | type[Scheme] | Mapping[str, Any],
    *,
    on_existing: str = "error",
    backend: str | None = None,
    adapter: Adapter | None = None,
    layers: Layers = None,
    submodule: str | None = None,
    keep_native: bool = False,
    strict: bool = False,
    **options: Any,
) -> Model:
    """Replace the positional logic of a loaded model, in place, and return it.

    Args:
        model: a PreTrainedModel, or a PEFT, accelerate or torch.compile wrapper round one.
        scheme: a scheme with its options such as `YaRN(factor=4)`, a name in `SCHEMES` or `ALIASES`, a `Scheme` class,
            or a dict in any known config format.
        on_existing: what to do about a scaling in the config or an earlier patch: "error", "replace" (start again from
            the original window and theta) or "compose" (only where that means something).
        backend: "eager", "sdpa", "flex" or "flash"; None follows the model's own attention, and where the family has
            only an eager one, takes "sdpa".
        adapter: how to reach into a family that is not in `ADAPTERS`.
        layers: indices, a slice or a predicate of the layers to patch; the others keep their native positions.
        submodule: which attention stack of a model that has several.
        keep_native: add to the native positions rather than replace them.
        strict: make a sequence beyond the effective window an error rather than a warning.
        **options: the scheme's own.

    Raises:
        PePatchError: in one of its kinds, before anything was changed.
    """
    check_choice("patch_model", "on_existing", on_existing, EXISTING)
    check_flag("patch_model", "keep_native", keep_native)
    check_flag("patch_model", "strict", strict)
    given = {"on_existing": on_existing, "backend": backend, "adapter": adapter, "layers": layers}
    given |= {"submodule": submodule, "keep_native": keep_native, "strict": strict}
    _apply(model, scheme, options, given)
    return model


def restore_patch(model: Any, scheme: str, options: dict[str, Any], given: dict[str, Any]) -> None:
    """`patch_model` for a model that was saved with this patch: what its weights were made of is not there any more."""
    defaults = {"backend": None, "adapter": None, "layers": None, "submodule": None, "keep_native": False}
    given = {"on_existing": "replace", **defaults, "strict": False, **given, "restored": True}
    _apply(model, scheme, options, given)


def _apply(model: Any, scheme: Any, options: dict[str, Any], given: dict[str, Any]) -> None:
    """Patch the model as a whole, or leave it as it was: native or under the earlier patch."""
    head = targets.unwrap(model)
    with Turn(head):
        earlier = _earlier(head, given["on_existing"])
        if earlier is None:
            _apply_to_native(model, head, scheme, options, given)
            return
        state = earlier.current()
        try:
            earlier.undo()
            _apply_to_native(model, head, scheme, options, given)
        except BaseException:
            found = find_patch(head)
            if found is None or found is earlier:
                earlier.put(*state)
            raise


def _earlier(head: Any, on_existing: str) -> Patch | None:
    """The patch to be replaced, or None. One that was interrupted is taken out first."""
    earlier = find_patch(head)
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


def _apply_to_native(model: Any, head: Any, scheme: Any, options: dict[str, Any], given: dict[str, Any]) -> None:
    try:
        patch = collect(head, scheme, options, given)
        users_adapter = targets.must_prove(patch.base, given["adapter"])
        if users_adapter:
            prove(patch)
        patch.swaps += wrapper_swaps(model)
        patch.apply()
        _verify(patch, probe=users_adapter)
        _announce(patch)
        patch.settle()
    except BaseException:
        found = find_patch(head)
        if found is not None and found.undoable:  # else the interrupt came after the last step
            found.undo()
        raise


def unpatch_model(model: Any) -> Any:
    """Give the model back, bit for bit, what it had; returns the same object.

    Where an earlier call was interrupted, this one finishes its work.
    """
    head = targets.unwrap(model)
    with Turn(head):
        patch = find_patch(head)
        if patch is None:
            raise PePatchError("This model carries no patch.")
        patch.undo()
    return model


@contextmanager
def patched(model: Any, scheme: str | type[Scheme] | dict[str, Any], **arguments: Any) -> Iterator[Any]:
    """`patch_model` for the length of a `with` block, undone also after an exception.

    Under `on_existing="replace"` a patch that the model carried before is back afterwards.
    """
    if arguments.get("keep_original") is False:
        raise OptionError(
            "keep_original=False cannot be undone, and patched() undoes: leave it out, or use patch_model."
        )
    before, failed = find_patch(model), False
    state = before.current() if before is not None and before.whole else None

    def undo() -> None:
        head = targets.unwrap(model)
        if failed or find_patch(head) is before:
            return
        with Turn(head):
            patch = find_patch(head)
            if patch is not None:
                patch.undo()
            if before is not None and state is not None:
                before.put(*state)

    try:
        try:
            try:
                patch_model(model, scheme, **arguments)
            except Exception:  # the model is as it was, or another thread has patched it since
                failed = True
                raise
            yield model
        finally:
            undo()
    except BaseException:  # an interrupt on the way back
        undo()
        raise


def _verify(patch: Patch, probe: bool) -> None:
    """Raise `NoEffectError` unless every chosen layer is under the scheme; with a new adapter, by running it once."""
    base, adapter, converted = patch.base, patch.adapter, converts(patch.scheme)
    for index in patch.layers if converted else ():
        if not hasattr(adapter.attentions(base)[index], patch.scheme.name):
            raise NoEffectError(f"Layer {index} of {type(base).__name__} was not replaced by {patch.scheme.name!r}.")
    rotary = overrides(patch.scheme, "angles") or not converted
    if adapter.rotary is not None and not patch.keep_native and rotary:
        kinds, layers = adapter.kinds(base, base.config), adapter.blocks(base)
        for index in patch.layers:
            joint = layers[index].__dict__.get("pe_joint", getattr(base, adapter.rotary))
            joint = joint.joints[str(kinds[index])] if isinstance(joint, TypedJoint) else joint
            own = patch.own[index] if patch.own[index].rotates_early else None
            if not isinstance(joint, RotaryJoint) or joint.__dict__["scheme"] is not own:
                raise NoEffectError(f"Layer {index} of {type(base).__name__} does not turn by {patch.scheme.name!r}.")
    if not probe:
        return
    attentions = adapter.attentions(base)
    reached: list[tuple[nn.Module, Any]] = []

    @torch.no_grad()
    def run() -> None:
        ids = torch.ones(1, 3, dtype=torch.long, device=base.device)
        base(input_ids=ids, use_cache=False)

    with_swaps([Swap.of(attention, "pe_probe", reached, direct=True) for attention in attentions], run)
    for index in patch.layers:
        if not any(module is attentions[index] for module, _ in reached):
            raise NoEffectError(
                f"Layer {index} ({type(attentions[index]).__name__}) does not call the attention interface, so "
                f"{patch.scheme.name!r} would have no effect there; the adapter needs a `forward` for this family."
            )


def _is_native(patch: Patch, index: int) -> bool:
    """Whether a layer turns as it did before the patch."""
    base, adapter, scheme = patch.base, patch.adapter, patch.own[index]
    if adapter.rotary is None or not isinstance(scheme, Rotation) or not scheme.changes_nothing:
        return False
    native: Any = base.get_submodule("position_schemes").original
    rotary: Any = native[adapter.rotary] if adapter.rotary in native else getattr(base, adapter.rotary)
    kind = adapter.kinds(base, base.config)[index]
    factor = getattr(rotary, "attention_scaling" if kind is None else f"{kind}_attention_scaling", 1.0)
    return factor == 1 and torch.equal(frequencies_of(rotary, kind)[0].cpu(), scheme.inv_freq)


def _announce(patch: Patch) -> None:
    scheme, adapter = patch.scheme, patch.adapter
    options = ", ".join(f"{key}={value}" for key, value in scheme.recorded.items() if not isinstance(value, list))
    logger.info(
        "patched %d of %d layers of %s with %s(%s); trained window: %s",
        len(patch.layers), patch.shape.num_layers, type(patch.head).__name__, scheme.name, options,
        patch.window.in_words(patch.composed),
    )  # fmt: skip
    if patch.window.raised:
        logger.warning(
            "max_position_embeddings=%s was written into the config after the model was built for %s tokens, which "
            "changes nothing in it: the trained window is taken to be %s.",
            patch.window.config_maximum, patch.window.maximum, patch.window.in_words(patch.composed),
        )  # fmt: skip
    if scheme.name != adapter.native and all(_is_native(patch, index) for index in patch.layers):
        logger.warning(
            "%r with these options is what %s does already, so no logit changes.",
            scheme.name,
            type(patch.base).__name__,
        )
    beyond_rotation = scheme.own_scores or scheme.scorer is not None
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
