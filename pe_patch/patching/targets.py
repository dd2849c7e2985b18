"""Resolve the arguments of a user: the attention stack, its adapter and the layers to patch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from .. import compat
from ..adapters import ADAPTERS, Adapter
from ..adapters.check import check_adapter
from ..adapters.inferred import INFERRED
from ..adapters.trained_window import TrainedWindow
from ..core.scheme import AttentionShape
from ..errors import OptionValueError, PePatchError, UnknownNameError, UnsupportedError, nearest, quoted, unknown

Layers = Iterable[int] | slice | Callable[[int], bool] | None


@dataclass
class Target:
    """The layers that a patch changes, with all that their family's adapter says about them."""

    model: PreTrainedModel
    """The outer model, unwrapped; the same as `base` for a bare base model."""
    path: str
    """Path of `base` inside `model`."""
    base: PreTrainedModel
    """The model that holds the layers."""
    adapter: Adapter
    attentions: dict[int, nn.Module]
    """The attention of every layer that has one, by layer index."""
    layer_types: list[str | None]
    """The type of every layer; None in a family whose layers share their frequencies."""
    layers: list[int]
    """Indices of the chosen layers."""
    users_adapter: bool
    """The adapter comes from a user, given or registered, so that it must be checked by a run."""
    _windows: dict[str | None, TrainedWindow] = field(default_factory=dict)
    _shapes: dict[str | None, AttentionShape] = field(default_factory=dict)

    @property
    def everywhere(self) -> bool:
        """Return whether all layers that attend were chosen."""
        return len(self.layers) == len(self.attentions)

    @property
    def chosen_types(self) -> list[str | None]:
        """The types of the chosen layers, each once."""
        return list(dict.fromkeys(self.layer_types[index] for index in self.layers))

    def window(self, layer: int) -> TrainedWindow:
        """Return the window that the model was trained for, according to the scaling of a layer."""
        layer_type = self.layer_types[layer]
        if layer_type not in self._windows:
            self._windows[layer_type] = self.adapter.window(self.base, self.base.config, layer)
        return self._windows[layer_type]

    def shape(self, layer: int) -> AttentionShape:
        """Return the sizes of the attention of a layer. Layers of one type have equal sizes."""
        layer_type = self.layer_types[layer]
        if layer_type not in self._shapes:
            window = self.window(layer)
            self._shapes[layer_type] = self.adapter.shape(self.base, self.base.config, layer, window)
        return self._shapes[layer_type]


def resolve(model: PreTrainedModel, adapter: Adapter | None, layers: Layers, submodule: str | None) -> Target:
    """Return the layers to patch.

    Args:
        model: the unwrapped model.
        adapter: the user's adapter, or None for that of the model's family.
        layers: the user's choice of layers; None for all.
        submodule: the user's choice of the attention stack; None for the only one.

    Raises:
        PePatchError: an argument does not fit the model.
    """
    path, base = find_stack(model, submodule, adapter)
    family = base.config.model_type
    users_adapter = adapter is not None or (family in ADAPTERS and not ADAPTERS.is_builtin(family))
    adapter = find_adapter(base, adapter)
    attentions = adapter.attentions(base)
    return Target(
        model=model,
        path=path,
        base=base,
        adapter=adapter,
        attentions=attentions,
        layer_types=adapter.layer_types(base, base.config),
        layers=find_layers(layers, adapter.count(base), attentions),
        users_adapter=users_adapter,
    )


def unwrap(model: Any) -> PreTrainedModel:
    """Return the PreTrainedModel inside PEFT, accelerate or torch.compile wrappers.

    Raises:
        PePatchError: there is no Transformers model inside.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        wrappers = [name for name in compat.WRAPPERS if isinstance(getattr(inner, name, None), nn.Module)]
        inner = getattr(inner, wrappers[0]) if wrappers else None
        if inner is None:
            raise PePatchError(
                f"{type(model).__name__} is not a Transformers model, nor a PEFT, accelerate or torch.compile wrapper "
                "around one."
            )
    return inner


def device_and_dtype(base: nn.Module) -> tuple[Any, torch.dtype]:
    """Return the device and dtype for the parameters of a scheme: those of the model's weights.

    Offloaded weights are on the meta device; then the device is the one on which accelerate's hooks run the model.
    """
    weight = next((p for p in base.parameters() if p.is_floating_point()), torch.empty(0))
    hooks = (compat.execution_hook(module) for module in base.modules() if weight.is_meta)
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), weight.device), weight.dtype


def stacks(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Return the attention stacks inside `model`, by their path.

    A stack is a model that contains no other model. A model that contains others is one too if it holds layers with
    attentions outside them, such as the text model of Phi-4 multimodal.
    """
    models = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    return {name: module for name, module in models.items() if _holds_layers(module)}


