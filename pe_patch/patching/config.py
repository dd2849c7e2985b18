"""Write a patch into the config, so that other tools and saved checkpoints see the positions in effect.

Two models built from one config share the object, so a value that a patch writes there would change what the other
model saves. A patched model therefore refers to copies of its configs, and after the undo to the originals again.
Models around it (a multimodal model, a PEFT wrapper) hold and save the same configs, so they refer to the copies too.
"""

from __future__ import annotations

import copy
import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from .. import compat
from ..adapters import Adapter
from ..adapters.adapter import config_rope_parameters
from ..adapters.trained_window import OPTION
from ..core.scheme import Scheme
from ..core.swaps import Swap
from ..errors import OptionError
from ..mla.protocol import keeps_rotation
from .record import BESIDE, RECORD_KEY, VERSION
from .saved_config import Mark, native_class_of

SchemeByLayerType = dict[str | None, Scheme]
"""The scheme of each patched layer type; the key is None in a family whose layers share their frequencies."""


def record_of(
    scheme: Scheme, layers: list[int] | None, submodule: str | None, keep_native: bool, strict: bool
) -> dict[str, Any]:
    """Return the values for `config.pe_patch` that are needed to apply the same patch again.

    Args:
        scheme: the scheme of the patch.
        layers: indices of the patched layers; None for all.
        submodule: as for `patch_model`.
        keep_native: as for `patch_model`.
        strict: as for `patch_model`.

    Raises:
        OptionError: an option cannot be written as JSON.
    """
    record: dict[str, Any] = {"version": VERSION, "scheme": scheme.name, "options": scheme.recorded}
    if layers is not None:
        record["layers"] = layers
    framework = {"submodule": submodule, "keep_native": keep_native, "strict": strict}
    record |= {key: value for key, value in framework.items() if value}
    try:
        return json.loads(json.dumps(record))
    except TypeError as error:
        raise OptionError(
            f"The options of {scheme.name!r} must be numbers, strings, lists or dicts, since they are saved with the "
            f"model: {error}."
        ) from error


def cache_specification(config: Any, record: dict[str, Any], schemes: SchemeByLayerType) -> str:
    """Return all that determines how a patched model encodes cached keys, as JSON."""
    read = {
        str(layer_type): [scheme.shape.rope_theta, scheme.shape.trained_length, scheme.shape.rotary_dim]
        for layer_type, scheme in schemes.items()
    }
    return json.dumps([config.model_type, record, read], sort_keys=True)


