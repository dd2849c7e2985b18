"""From what the user said to what it means: which stack, which adapter, which scheme with which options."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from ..adapters import ADAPTERS, Adapter
from ..adapters.check import check_adapter
from ..errors import OptionValueError, PePatchError, UnknownNameError, UnsupportedError, nearest, quoted, unknown

WRAPPERS = ("_orig_mod", "module")
"""Where torch.compile and data parallelism keep the model that they wrap."""

Layers = Iterable[int] | slice | Callable[[int], bool] | None


def unwrap(model: Any) -> PreTrainedModel:
    """The PreTrainedModel inside whatever PEFT, accelerate or torch.compile have put round it."""
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        inner = next(
            (getattr(inner, name) for name in WRAPPERS if isinstance(getattr(inner, name, None), nn.Module)), None
        )
        if inner is None:
            raise PePatchError(
                f"{type(model).__name__} is not a Transformers model, nor a PEFT, accelerate or torch.compile wrapper "
                "round one."
            )
    return inner


def home(base: nn.Module) -> tuple[Any, torch.dtype]:
    """Device and dtype of a scheme's own weights: those of the model's, which may be offloaded to the meta device while
    accelerate's hooks know where they are used."""
    weight = next((p for p in base.parameters() if p.is_floating_point()), torch.empty(0))
    hooks = (module.__dict__.get("_hf_hook") for module in base.modules() if weight.is_meta)
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), weight.device), weight.dtype


def stacks(head: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The innermost models inside `head` by their path: those that hold layers and no other model."""
    models = {name: module for name, module in head.named_modules() if isinstance(module, PreTrainedModel)}
    inner = {
        name: module
        for name, module in models.items()
        if not any(child is not module and isinstance(child, PreTrainedModel) for child in module.modules())
    }
    return inner


def find_stack(
    head: PreTrainedModel, submodule: str | None, adapter: Adapter | None = None
) -> tuple[str, PreTrainedModel]:
    """The attention stack to patch, and its path; an error naming the candidates where that is not clear.

    Without an adapter only stacks of supported families are candidates.
    """
    found = stacks(head)
    if submodule is not None and not isinstance(submodule, str):
        raise OptionValueError(
            f"submodule={quoted(submodule)} is not the name of a module; give one of {', '.join(sorted(found))}."
        )
    known = found if adapter is not None else {n: m for n, m in found.items() if m.config.model_type in ADAPTERS}
    if submodule is None:
        if len(found) == 1:
            return next(iter(found.items()))
        if not known:
            raise _unknown_stacks(head, found)
        unknown_ones = [_labelled(name, model) for name, model in sorted(found.items()) if name not in known]
        rest = f" Not supported: {', '.join(unknown_ones)}." if unknown_ones else ""
        each = ", ".join(_labelled(name, model) for name, model in sorted(known.items()))
        raise UnsupportedError(
            f"{type(head).__name__} has several attention stacks; say which with submodule: {each}.{rest} Example: "
            f"submodule={sorted(known)[0]!r}."
        )
    matching = {n: m for n, m in found.items() if n == submodule or submodule in n.split(".")}
    if len(matching) == 1:
        return next(iter(matching.items()))
    if not matching:
        raise unknown("submodule", submodule, found)
    raise UnsupportedError(f"submodule={quoted(submodule)} fits several: {', '.join(sorted(matching))}.")


def _labelled(name: str, model: PreTrainedModel) -> str:
    return f"{name or type(model).__name__} ({model.config.model_type})"


def find_adapter(base: PreTrainedModel, adapter: Adapter | None) -> Adapter:
    """The given adapter, checked against the model, or the row of this family."""
    if adapter is not None:
        if not isinstance(adapter, Adapter):
            raise OptionValueError(
                f"adapter={quoted(adapter)} is a {type(adapter).__name__}; it takes a pe_patch.Adapter, for example "
                "adapter=pe_patch.Adapter(attention='attention')."
            )
        check_adapter(base, adapter)
        return adapter
    family = base.config.model_type
    if family not in ADAPTERS:
        raise _unknown_family(family)
    if not ADAPTERS.is_builtin(family):
        check_adapter(base, ADAPTERS[family])
    return ADAPTERS[family]


def must_prove(base: PreTrainedModel, adapter: Adapter | None) -> bool:
    """Return whether an adapter is a user's, given or registered, so that it must be checked against the model."""
    return adapter is not None or not ADAPTERS.is_builtin(base.config.model_type)


class UnknownFamilyError(UnsupportedError, UnknownNameError):
    """A model family without a row in the table of adapters."""


def _unknown_family(family: str) -> UnknownFamilyError:
    # A type that Transformers knows is no misspelling of another, however near its name.
    near = "" if family in CONFIG_MAPPING else nearest(family, ADAPTERS)
    return UnknownFamilyError(
        f"The family {family!r} has no adapter.{near} If its forward calls `rotary_emb` once and "
        "the attention interface in each layer, `adapter=pe_patch.Adapter(layers=..., attention=..., rotary=...)` is "
        f"all it takes (CONTRIBUTING shows how to test it). Supported: {', '.join(sorted(ADAPTERS))}."
    )


def _unknown_stacks(head: PreTrainedModel, found: dict[str, PreTrainedModel]) -> UnknownFamilyError:
    """The error for a model of several stacks, none of which is supported, so that there is nothing to choose from."""
    each = ", ".join(_labelled(name, model) for name, model in sorted(found.items()))
    return UnknownFamilyError(
        f"{type(head).__name__} is not supported: none of its attention stacks has an adapter: {each}. For one that "
        "calls the attention interface in each layer, give submodule=<its path> and adapter=pe_patch.Adapter(...) "
        f"(CONTRIBUTING shows how to test it). Supported: {', '.join(sorted(ADAPTERS))}."
    )


def find_layers(layers: Layers, count: int) -> list[int]:
    """Indices of the layers to patch, in order; all where nothing is said."""
    if layers is None:
        return list(range(count))
    if isinstance(layers, slice):
        chosen = _sliced(layers, count)
    elif callable(layers):
        chosen = [index for index in range(count) if layers(index)]
    elif isinstance(layers, Iterable) and not isinstance(layers, str | bytes | Mapping):
        chosen = [_layer(index, layers, count) for index in _entries(layers, count)]
    else:
        raise _not_layers(layers, count)
    if wrong := [index for index in chosen if not -count <= index < count]:
        raise OptionValueError(f"layers= names {wrong[0]}, but this model has layers 0 to {count - 1}.")
    chosen = sorted({index % count for index in chosen})
    if not chosen:
        raise OptionValueError(f"layers= chooses none of the {count} layers, so the patch would have no effect.")
    return chosen


def _sliced(layers: slice, count: int) -> list[int]:
    try:
        return list(range(count))[layers]
    except (TypeError, ValueError) as error:
        raise OptionValueError(f"layers={quoted(layers)} is no slice of {count} layers: {error}.") from error


def _entries(layers: Iterable[Any], count: int) -> list[Any]:
    try:
        return list(layers)
    except TypeError as error:  # a tensor of no dimension
        raise _not_layers(layers, count) from error


def _layer(index: Any, layers: Any, count: int) -> int:
    """One entry of `layers` as an index; numpy's integers and integer tensors count as such."""
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
