"""Config objects that belong to one patched model alone.

Two models built from one config share the object, and what a patch writes there would change what the other one saves.
So a patched model refers to copies, and to the original objects again after the undo. Models around it (one that has it
as its language model, a PEFT wrapper) hold the same configs, save them, and refer to the copies too.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..core.swaps import Swap


@dataclass
class ConfigCopy:
    """A copy of a config, and the way back for what the user writes there while the model is patched."""

    original: Any
    copy: Any
    known: dict[str, Any]
    """The attributes of the copy when it was made; all else was written by the user."""

    def carry_back(self) -> None:
        """Write to the original what the user changed in the copy; to be called when the patch has left the copy."""
        before, now, target = self.known, dict(vars(self.copy)), vars(self.original)
        for name in now.keys() | before.keys():
            if name not in now:
                target.pop(name, None)
            elif name not in before or not _same(before[name], now[name]):
                target[name] = now[name]
        self.known = now


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))


def models_around(model: Any) -> list[nn.Module]:
    """Return the modules that contain `head`, outermost last.

    A module does not know what contains it, so they are found among all live modules. That takes a tenth of a second,
    and is left out for a model that predicts tokens by itself and carries no adapter.
    """
    if model.get_output_embeddings() is not None and "peft_config" not in vars(model):
        return []
    parents: dict[int, list[nn.Module]] = {}
    for module in [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]:
        for child in list(vars(module).get("_modules", {}).values()):
            parents.setdefault(id(child), []).append(module)
    around: dict[int, nn.Module] = {}
    inner = [model]
    while inner:
        found = [module for module in parents.get(id(inner.pop(0)), ()) if id(module) not in around]
        around |= {id(module): module for module in found}
        inner += found
    return list(around.values())


def copy_configs(base: Any, models: list[Any]) -> list[ConfigCopy]:
    """Copy the configs of `base` and of the first of `models`, and those of the others that hold one of these."""
    copies: dict[int, ConfigCopy] = {}

    def visit(config: Any, wanted: bool) -> None:
        nested = {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
        for value in nested.values():
            visit(value, value is base.config)
        inside = {name: copies[id(value)].copy for name, value in nested.items() if id(value) in copies}
        if id(config) not in copies and (wanted or inside):
            twin = copy.copy(config)
            vars(twin).update(inside)
            copies[id(config)] = ConfigCopy(config, twin, dict(vars(twin)))

    visit(base.config, True)
    for model in models:
        if isinstance(config := vars(model).get("config"), PreTrainedConfig):
            visit(config, model is models[0])
    return list(copies.values())


def config_references(models: list[Any], copies: list[ConfigCopy]) -> list[Swap]:
    """Return the swaps that lead all modules of `models` from the originals to the copies."""
    twins = {id(each.original): each.copy for each in copies}
    modules = {id(module): module for model in models for module in model.modules()}
    return [
        Swap.of(module, name, twins[id(value)])
        for module in modules.values()
        for name, value in vars(module).items()
        if id(value) in twins
    ]


def redirect(swaps: list[Swap], copies: list[ConfigCopy]) -> list[Swap]:
    """Turn swaps of attributes of the originals into swaps of the copies."""
    twins = {id(each.original): each.copy for each in copies}
    for swap in swaps:
        swap.owner = twins.get(id(swap.owner), swap.owner)
    return swaps
