"""Save a patched model: what `save_pretrained` does before and after Transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .. import compat
from ..core.swaps import Swap, bind
from .peft import attach_containers, call_arguments, load_into_model
from .peft_record import write_record
from .saved_config import sync_before_saving


def save_base(base: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PreTrainedModel.save_pretrained` of a base model."""
    sync_before_saving(base)
    return inner(*args, **kwargs)


def save_model(model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `PreTrainedModel.save_pretrained`, and write the record if it saved an adapter from `add_adapter`."""
    sync_before_saving(model)
    result, given = inner(*args, **kwargs), call_arguments(model, "save_pretrained", args, kwargs)
    if compat.has_adapter(model) and given.get("is_main_process", True):
        write_record(model, Path(given["save_directory"]), given.get("state_dict"))
    return result


def saving_swaps(model: PreTrainedModel, base: PreTrainedModel) -> list[Swap]:
    """Return the swaps for saving a model, and for saving and loading its adapters."""
    swaps = [bind(model, "save_pretrained", save_model), bind(model, "load_adapter", load_into_model)]
    swaps.append(bind(model, "named_modules", attach_containers))
    if base is not model:
        swaps += [bind(base, "save_pretrained", save_base), bind(base, "named_modules", attach_containers)]
    return swaps
