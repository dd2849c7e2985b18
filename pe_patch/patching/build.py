"""What changes when a scheme meets a model: the only file that knows both sides."""

from __future__ import annotations

from collections.abc import Callable
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
from ..errors import AlreadyPatchedError, PePatchError, UnsupportedError
from ..mla.conversion import Conversion, convert, loss, smallest_rank
from ..mla.protocol import ProjectionScheme, converts, replaces_projections, touches_rotation
from ..mla.replacement import native_latent_swaps, no_early_cache, replacement_swaps
from ..schemes.registry import find_scheme
from ..schemes.rope import Rotation
from . import targets
from .compatibility import Plan, check_kinds, check_tower, make_plan
from .config import Kinds, cache_specification, config_swaps, record_of
from .config_copies import ConfigCopy, config_references, copy_configs, models_around, redirect
from .existing import check_effect, settle_existing
from .module_swaps import WithoutInner, at_scores, forward_swaps, native_swaps
from .peft import head_swaps
from .record import FOREIGN

SHAPE_OF_CACHE = "_get_static_cache_init_shape"


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
    configs: list[ConfigCopy]
    window: TrainedWindow = field(default_factory=TrainedWindow)
    """The window that the model was trained for."""
    whole: bool = False
    """Whether every swap is in place. A patch that the base model carries and that is not whole was interrupted."""

    @property
    def layers(self) -> list[int]:
        return list(self.own)

    @property
    def composed(self) -> bool:
        """Whether the scheme builds on a scaling that the model's config carries."""
        return self.window.scaled and self.arguments["on_existing"] == "compose"

    @property
    def scheme(self) -> Scheme:
        return self.own[self.layers[0]]

    def apply(self) -> None:
        """Make every swap, or none if one fails."""
        self.put([swap.replacement for swap in self.swaps], [False for _ in self.frozen])

    def put(self, values: list[Any], trainable: list[bool]) -> None:
        """Write the values of all swaps; the base model carries the patch from before the first to after the last."""
        try:
            if self.base.__dict__.setdefault("pe_patch", self) is not self:
                raise AlreadyPatchedError("Another patch reached this model first: unpatch_model(model) takes it out.")
            for swap, value in zip(self.swaps, values, strict=True):
                swap.put(value)
            for parameter, flag in zip(self.frozen, trainable, strict=True):
                parameter.requires_grad_(flag)
            self.whole = True
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put everything back, however much of it was done; what fails is raised once all else is back."""
        if not self.undoable:
            raise PePatchError(
                f"The weights that {self.scheme.name!r} was made of were not kept (keep_original=False), so this patch "
                "cannot be undone; load the original model."
            )
        if self.base.__dict__.get("pe_patch") is self:  # else nothing of this patch is in place
            do_or_repeat(self._take_out)

    def _take_out(self) -> None:
        self.whole = False
        steps = [*(swap.undo for swap in reversed(self.swaps)), *(config.carry_back for config in self.configs)]
        steps += [partial(parameter.requires_grad_, True) for parameter in self.frozen]
        do_all(steps)
        self.base.__dict__.pop("pe_patch", None)

    def renumber(self) -> None:
        """Follow layers that were taken out of the model since, so that what is saved fits the layers that remain.

        Raises:
            UnsupportedError: layers were put in, or copied.
        """
        attentions = self.adapter.attentions(self.base)
        numbers = [attention.__dict__.get("pe_layer") for attention in attentions]
        if numbers == list(range(len(numbers))) and self.own.keys() <= set(numbers):
            return
        if None in numbers or len(set(numbers)) < len(numbers):
            raise UnsupportedError(
                f"Layers were added to this model after {self.scheme.name!r} was patched in, so it cannot be saved "
                "with its patch: unpatch_model(model), and patch it again."
            )
        self.own = {index: self.own[number] for index, number in enumerate(numbers) if number in self.own}
        for index, attention in enumerate(attentions):
            attention.__dict__["pe_layer"] = index
        module: Any = self.base.get_submodule("position_schemes")
        module.scheme = nn.ModuleList(dict.fromkeys(self.own.values()))
        for config in (self.head.config, self.base.config):
            record = config.__dict__.get(FOREIGN)
            if record is not None and (len(self.own) < len(numbers) or "layers" in record):
                setattr(config, FOREIGN, {**record, "layers": list(self.own)})

    def while_undone(self, work: Callable[[], Result]) -> Result:
        """Return `work()` of the native model; afterwards everything is as it was under the patch."""
        values, trainable = self.current()
        return finally_do(lambda: self.put(values, trainable), lambda: (self.undo(), work())[1])

    def current(self) -> tuple[list[Any], list[bool]]:
        """What the swapped attributes hold now, and which of the frozen parameters are trainable."""
        return [swap.current() for swap in self.swaps], [parameter.requires_grad for parameter in self.frozen]

    @property
    def undoable(self) -> bool:
        """Whether everything that was replaced is still there."""
        return not any(swap.original is GIVEN_UP for swap in self.swaps)

    def settle(self) -> None:
        """Discard what was not to be kept; afterwards there may be no way back."""
        for scheme in self.own.values():
            if isinstance(scheme, ProjectionScheme):  # else the text would travel with every copy of the model
                scheme.calibration = None
                scheme.options.pop("calibration", None)
        if isinstance(self.scheme, ProjectionScheme) and not self.scheme.keep_original:
            given_up = [replace(swap, original=GIVEN_UP) if isinstance(swap, Removal) else swap for swap in self.swaps]
            self.swaps = given_up  # in one step: an interrupt leaves all originals or none


class PositionSchemes(nn.Module):
    """The schemes of a patched model, and the native modules that they replaced, registered once on the base model."""

    def __init__(self, schemes: list[Scheme], original: dict[str, nn.Module]) -> None:
        super().__init__()
        self.scheme = nn.ModuleList(schemes)
        self.original = nn.ModuleDict(original)


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
            made[key] = cls(shapes[kind], **options).to(*targets.home(base)).train(base.training)
        own[index] = made[key]
    return own


def collect(head: PreTrainedModel, scheme: Any, options: dict[str, Any], given: dict[str, Any]) -> Patch:
    """Everything that will change, with nothing changed yet; every error is raised here."""
    path, base = targets.find_stack(head, given["submodule"], given["adapter"])
    config = base.config
    adapter = targets.find_adapter(base, given["adapter"])
    attentions, kinds = adapter.attentions(base), adapter.kinds(base, config)
    chosen = targets.find_layers(given["layers"], len(attentions))
    shape = adapter.shape(base, config, chosen[0])
    cls, options = find_scheme(scheme, options, shape)
    check_tower(adapter, cls, config)
    if converts(cls):
        check_conversion(attentions[chosen[0]], cls.name)
    window = adapter.window(base, config, chosen[0])
    if touches_rotation(cls, options):
        options, window = settle_existing(base, adapter, cls, options, given["on_existing"], chosen)
    own = _build(cls, base, adapter, chosen, options)
    if given["on_existing"] == "compose" and window.scaled:
        check_effect(own.values(), window)
    schemes, by_kind = list(dict.fromkeys(own.values())), {kinds[index]: own[index] for index in chosen}
    for scheme in schemes:
        if isinstance(scheme, ProjectionScheme):
            scheme.restored = given.get("restored", False)
    plan = make_plan(adapter, schemes[0], given["keep_native"], chosen, len(attentions))
    check_kinds(by_kind, plan, given["layers"] is None)
    backend = _backend(given["backend"], base, adapter, schemes[0])
    found = Conversion({})
    if replaces_projections(schemes[0]):
        found = convert(head, base, adapter, own)

    def assemble(modules: dict[int, nn.Module]) -> Patch:
        patch = _assemble(head, path, adapter, own, plan, backend, modules, given)
        patch.window = window
        return patch

    if not found.latents:
        return assemble(found.modules)
    return _narrowest(head, adapter, own, found, assemble)


def _narrowest(
    head: PreTrainedModel, adapter: Adapter, own: dict[int, Any], found: Conversion, assemble: Callable[..., Patch]
) -> Patch:
    """The patch whose latents are as narrow as the loss on held-out tokens allows."""
    scheme = next(iter(own.values()))
    before = loss(head, found.rows)

    def loss_at(rank: int) -> float:
        patch = assemble(found.at(own, rank))

        def patched_loss() -> float:
            patch.apply()
            return loss(head, found.rows)

        return finally_do(patch.undo, patched_loss)

    rank = smallest_rank(scheme.rank, before * (1 + scheme.loss_bound), loss_at)
    return assemble(found.at(own, rank))


def _assemble(
    head: PreTrainedModel,
    path: str,
    adapter: Adapter,
    own: dict[int, Scheme],
    plan: Plan,
    backend: Backend,
    modules: dict[int, nn.Module],
    given: dict[str, Any],
) -> Patch:
    """The patch of schemes that were built, with the modules that some of them put in."""
    base = head.get_submodule(path)
    assert isinstance(base, PreTrainedModel)
    config, attentions, kinds = base.config, adapter.attentions(base), adapter.kinds(base, base.config)
    models = [head, *models_around(head)]
    configs = copy_configs(base, models)
    schemes, chosen = list(dict.fromkeys(own.values())), list(own)
    by_kind: Kinds = {kinds[index]: own[index] for index in chosen}
    shape = adapter.shape(base, config, chosen[0])
    native, original = native_swaps(base, adapter, own, plan, given["keep_native"])
    swaps = list(native)
    if modules:
        arguments = compat.argument_names(type(attentions[chosen[0]]).forward)
        replacing, replaced = replacement_swaps(attentions, adapter, schemes[0], modules, arguments)
        original |= replaced if cast(ProjectionScheme, schemes[0]).keep_original else {}
        swaps += replacing
        if hasattr(head, SHAPE_OF_CACHE):
            swaps.append(bind(head, SHAPE_OF_CACHE, no_early_cache))
    elif converts(schemes[0]):
        swaps += native_latent_swaps({index: attentions[index] for index in own}, schemes[0])
    scores = at_scores(adapter, own, plan, given["keep_native"], attentions)
    for index, (attention, layer_scheme) in enumerate(zip(attentions, scores, strict=True)):
        swaps.append(Swap.of(attention, "pe_scheme", layer_scheme, direct=True))
        swaps.append(Swap.of(attention, "pe_layer", index, direct=True))
        if adapter.forward is not None:
            own_config = next(each.copy for each in configs if each.original is config)
            swaps.append(Swap.of(attention, "pe_config", own_config, direct=True))
            swaps.append(bind(attention, "forward", WithoutInner(adapter.forward)))
    record = record_of(schemes[0], chosen if len(chosen) < len(attentions) else None, given)
    swaps += forward_swaps(
        head, base, adapter, own, plan, scores, given["strict"], given["keep_native"],
        cache_specification(config, record, by_kind), native,
    )  # fmt: skip
    swaps.append(Swap.of(base, "position_schemes", PositionSchemes(schemes, original).train(base.training)))
    swaps += redirect(config_swaps(head, base, adapter, by_kind, record, backend.implementation), configs)
    taken = {(id(swap.owner), swap.attribute) for swap in swaps}  # some modules are given another config on purpose
    swaps += [swap for swap in config_references(models, configs) if (id(swap.owner), swap.attribute) not in taken]
    swaps += head_swaps(head, base)
    frozen = [p for module in original.values() for p in module.parameters() if p.requires_grad]
    if adapter.tower is not None and not given["keep_native"]:
        table = adapter.tower.native_table(base)
        frozen += [table] if table.requires_grad else []
    return Patch(head, base, path, adapter, shape, own, by_kind, given["keep_native"], given, swaps, frozen, configs)


def _backend(name: str | None, base: PreTrainedModel, adapter: Adapter, scheme: Scheme) -> Backend:
    own = base.config._attn_implementation if adapter.forward is None else "sdpa"  # ours lifts BLOOM's limit to eager
    backend = backend_for(name or own)
    check_backend(backend, scheme)
    return backend
