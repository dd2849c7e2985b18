"""Write a patch into the config, so that other tools and saved checkpoints see the positions in effect."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from .. import compat
from ..adapters import Adapter
from ..adapters.adapter import native_parameters
from ..core.scheme import Scheme
from ..core.swaps import Swap
from ..mla.protocol import keeps_rotation
from .record import BESIDE, RECORD_KEY
from .record import VERSION as VERSION
from .record import record_of as record_of
from .saved_config import Mark, native_class_of

SchemeByLayerType = dict[str | None, Scheme]
"""The scheme of each patched layer type; the key is None in a family whose layers share their frequencies."""


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
        adapter.typed
        and not {layer_type for i, layer_type in enumerate(config.layer_types) if i not in chosen} & schemes.keys()
    )


def _nested(config: Any, each: dict[str | None, dict[str, Any]]) -> dict[str, Any]:
    """Return rotary parameters in the format of the family: nested by layer type, or flat.

    Keep `partial_rotary_factor`, the share of the head that rotates, since it belongs to the family, not to the scheme.
    """
    nested = {}
    for layer_type, parameters in each.items():
        share = native_parameters(config, layer_type).get("partial_rotary_factor")
        nested[layer_type] = parameters if share is None else {"partial_rotary_factor": share, **parameters}
    return nested[None] if None in nested else {**native_parameters(config), **nested}


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
        written["rope_parameters"] = native_parameters(config)
    if adapter.rotary is not None and not keeps_rotation(scheme):
        if parameters is None or scheme.native_window not in (None, current if window is None else window):
            bases = {layer_type: native_parameters(config, layer_type).get("rope_theta") for layer_type in schemes}
            parameters = _nested(config, {k: {"rope_type": RECORD_KEY, "rope_theta": t} for k, t in bases.items()})
            needs_pe_patch = True
        native["rope_parameters"] = native_parameters(config)
        rotary = getattr(base, adapter.rotary)
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
