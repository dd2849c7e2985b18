"""Give a patched model its own copies of its configs.

Two models built from one config share the object, so a value that a patch writes there would change what the other
model saves. A patched model therefore refers to copies, and after the undo to the originals again. Models around it (a
multimodal model, a PEFT wrapper) hold and save the same configs, so they refer to the copies too.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .. import compat
from ..core.swaps import Swap


@dataclass
class ConfigCopy:
    """A copy of a config, whose changes by the user are written back to the original when the patch is undone."""

    original: Any
    """The config before the patch."""
    copy: Any
    """The config of the patched model."""
    known: dict[str, Any]
    """The attributes of the copy when it was created. Differences from them were written by the user."""

    def carry_back(self) -> None:
        """Write the user's changes of the copy to the original. Call this after the patch's own values are undone."""
        known, current, target = self.known, dict(vars(self.copy)), vars(self.original)
        for name in current.keys() | known.keys():
            if name not in current:
                target.pop(name, None)
            elif name not in known or not _same(known[name], current[name]):
                target[name] = current[name]
        self.known = current


def _same(first: Any, second: Any) -> bool:
    return first is second or (type(first) is type(second) and bool(first == second))


def models_around(model: Any) -> list[nn.Module]:
    """Return the modules that contain `model`, outermost last.

    A module has no reference to its parents, so this searches all live modules. The search takes a tenth of a second.
    It is skipped for a model that has output embeddings and no PEFT adapter.
    """
    if model.get_output_embeddings() is not None and "peft_config" not in vars(model):
        return []
    parents: dict[int, list[nn.Module]] = {}
    for module in [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]:
        for child in list(compat.submodules(module).values()):
            parents.setdefault(id(child), []).append(module)
    around: dict[int, nn.Module] = {}
    inner = [model]
    while inner:
        outer = [module for module in parents.get(id(inner.pop(0)), ()) if id(module) not in around]
        around |= {id(module): module for module in outer}
        inner += outer
    return list(around.values())


def copy_configs(base: Any, models: list[Any]) -> list[ConfigCopy]:
    """Copy the configs of `base` and of the first of `models`, and every config of `models` that contains one of "
    "these."""
    copies: dict[int, ConfigCopy] = {}

    def visit(config: Any, wanted: bool) -> None:
        nested = {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
        for value in nested.values():
            visit(value, value is base.config)
        inside = {name: copies[id(value)].copy for name, value in nested.items() if id(value) in copies}
        if id(config) not in copies and (wanted or inside):
            duplicate = copy.copy(config)
            vars(duplicate).update(inside)
            copies[id(config)] = ConfigCopy(config, duplicate, dict(vars(duplicate)))

    visit(base.config, True)
    for model in models:
        if isinstance(config := vars(model).get("config"), PreTrainedConfig):
            visit(config, model is models[0])
    return list(copies.values())


def config_references(models: list[Any], copies: list[ConfigCopy]) -> list[Swap]:
    """Return the swaps that make all modules of `models` refer to the copies instead of the originals."""
    copy_of = {id(each.original): each.copy for each in copies}
    modules = {id(module): module for model in models for module in model.modules()}
    return [
        Swap.of(module, name, copy_of[id(value)])
        for module in modules.values()
        for name, value in vars(module).items()
        if id(value) in copy_of
    ]


def redirect(swaps: list[Swap], copies: list[ConfigCopy]) -> list[Swap]:
    """Change swaps on the originals, in place, into swaps on the copies; return them."""
    copy_of = {id(each.original): each.copy for each in copies}
    for swap in swaps:
        swap.owner = copy_of.get(id(swap.owner), swap.owner)
    return swaps
