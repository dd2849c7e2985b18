"""The changes of one `patch_model` call, applied and undone as a whole, and the lock of a model that changes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..adapters import Adapter
from ..adapters.trained_window import TrainedWindow
from ..core.scheme import AttentionShape, Scheme
from ..core.swaps import RELEASED, Removal, Result, Swap, do_all, do_or_repeat, finally_do
from ..errors import AlreadyPatchedError, OptionError, PePatchError, UnsupportedError
from ..mla.protocol import ProjectionScheme
from .config import ConfigCopy, SchemeByLayerType
from .record import RECORD_KEY
from .targets import Layers


@dataclass(frozen=True)
class Settings:
    """The arguments of `patch_model` except the scheme and its options."""

    on_existing: str = "error"
    backend: str | None = None
    adapter: Adapter | None = None
    layers: Layers = None
    submodule: str | None = None
    keep_native: bool = False
    strict: bool = False
    key_copies: bool = True
    restored: bool = False
    """The patch comes from a checkpoint: converted weights are loaded from there, not computed."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `patch_model`, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "restored"}


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
    settings: Settings
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
    def keep_native(self) -> bool:
        """Return whether the native positions remain and the scheme adds to them."""
        return self.settings.keep_native

    @property
    def composed(self) -> bool:
        """Return whether the scheme builds on a scaling in the model's config."""
        return self.window.scaled and self.settings.on_existing == "compose"

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
        numbers = {index: attention.__dict__.get("pe_layer") for index, attention in attentions.items()}
        before = set(numbers.values())
        if list(numbers) == list(numbers.values()) and self.scheme_by_layer.keys() <= before:
            return
        if None in before or len(before) < len(numbers):
            raise UnsupportedError(
                f"Layers were added to this model after it was patched with {self.scheme.name!r}, so it cannot be "
                "saved with its patch. Call unpatch_model(model), and patch it again."
            )
        self.scheme_by_layer = {
            index: self.scheme_by_layer[number] for index, number in numbers.items() if number in self.scheme_by_layer
        }
        for index, attention in attentions.items():
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
        return not any(swap.original is RELEASED for swap in self.swaps)

    def release_originals(self) -> None:
        """Discard the calibration text and, with `keep_original=False`, the original weights.

        Without the original weights the patch cannot be undone.
        """
        for scheme in self.scheme_by_layer.values():
            if isinstance(scheme, ProjectionScheme):  # else every copy of the model would hold the text
                scheme.calibration = None
                scheme.options.pop("calibration", None)
        if isinstance(self.scheme, ProjectionScheme) and not self.scheme.keep_original:
            swaps = [replace(swap, original=RELEASED) if isinstance(swap, Removal) else swap for swap in self.swaps]
            self.swaps = swaps  # in one step: an interrupt leaves all originals or none


class PositionSchemes(nn.ModuleDict):
    """The schemes of a patched model and the native modules that they replaced.

    The base model registers it, so that each scheme is registered once. It is a ModuleDict because PEFT refuses one in
    `modules_to_save`: PEFT would train a copy that no layer reads.
    """

    def __init__(self, schemes: Iterable[Scheme], original: dict[str, nn.Module]) -> None:
        super().__init__({"scheme": SchemeList(schemes), "original": nn.ModuleDict(original)})


class SchemeList(nn.ModuleList):
    """The schemes of a patched model.

    PEFT refuses to train the list as a whole, and the list refuses to let PEFT replace one scheme by a copy to train.
    """

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


class ModelLock:
    """A context in which only this thread may change a model.

    Claims are kept beside the models, not on them, so that an interrupt leaves nothing behind. A claim ends with the
    call that made it, even if that call could not release it. Every step is one atomic operation of a dict.

    Raises:
        AlreadyPatchedError: another thread is changing the model.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.released = model, False

    def __enter__(self) -> ModelLock:
        if not _claim(self.model, self):
            raise self._refusal()
        try:  # another thread may hold a reference to a model inside this one
            inner = [module for module in self.model.modules() if isinstance(module, PreTrainedModel)]
        except RuntimeError as error:  # another thread adds or removes submodules during the iteration
            raise self._refusal() from error
        if not all(_claim(model, self) for model in inner if model is not self.model):
            raise self._refusal()
        return self

    def _refusal(self) -> AlreadyPatchedError:
        self.released = True
        return AlreadyPatchedError(
            f"Another thread is patching or unpatching this {type(self.model).__name__} now. Patch a model from one "
            "thread, or give each thread a copy (copy.deepcopy)."
        )

    def __exit__(self, *_: Any) -> None:
        self.released = True


class _Claim:
    def __init__(self, lock: ModelLock) -> None:
        self.lock, self.thread = weakref.ref(lock), threading.get_ident()

    @property
    def held_elsewhere(self) -> bool:
        """Return whether another thread holds this claim."""
        lock = self.lock()
        return lock is not None and not lock.released and self.thread != threading.get_ident()


_LATEST: weakref.WeakKeyDictionary[Any, _Claim] = weakref.WeakKeyDictionary()
"""A claim for each model; following `next` from it reaches the latest one."""


def _claim(model: Any, lock: ModelLock) -> bool:
    """Append a claim and return True, or return False if another thread holds the latest one."""
    mine = _Claim(lock)
    latest = _LATEST.setdefault(model, mine)
    while latest is not mine:
        if latest.held_elsewhere:
            return False
        latest = vars(latest).setdefault("next", mine)
    _LATEST[model] = mine
    return True
