"""Build a patch: the schemes of all layers, and every swap that puts them into the model.

This is the only file that knows both schemes and models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from .. import compat
from ..adapters import Adapter
from ..adapters.trained_window import TrainedWindow
from ..attention.interface import Backend, backend_for, check_backend
from ..attention.parallel import check_conversion
from ..core.scheme import AttentionShape, Scheme
from ..core.swaps import GIVEN_UP, Removal, Result, Swap, bind, do_all, do_or_repeat, finally_do
from ..errors import AlreadyPatchedError, OptionError, PePatchError, UnsupportedError
from ..mla.conversion import Conversion, convert, loss, smallest_rank
from ..mla.protocol import ProjectionScheme, converts, replaces_projections, touches_rotation
from ..mla.replacement import native_latent_swaps, no_early_cache, replacement_swaps
from ..schemes.registry import find_scheme
from ..schemes.rope import Rotation
from . import targets
from .compatibility import Plan, check_layer_types, check_modality, make_plan
from .config import SchemeByLayerType, cache_specification, config_swaps, record_of
from .config_copies import ConfigCopy, config_references, copy_configs, models_around, redirect
from .existing import check_effect, settle_existing
from .module_swaps import WithoutInner, at_scores, forward_swaps, native_swaps
from .peft import saving_swaps
from .record import RECORD_KEY

SHAPE_OF_CACHE = "_get_static_cache_init_shape"


@dataclass
class Patch:
    """The changes of one `patch_model` call to one model, stored on the base model."""

    model: PreTrainedModel
    """The outer model, unwrapped; the same as `base` for a bare base model."""
    base: PreTrainedModel
    """The model that holds the layers."""
    path: str
    """Path of `base` inside `model`."""
    adapter: Adapter
    shape: AttentionShape
    """Sizes of the first chosen layer."""
    scheme_by_layer: dict[int, Scheme]
    """The scheme of each chosen layer, by layer index."""
    scheme_by_layer_type: SchemeByLayerType
    keep_native: bool
    """Keep the native positions and add the scheme to them."""
    arguments: dict[str, Any]
    """The arguments of `patch_model` except the scheme and its options."""
    swaps: list[Swap]
    """Every attribute that the patch replaces."""
    frozen: list[nn.Parameter]
    """Native parameters that the patched model does not use; the patch sets `requires_grad=False` on them."""
    configs: list[ConfigCopy]
    """Copies of the configs that the patch changes."""
    window: TrainedWindow = field(default_factory=TrainedWindow)
    """The window that the model was trained for."""
    whole: bool = False
    """All swaps are in place. A patch on a base model with `whole=False` was interrupted."""

    @property
    def layers(self) -> list[int]:
        """Indices of the patched layers."""
        return list(self.scheme_by_layer)

    @property
    def composed(self) -> bool:
        """Return whether the scheme builds on a scaling in the model's config."""
        return self.window.scaled and self.arguments["on_existing"] == "compose"

    @property
    def scheme(self) -> Scheme:
        """The scheme of the first patched layer."""
        return self.scheme_by_layer[self.layers[0]]

    def apply(self) -> None:
        """Apply every swap, or none if one fails."""
        self.put([swap.replacement for swap in self.swaps], [False for _ in self.frozen])

    def put(self, values: list[Any], trainable: list[bool]) -> None:
        """Write a value for each swap and a `requires_grad` for each frozen parameter; undo the patch if that fails.

        The base model refers to the patch before the first write, so that an interrupted patch can be found and undone.

        Raises:
            AlreadyPatchedError: another thread has patched the model.
        """
        try:
            if self.base.__dict__.setdefault("pe_patch", self) is not self:
                raise AlreadyPatchedError("Another patch reached this model first: call unpatch_model(model).")
            for swap, value in zip(self.swaps, values, strict=True):
                swap.put(value)
            for parameter, flag in zip(self.frozen, trainable, strict=True):
                parameter.requires_grad_(flag)
            self.whole = True
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Restore all originals, however many swaps were applied.

        A step that fails does not stop the others; its error is raised at the end.

        Raises:
            PePatchError: `keep_original=False` discarded the original weights.
        """
        if not self.undoable:
            raise PePatchError(
                f"The original weights that {self.scheme.name!r} was computed from were not kept "
                "(keep_original=False), so this patch cannot be undone; load the original model."
            )
        if self.base.__dict__.get("pe_patch") is self:  # else nothing of this patch is in place
            do_or_repeat(self._restore)

    def _restore(self) -> None:
        self.whole = False
        steps = [*(swap.undo for swap in reversed(self.swaps)), *(config.carry_back for config in self.configs)]
        steps += [partial(parameter.requires_grad_, True) for parameter in self.frozen]
        do_all(steps)
        self.base.__dict__.pop("pe_patch", None)

    def renumber(self) -> None:
        """Renumber the patch after layers were removed from the model, so that a save fits the remaining layers.

        Raises:
            UnsupportedError: layers were added or copied.
        """
        attentions = self.adapter.attentions(self.base)
        numbers = [attention.__dict__.get("pe_layer") for attention in attentions]
        if numbers == list(range(len(numbers))) and self.scheme_by_layer.keys() <= set(numbers):
            return
        if None in numbers or len(set(numbers)) < len(numbers):
            raise UnsupportedError(
                f"Layers were added to this model after it was patched with {self.scheme.name!r}, so it cannot be "
                "saved with its patch. Call unpatch_model(model), and patch it again."
            )
        self.scheme_by_layer = {
            index: self.scheme_by_layer[number]
            for index, number in enumerate(numbers)
            if number in self.scheme_by_layer
        }
        for index, attention in enumerate(attentions):
            attention.__dict__["pe_layer"] = index
        module: Any = self.base.get_submodule("position_schemes")
        module.scheme = SchemeList(dict.fromkeys(self.scheme_by_layer.values()))
        for config in (self.model.config, self.base.config):
            record = config.__dict__.get(RECORD_KEY)
            if record is not None and (len(self.scheme_by_layer) < len(numbers) or "layers" in record):
                setattr(config, RECORD_KEY, {**record, "layers": list(self.scheme_by_layer)})

    def while_undone(self, work: Callable[[], Result]) -> Result:
        """Call `work()` on the native model, restore the patch, and return the result."""
        values, trainable = self.current()
        return finally_do(lambda: self.put(values, trainable), lambda: (self.undo(), work())[1])

    def current(self) -> tuple[list[Any], list[bool]]:
        """Return the current values of the swapped attributes, and `requires_grad` of each frozen parameter."""
        return [swap.current() for swap in self.swaps], [parameter.requires_grad for parameter in self.frozen]

    @property
    def undoable(self) -> bool:
        """Return whether all originals were kept."""
        return not any(swap.original is GIVEN_UP for swap in self.swaps)

    def release_originals(self) -> None:
        """Discard the calibration text and, with `keep_original=False`, the original weights.

        Without the original weights the patch cannot be undone.
        """
        for scheme in self.scheme_by_layer.values():
            if isinstance(scheme, ProjectionScheme):  # else every copy of the model would hold the text
                scheme.calibration = None
                scheme.options.pop("calibration", None)
        if isinstance(self.scheme, ProjectionScheme) and not self.scheme.keep_original:
            swaps = [replace(swap, original=GIVEN_UP) if isinstance(swap, Removal) else swap for swap in self.swaps]
            self.swaps = swaps  # in one step: an interrupt leaves all originals or none


class PositionSchemes(nn.ModuleDict):
    """The schemes of a patched model and the native modules that they replaced.

    The base model registers it, so that each scheme is registered once. It is a ModuleDict because PEFT refuses one in
    `modules_to_save`: PEFT would train a copy that no layer reads.
    """

    def __init__(self, schemes: Iterable[Scheme], original: dict[str, nn.Module]) -> None:
        super().__init__({"scheme": SchemeList(schemes), "original": nn.ModuleDict(original)})


class SchemeList(nn.ModuleList):
    """The schemes of a patched model. PEFT refuses the list in `modules_to_save`, and the list refuses it an entry."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            OptionError: PEFT replaces a scheme by a copy to train.
        """
        if isinstance(value, nn.Module) and isinstance(getattr(value, "original_module", None), Scheme):
            raise OptionError(
                "modules_to_save names a scheme of pe_patch, and the copy that PEFT would train would have no effect. "
                "Leave it out, and call pe_patch.patching.peft_record.train_scheme(model) after get_peft_model: the "
                "scheme's weights then train in place and are saved with the adapter."
            )
        super().__setattr__(name, value)


def _build(
    cls: type[Scheme], base: PreTrainedModel, adapter: Adapter, chosen: list[int], options: dict[str, Any]
) -> dict[int, Scheme]:
    """Return the scheme of each chosen layer.

    Layers share one scheme, except that a rotary scheme needs one for each shape and a `per_layer`
    scheme one for each layer.
    """
    layer_types = adapter.layer_types(base, base.config)
    shapes: dict[str | None, AttentionShape] = {}
    schemes: dict[Any, Scheme] = {}
    scheme_by_layer: dict[int, Scheme] = {}
    for index in chosen:
        layer_type = layer_types[index]
        if layer_type not in shapes:
            shapes[layer_type] = adapter.shape(base, base.config, index)
        key = index if cls.per_layer else shapes[layer_type] if issubclass(cls, Rotation) else None
        if key not in schemes:
            schemes[key] = cls(shapes[layer_type], **options).to(*targets.device_and_dtype(base)).train(base.training)
        scheme_by_layer[index] = schemes[key]
    return scheme_by_layer


def collect(model: PreTrainedModel, scheme: Any, options: dict[str, Any], given: dict[str, Any]) -> Patch:
    """Return the patch of a model, without applying it. Every check runs here.

    Args:
        model: the unwrapped model.
        scheme: as for `patch_model`.
        options: options of the scheme.
        given: the other arguments of `patch_model`.

    Raises:
        PePatchError: the patch is not possible.
    """
    path, base = targets.find_stack(model, given["submodule"], given["adapter"])
    config = base.config
    adapter = targets.find_adapter(base, given["adapter"])
    attentions, layer_types = adapter.attentions(base), adapter.layer_types(base, config)
    chosen = targets.find_layers(given["layers"], len(attentions))
    shape = adapter.shape(base, config, chosen[0])
    cls, options = find_scheme(scheme, options, shape)
    check_modality(adapter, cls, config)
    if converts(cls):
        check_conversion(attentions[chosen[0]], cls.name)
    window = adapter.window(base, config, chosen[0])
    if touches_rotation(cls, options):
        options, window = settle_existing(base, adapter, cls, options, given["on_existing"], chosen)
    scheme_by_layer = _build(cls, base, adapter, chosen, options)
    if given["on_existing"] == "compose" and window.scaled:
        check_effect(scheme_by_layer.values(), window)
    schemes, scheme_by_layer_type = (
        list(dict.fromkeys(scheme_by_layer.values())),
        {layer_types[index]: scheme_by_layer[index] for index in chosen},
    )
    for scheme in schemes:
        if isinstance(scheme, ProjectionScheme):
            scheme.restored = given.get("restored", False)
    plan = make_plan(adapter, schemes[0], given["keep_native"], chosen, len(attentions))
    check_layer_types(scheme_by_layer_type, plan, given["layers"] is None)
    backend = _backend(given["backend"], base, adapter, schemes[0])
    conversion = Conversion({})
    if replaces_projections(schemes[0]):
        conversion = convert(model, base, adapter, scheme_by_layer)

    def assemble(modules: dict[int, nn.Module]) -> Patch:
        patch = _assemble(model, path, adapter, scheme_by_layer, plan, backend, modules, given)
        patch.window = window
        return patch

    if not conversion.latents:
        return assemble(conversion.modules)
    return _narrowest(model, scheme_by_layer, conversion, assemble)


def _narrowest(
    model: PreTrainedModel, scheme_by_layer: dict[int, Any], conversion: Conversion, assemble: Callable[..., Patch]
) -> Patch:
    """Return the patch with the smallest latent rank that keeps the loss on held-out tokens within `loss_bound`."""
    scheme = next(iter(scheme_by_layer.values()))
    before = loss(model, conversion.rows)

    def loss_at(rank: int) -> float:
        patch = assemble(conversion.at(scheme_by_layer, rank))

        def patched_loss() -> float:
            patch.apply()
            return loss(model, conversion.rows)

        return finally_do(patch.undo, patched_loss)

    rank = smallest_rank(scheme.rank, before * (1 + scheme.loss_bound), loss_at)
    return assemble(conversion.at(scheme_by_layer, rank))


def _assemble(
    model: PreTrainedModel,
    path: str,
    adapter: Adapter,
    scheme_by_layer: dict[int, Scheme],
    plan: Plan,
    backend: Backend,
    modules: dict[int, nn.Module],
    given: dict[str, Any],
) -> Patch:
    """Return the patch for built schemes; `modules` replace the attention of a layer, for schemes that convert it."""
    base = model.get_submodule(path)
    assert isinstance(base, PreTrainedModel)
    config, attentions, layer_types = base.config, adapter.attentions(base), adapter.layer_types(base, base.config)
    models = [model, *models_around(model)]
    configs = copy_configs(base, models)
    schemes, chosen = list(dict.fromkeys(scheme_by_layer.values())), list(scheme_by_layer)
    scheme_by_layer_type: SchemeByLayerType = {layer_types[index]: scheme_by_layer[index] for index in chosen}
    shape = adapter.shape(base, config, chosen[0])
    native, original = native_swaps(base, adapter, scheme_by_layer, plan, given["keep_native"])
    swaps = list(native)
    if modules:
        arguments = compat.argument_names(type(attentions[chosen[0]]).forward)
        replacing, replaced = replacement_swaps(attentions, adapter, schemes[0], modules, arguments)
        original |= replaced if cast(ProjectionScheme, schemes[0]).keep_original else {}
        swaps += replacing
        if hasattr(model, SHAPE_OF_CACHE):
            swaps.append(bind(model, SHAPE_OF_CACHE, no_early_cache))
    elif converts(schemes[0]):
        swaps += native_latent_swaps({index: attentions[index] for index in scheme_by_layer}, schemes[0])
    scores = at_scores(adapter, scheme_by_layer, plan, given["keep_native"], attentions)
    for index, (attention, layer_scheme) in enumerate(zip(attentions, scores, strict=True)):
        swaps.append(Swap.of(attention, "pe_scheme", layer_scheme, direct=True))
        swaps.append(Swap.of(attention, "pe_layer", index, direct=True))
        if adapter.forward is not None:
            config_copy = next(each.copy for each in configs if each.original is config)
            swaps.append(Swap.of(attention, "pe_config", config_copy, direct=True))
            swaps.append(bind(attention, "forward", WithoutInner(adapter.forward)))
    record = record_of(schemes[0], chosen if len(chosen) < len(attentions) else None, given)
    swaps += forward_swaps(
        model, base, adapter, scheme_by_layer, plan, scores, given["strict"], given["keep_native"],
        cache_specification(config, record, scheme_by_layer_type), native,
    )  # fmt: skip
    swaps.append(Swap.of(base, "position_schemes", PositionSchemes(schemes, original).train(base.training)))
    swaps += redirect(config_swaps(model, base, adapter, scheme_by_layer_type, record, backend.implementation), configs)
    taken = {(id(swap.owner), swap.attribute) for swap in swaps}  # some modules get a different config on purpose
    swaps += [swap for swap in config_references(models, configs) if (id(swap.owner), swap.attribute) not in taken]
    swaps += saving_swaps(model, base)
    frozen = [p for module in original.values() for p in module.parameters() if p.requires_grad]
    if adapter.tower is not None and not given["keep_native"]:
        table = adapter.tower.native_table(base)
        frozen += [table] if table.requires_grad else []
    return Patch(
        model,
        base,
        path,
        adapter,
        shape,
        scheme_by_layer,
        scheme_by_layer_type,
        given["keep_native"],
        given,
        swaps,
        frozen,
        configs,
    )


def _backend(name: str | None, base: PreTrainedModel, adapter: Adapter, scheme: Scheme) -> Backend:
    """Return the backend with this name, or the default one, once it supports the scheme."""
    # A family with a `forward` (BLOOM) has only an eager attention in Transformers; this library's has SDPA too.
    native = base.config._attn_implementation if adapter.forward is None else "sdpa"
    backend = backend_for(name or native)
    check_backend(backend, scheme)
    return backend
