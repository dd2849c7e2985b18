"""From what the user said to what it means: which stack, which adapter, which scheme with which options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapters import ADAPTERS, Adapter
from .errors import OptionError, PePatchError, UnknownNameError, UnsupportedError, nearest, unknown

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


def find_stack(head: PreTrainedModel, submodule: str | None) -> tuple[str, PreTrainedModel]:
    """The attention stack to patch, and its path; an error naming the candidates where that is not clear."""
    found = stacks(head)
    if submodule is None:
        if len(found) == 1:
            return next(iter(found.items()))
        raise UnsupportedError(
            f"{type(head).__name__} has several attention stacks; say which with submodule: {', '.join(sorted(found))}."
        )
    matching = {n: m for n, m in found.items() if n == submodule or submodule in n.split(".")}
    if len(matching) == 1:
        return next(iter(matching.items()))
    if not matching:
        raise unknown("submodule", submodule, found)
    raise UnsupportedError(f"submodule={submodule!r} fits several: {', '.join(sorted(matching))}.")


def find_adapter(base: PreTrainedModel, adapter: Adapter | None) -> Adapter:
    """The given adapter, or the row of this family."""
    if adapter is not None:
        if not isinstance(adapter, Adapter):
            raise OptionError(f"adapter= takes a pe_patch.Adapter, not {type(adapter).__name__}.")
        return adapter
    family = base.config.model_type
    if family not in ADAPTERS:
        raise _unknown_family(family)
    return ADAPTERS[family]


class UnknownFamilyError(UnsupportedError, UnknownNameError):
    """A model family without a row in the table of adapters."""


def _unknown_family(family: str) -> UnknownFamilyError:
    return UnknownFamilyError(
        f"The family {family!r} has no adapter.{nearest(family, ADAPTERS)} If its forward calls `rotary_emb` once and "
        "the attention interface in each layer, `adapter=pe_patch.Adapter(layers=..., attention=..., rotary=...)` is "
        f"all it takes (CONTRIBUTING shows how to test it). Supported: {', '.join(sorted(ADAPTERS))}."
    )


def find_layers(layers: Layers, count: int) -> list[int]:
    """Indices of the layers to patch, in order; all where nothing is said."""
    if layers is None:
        return list(range(count))
    if isinstance(layers, slice):
        chosen = list(range(count))[layers]
    elif callable(layers):
        chosen = [index for index in range(count) if layers(index)]
    else:
        chosen = [int(index) for index in layers]
    if wrong := [index for index in chosen if not -count <= index < count]:
        raise OptionError(f"layers= names {wrong[0]}, but this model has layers 0 to {count - 1}.")
    chosen = sorted({index % count for index in chosen})
    if not chosen:
        raise OptionError(f"layers= chooses none of the {count} layers, so the patch would have no effect.")
    return chosen
