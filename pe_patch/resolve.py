"""From what the user said to what it means: which stack, which adapter, which scheme with which options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import dialects
from .adapters import ADAPTERS, Adapter
from .adapters.adapter import native_parameters, native_window
from .errors import AlreadyPatchedError, OptionError, PePatchError, UnknownNameError, UnsupportedError, nearest, unknown
from .scheme import Scheme
from .schemes import SCHEMES

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


EXISTING = ("error", "replace", "compose")


def settle_existing(
    config: Any, scheme: type[Scheme], options: dict[str, Any], on_existing: str, kinds: Iterable[str | None] = (None,)
) -> dict[str, Any]:
    """What becomes of a scaling that the model's own config already carries; returns the options to use.

    `kinds` are the layer types to be patched, where each has rotary parameters of its own.
    """
    scaled = {
        kind: parameters
        for kind in kinds
        if (parameters := native_parameters(config, kind)).get("rope_type", "default") not in ("default", None)
    }
    if not scaled:
        return options
    kind, parameters = next(iter(scaled.items()))
    if on_existing == "error":
        raise AlreadyPatchedError(
            f"This model already carries rope_type={parameters['rope_type']!r} ({_short(parameters)}): a second one on "
            f"top would not mean what it says. on_existing='replace' starts again from its window of "
            f"{native_window(config, kind)} tokens and theta {parameters.get('rope_theta')}; on_existing='compose' "
            "builds on it where that has a meaning."
        )
    if on_existing == "compose":
        if "over" not in scheme.option_names():
            able = [name for name, known in SCHEMES.items() if "over" in known.option_names()]
            raise UnsupportedError(
                f"{scheme.name!r} over an existing {parameters['rope_type']!r} has no meaning; only {', '.join(able)} "
                "compose. Use on_existing='replace'."
            )
        if len(set(kinds)) > 1:
            raise UnsupportedError(f"Only the {kind} layers of this model are scaled; choose them with layers=.")
        return {"over": _existing_scheme(config, parameters), **options}
    return options


def _existing_scheme(config: Any, parameters: dict[str, Any]) -> dict[str, Any]:
    """The scaling that a config carries, in our own words; a factor may follow from its two lengths."""
    lengths = ("max_position_embeddings", "original_max_position_embeddings")
    around = {name: value for name in lengths if (value := getattr(config, name, None)) is not None}
    found = dialects.read({"rope_parameters": parameters, **around})
    if not isinstance(found, dialects.Specification):
        raise UnsupportedError(f"This config has different parameters for {', '.join(found)}, which do not compose.")
    return {"scheme": found.scheme, **found.options}


def _short(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in parameters.items() if not isinstance(value, list))


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