def _holds_layers(model: PreTrainedModel) -> bool:
    """Return whether a model contains no other model, or a list of layers with attentions outside these."""
    inner = [each for each in model.modules() if each is not model and isinstance(each, PreTrainedModel)]
    if not inner:
        return True
    taken = {module for each in inner for module in each.modules()}
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and each not in taken]
    return any(
        "Attention" in type(module).__name__ for each in lists for module in each.modules() if module not in taken
    )


def _only_decoder(model: PreTrainedModel, found: dict[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """Return the one stack that keeps a cache, as in a vision-language model; empty if there is none, or several.

    An encoder-decoder has positions in two places, of which the user chooses.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return {}
    decoders = {name: each for name, each in found.items() if compat.cache_argument(type(each).forward) is not None}
    return decoders if len(decoders) == 1 else {}


def find_stack(
    model: PreTrainedModel, submodule: str | None, adapter: Adapter | None = None
) -> tuple[str, PreTrainedModel]:
    """Return the path of the attention stack to patch, and the stack.

    Args:
        model: the unwrapped model.
        submodule: the user's choice, a path or a part of one; None for the only stack, or the only decoder.
        adapter: the user's adapter. Without one, only stacks of supported families are candidates.

    Raises:
        UnsupportedError: several stacks match; the message lists them.
        UnknownFamilyError: the model has several stacks and none of them is supported.
        UnknownNameError: no stack matches `submodule`.
        OptionValueError: `submodule` is not a string.
    """
    all_stacks = stacks(model)
    if submodule is not None and not isinstance(submodule, str):
        raise OptionValueError(
            f"submodule={quoted(submodule)} is not the name of a module; give one of {', '.join(sorted(all_stacks))}."
        )
    supported = (
        all_stacks if adapter is not None else {n: m for n, m in all_stacks.items() if m.config.model_type in ADAPTERS}
    )
    if submodule is None:
        if chosen := all_stacks if len(all_stacks) == 1 else _only_decoder(model, all_stacks):
            return next(iter(chosen.items()))
        if not supported:
            raise _unknown_stacks(model, all_stacks)
        others = [_labelled(name, stack) for name, stack in sorted(all_stacks.items()) if name not in supported]
        rest = f" Not supported: {', '.join(others)}." if others else ""
        each = ", ".join(_labelled(name, stack) for name, stack in sorted(supported.items()))
        raise UnsupportedError(
            f"{type(model).__name__} has several attention stacks; choose one with submodule=<path>: {each}.{rest} "
            f"Example: submodule={sorted(supported)[0]!r}."
        )
    matching = {n: m for n, m in all_stacks.items() if n == submodule or submodule in n.split(".")}
    if len(matching) == 1:
        return next(iter(matching.items()))
    if not matching:
        raise unknown("submodule", submodule, all_stacks)
    raise UnsupportedError(f"submodule={quoted(submodule)} fits several: {', '.join(sorted(matching))}.")


def _labelled(name: str, stack: PreTrainedModel) -> str:
    return f"{name or type(stack).__name__} ({stack.config.model_type})"


def find_adapter(base: PreTrainedModel, adapter: Adapter | None) -> Adapter:
    """Return the given adapter, or else the one of the model's family.

    Raises:
        OptionValueError: a user's adapter does not fit the model.
        UnknownFamilyError: there is no adapter for the family.
    """
    if adapter is not None:
        if not isinstance(adapter, Adapter):
            raise OptionValueError(
                f"adapter={quoted(adapter)} is a {type(adapter).__name__}; it takes a pe_patch.Adapter, for example "
                "adapter=pe_patch.Adapter(attention='attention')."
            )
        check_adapter(base, adapter)
        return adapter
    family = base.config.model_type
    if family not in ADAPTERS and base in INFERRED:
        return INFERRED[base]
    if family not in ADAPTERS:
        raise unknown_family(family)
    if not ADAPTERS.is_builtin(family):
        check_adapter(base, ADAPTERS[family])
    return ADAPTERS[family]


class UnknownFamilyError(UnsupportedError, UnknownNameError):
    """A model family without an adapter."""


def unknown_family(family: str, why: str = "") -> UnknownFamilyError:
    """Return the error for a family without an adapter.

    Args:
        family: `config.model_type`.
        why: why none was found by looking, as a clause; empty if nobody looked.
    """
    # A model type that Transformers knows is not a misspelling of a similar one.
    near = "" if family in CONFIG_MAPPING else nearest(family, ADAPTERS)
    inferred = f", and none can be inferred: {why}" if why else ""
    return UnknownFamilyError(
        f"The family {family!r} has no adapter{inferred}.{near} If its forward calls `rotary_emb` once and the "
        "attention interface in each layer, `adapter=pe_patch.Adapter(layers=..., attention=..., rotary=...)` is all "
        f"it takes (CONTRIBUTING shows how to test it). Supported: {', '.join(sorted(ADAPTERS))}."
    )


def _unknown_stacks(model: PreTrainedModel, all_stacks: dict[str, PreTrainedModel]) -> UnknownFamilyError:
    """Return the error for a model with several stacks, none of which is supported."""
    each = ", ".join(_labelled(name, stack) for name, stack in sorted(all_stacks.items()))
    return UnknownFamilyError(
        f"{type(model).__name__} is not supported: none of its attention stacks has an adapter: {each}. For one that "
        "calls the attention interface in each layer, give submodule=<its path> and adapter=pe_patch.Adapter(...) "
        f"(CONTRIBUTING shows how to test it). Supported: {', '.join(sorted(ADAPTERS))}."
    )


def find_layers(layers: Layers, count: int, attending: Iterable[int] | None = None) -> list[int]:
    """Return the indices of the layers to patch, in order.

    Args:
        layers: indices, a slice or a predicate of the index; None for all layers that attend. Negative indices count
            from the end.
        count: number of layers of the model.
        attending: indices of the layers that attend; None for all. A slice or a predicate chooses among these.

    Raises:
        OptionValueError: `layers` is none of these, chooses no layer, or names one that does not exist or attend.
    """
    able = list(range(count)) if attending is None else sorted(attending)
    if layers is None:
        return able
    if isinstance(layers, slice):
        chosen = [index for index in _sliced(layers, count) if index in able]
    elif callable(layers):
        chosen = [index for index in able if layers(index)]
    elif isinstance(layers, Iterable) and not isinstance(layers, str | bytes | Mapping):
        chosen = [_layer(index, layers, count) for index in _entries(layers, count)]
    else:
        raise _not_layers(layers, count)
    if wrong := [index for index in chosen if not -count <= index < count]:
        raise OptionValueError(f"layers= names {wrong[0]}, but this model has layers 0 to {count - 1}.")
    chosen = sorted({index % count for index in chosen})
    if without := [index for index in chosen if index not in able]:
        raise OptionValueError(
            f"layers= names layer {without[0]}, which has no attention in this hybrid model. Layers that attend: "
            f"{', '.join(map(str, able))}."
        )
    if not chosen:
        raise OptionValueError(
            f"layers= chooses none of the {len(able)} layers that attend, so the patch would have no effect."
        )
    return chosen


def _sliced(layers: slice, count: int) -> list[int]:
    try:
        return list(range(count))[layers]
    except (TypeError, ValueError) as error:
        raise OptionValueError(f"layers={quoted(layers)} is not a valid slice of {count} layers: {error}.") from error


def _entries(layers: Iterable[Any], count: int) -> list[Any]:
    try:
        return list(layers)
    except TypeError as error:  # a tensor without dimensions
        raise _not_layers(layers, count) from error


def _layer(index: Any, layers: Any, count: int) -> int:
    """Return one entry of `layers` as an index; NumPy integers and integer tensors are allowed."""
    try:
        if not isinstance(index, bool) and getattr(index, "dtype", None) not in (torch.bool, np.bool_):
            return operator.index(index)
    except TypeError:
        pass
    raise _not_layers(layers, count)


def _not_layers(layers: Any, count: int) -> OptionValueError:
    example = f" For one layer give layers=[{quoted(layers)}]." if type(layers) is int else ""
    return OptionValueError(
        f"layers={quoted(layers)} does not name layers.{example} It takes a list of indices from 0 to {count - 1}, a "
        "slice, or a function of the index; leave it out for all layers."
    )