def expressible(
    adapter: Adapter, config: Any, schemes: SchemeByLayerType, record: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the `rope_parameters` under which plain Transformers computes the same logits in one pass.

    Return an empty dict if the family needs none, and None if Transformers cannot express the scheme.

    Args:
        adapter: the description of the family.
        config: the config of the patched stack.
        schemes: the scheme of each patched layer type.
        record: the record of the patch.
    """
    if record.get("keep_native") or not _patches_whole_types(adapter, config, schemes, record):
        return None
    scheme = next(iter(schemes.values()))
    if keeps_rotation(scheme):
        return {}
    if adapter.rotary is None:
        return {} if adapter.alibi and scheme.name == adapter.native and not scheme.options else None
    parameters = native_rope_parameters(config, schemes)
    return None if parameters is None or refusal(config, parameters) else parameters


def native_rope_parameters(config: Any, schemes: SchemeByLayerType) -> dict[str, Any] | None:
    """Return the `rope_parameters` of the schemes in Transformers' format, or None if it cannot express one of them."""
    each = {
        layer_type: parameters for layer_type, scheme in schemes.items() if (parameters := scheme.native()) is not None
    }
    return _nested(config, each) if len(each) == len(schemes) else None


def refusal(config: Any, parameters: dict[str, Any]) -> str:
    """Return why the family's config class rejects or changes these `rope_parameters`; empty if it keeps them.

    A family may check them when a config is created and when it is saved, and may rewrite them (Phi-3 turns YaRN into
    LongRoPE). Therefore this function creates a config and compares.
    """
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        values = {key: value for key, value in config.to_dict().items() if key != RECORD_KEY}
        created = native_class_of(config).from_dict({**values, "rope_parameters": copy.deepcopy(parameters)})
        if hasattr(created, "validate"):
            created.validate()
    except (
        StrictDataclassError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # any check may fail
        return " ".join(str(error).split())
    finally:
        transformers.logging.set_verbosity(before)
    return "" if _kept(parameters, created.rope_parameters) else f"{type(config).__name__} changes them"


def _kept(given: Any, stored: Any) -> bool:
    """Return whether a config stores all of the given values unchanged."""
    if isinstance(given, dict) and isinstance(stored, dict):
        return all(key in stored and _kept(value, stored[key]) for key, value in given.items())
    return given == stored or (isinstance(given, tuple | list) and list(given) == list(stored))


def _patches_whole_types(adapter: Adapter, config: Any, schemes: SchemeByLayerType, record: dict[str, Any]) -> bool:
    """Return whether the patch covers every layer of each layer type that it touches."""
    chosen = record.get("layers")
    if chosen is None:
        return True
    return (
        adapter.rotary_per_layer_type
        and not {layer_type for i, layer_type in enumerate(config.layer_types) if i not in chosen} & schemes.keys()
    )


SCALING_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim",
    "truncate", "alpha", "max_position_embeddings",
}  # fmt: skip
"""Keys of `rope_parameters` that belong to a scaling. The others belong to the family, such as `mrope_section`."""
QUERY_SCALE = "llama_4_scaling_beta"
"""A family with this key scales its queries by their position over `original_max_position_embeddings`."""


def _family_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters that stay under every scheme, since they belong to the family."""
    kept = {key: value for key, value in parameters.items() if key not in SCALING_KEYS}
    if QUERY_SCALE in kept:
        kept[OPTION] = parameters.get(OPTION)
    return kept


def _nested(config: Any, each: dict[str | None, dict[str, Any]]) -> dict[str, Any]:
    """Return rotary parameters in the format of the family: nested by layer type, or flat.

    Keep those that belong to the family, such as the share of the head that rotates.
    """
    nested = {}
    for layer_type, parameters in each.items():
        kept = _family_parameters(config_rope_parameters(config, layer_type))
        if QUERY_SCALE in kept and parameters.get(OPTION, kept[OPTION]) != kept[OPTION]:
            raise OptionError(
                f"{OPTION}={parameters[OPTION]} would also change the scale of the queries, which this family counts "
                f"in steps of {kept[OPTION]} tokens. Leave {OPTION}= out."
            )
        nested[layer_type] = {**kept, **parameters}
    return nested[None] if None in nested else {**config_rope_parameters(config), **nested}


def config_swaps(
    model: Any,
    base: Any,
    adapter: Adapter,
    schemes: SchemeByLayerType,
    record: dict[str, Any],
    implementation: str,
) -> list[Swap]:
    """Return the swaps of config values: attention implementation, effective window, rotary parameters and record.

    Args:
        model: the unwrapped outer model.
        base: the model that holds the layers.
        adapter: the description of its family.
        schemes: the scheme of each patched layer type.
        record: the record of the patch, without the native values, which are added here.
        implementation: name of the attention implementation.
    """
    config, scheme = base.config, next(iter(schemes.values()))
    swaps = [Swap.of(config, compat.IMPLEMENTATION, implementation)]
    native: dict[str, Any] = {"model_type": model.config.model_type}
    window, current = scheme.effective_window, getattr(config, "max_position_embeddings", None)
    written: dict[str, Any] = {"max_position_embeddings": current}
    if window is not None and window != current:
        swaps.append(Swap.of(config, "max_position_embeddings", int(window)))
        written["max_position_embeddings"] = int(window)
        native["max_position_embeddings"] = current
    parameters = expressible(adapter, config, schemes, record)
    needs_pe_patch = parameters is None
    if adapter.rotary is not None:
        written["rope_parameters"] = config_rope_parameters(config)
    if adapter.rotary is not None and not keeps_rotation(scheme):
        if parameters is None or scheme.native_window not in (None, current if window is None else window):
            bases = {layer_type: config_rope_parameters(config, layer_type).get("rope_theta") for layer_type in schemes}
            parameters = _nested(config, {k: {"rope_type": RECORD_KEY, "rope_theta": t} for k, t in bases.items()})
            needs_pe_patch = True
        native["rope_parameters"] = config_rope_parameters(config)
        rotary = adapter.rotary_module(base)
        if getattr(rotary, "config", None) is config:  # the native module may read its config at every call (PhiMoE)
            swaps.append(Swap.of(rotary, "config", copy.copy(config), direct=True))
        swaps.append(Swap.of(config, "rope_parameters", parameters))
        written["rope_parameters"] = copy.deepcopy(parameters)
    record = {**record, "native": native, "written": _as_saved(config, written)}
    if config is not model.config:
        native["config"] = next(key for key in model.config.sub_configs if getattr(model.config, key) is config)
        alone = {key: value for key, value in native.items() if key != "config"} | {"model_type": config.model_type}
        whole = {key: value for key, value in record.items() if key != "submodule"}
        swaps.append(Swap.of(config, RECORD_KEY, {**whole, "native": alone}))
    swaps.append(Swap.of(model.config, RECORD_KEY, record))
    if needs_pe_patch:
        swaps += [Mark.of(each) for each in ((config,) if config is model.config else (config, model.config))]
    return swaps


def _as_saved(config: Any, written: dict[str, Any]) -> dict[str, Any]:
    """Return the values under the names that the family's config.json gives them, as read back from JSON."""
    saved = {config.attribute_map.get(key, key): written[key] for key in BESIDE if written.get(key) is not None}
    return json.loads(json.dumps(saved))


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)


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
            elif name not in known or not _unchanged(known[name], current[name]):
                target[name] = current[name]
        self.known = current


def _unchanged(first: Any, second: Any) -> bool:
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
        for child in list(compat.submodules_of_any(module).values()):
            parents.setdefault(id(child), []).append(module)
    around: dict[int, nn.Module] = {}
    inner = [model]
    while inner:
        outer = [module for module in parents.get(id(inner.pop(0)), ()) if id(module) not in around]
        around |= {id(module): module for module in outer}
        inner += outer
    return list(around.values())


def copy_configs(base: Any, models: list[Any]) -> list[ConfigCopy]:
    """Copy the configs of `base` and of the first of `models`, and every config of `models` that contains one of
    these."""
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
