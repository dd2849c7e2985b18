"""What a patch writes into the config, so that other tools and saved checkpoints tell the truth."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

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
"""The scheme of each layer type that a patch touches; under None where a family has no types."""


def cache_specification(config: Any, record: dict[str, Any], schemes: SchemeByLayerType) -> str:
    """Return what decides how a patched model encodes the keys that it caches, as JSON."""
    read = {
        str(layer_type): [scheme.shape.rope_theta, scheme.shape.trained_length, scheme.shape.rotary_dim]
        for layer_type, scheme in schemes.items()
    }
    return json.dumps([config.model_type, record, read], sort_keys=True)


def expressible(
    adapter: Adapter, config: Any, schemes: SchemeByLayerType, record: dict[str, Any]
) -> dict[str, Any] | None:
    """The `rope_parameters` (or an empty dict for a family without any) under which plain Transformers computes the
    same logits in one pass, or None if there are none."""
    if record.get("keep_native") or not _whole(adapter, config, schemes, record):
        return None
    scheme = next(iter(schemes.values()))
    if keeps_rotation(scheme):
        return {}
    if adapter.rotary is None:
        return {} if adapter.alibi and scheme.name == adapter.native and not scheme.options else None
    parameters = native_rope_parameters(config, schemes)
    return None if parameters is None or refusal(config, parameters) else parameters


def native_rope_parameters(config: Any, schemes: SchemeByLayerType) -> dict[str, Any] | None:
    """Return the `rope_parameters` of the schemes in Transformers' own terms, None if it has no terms for one."""
    each = {
        layer_type: parameters for layer_type, scheme in schemes.items() if (parameters := scheme.native()) is not None
    }
    return _nested(config, each) if len(each) == len(schemes) else None


def refusal(config: Any, parameters: dict[str, Any]) -> str:
    """Return why the family's config class does not take these `rope_parameters` as they are; empty if it does.

    A family may check them when a config is made and when it is saved, and may rewrite them (Phi-3 makes YaRN into
    LongRoPE), so a config is made here and asked.
    """
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        values = {key: value for key, value in config.to_dict().items() if key != RECORD_KEY}
        made = native_class_of(config).from_dict({**values, "rope_parameters": copy.deepcopy(parameters)})
        if hasattr(made, "validate"):
            made.validate()
    except (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError) as error:  # whatever checks raise
        return " ".join(str(error).split())
    finally:
        transformers.logging.set_verbosity(before)
    return "" if _kept(parameters, made.rope_parameters) else f"{type(config).__name__} changes them"


def _kept(given: Any, found: Any) -> bool:
    if isinstance(given, dict) and isinstance(found, dict):
        return all(key in found and _kept(value, found[key]) for key, value in given.items())
    return given == found or (isinstance(given, tuple | list) and list(given) == list(found))


def _whole(adapter: Adapter, config: Any, schemes: SchemeByLayerType, record: dict[str, Any]) -> bool:
    """Whether every layer of each type that is touched is touched."""
    chosen = record.get("layers")
    if chosen is None:
        return True
    return (
        adapter.typed
        and not {layer_type for i, layer_type in enumerate(config.layer_types) if i not in chosen} & schemes.keys()
    )


def _nested(config: Any, each: dict[str | None, dict[str, Any]]) -> dict[str, Any]:
    """Rotary parameters as the family writes them: those of each layer type, or flat.

    With them goes the share of the head that rotates, which belongs to the family and not to the scheme.
    """
    whole = {}
    for layer_type, parameters in each.items():
        share = native_parameters(config, layer_type).get("partial_rotary_factor")
        whole[layer_type] = parameters if share is None else {"partial_rotary_factor": share, **parameters}
    return whole[None] if None in whole else {**native_parameters(config), **whole}


def config_swaps(
    model: Any,
    base: Any,
    adapter: Adapter,
    schemes: SchemeByLayerType,
    record: dict[str, Any],
    implementation: str,
) -> list[Swap]:
    """The attention implementation, the effective window, the rotary parameters and the record."""
    config, scheme = base.config, next(iter(schemes.values()))
    swaps = [Swap.of(config, "_attn_implementation_internal", implementation)]
    native: dict[str, Any] = {"model_type": model.config.model_type}
    window, current = scheme.effective_window, getattr(config, "max_position_embeddings", None)
    written: dict[str, Any] = {"max_position_embeddings": current}
    if window is not None and window != current:
        swaps.append(Swap.of(config, "max_position_embeddings", int(window)))
        written["max_position_embeddings"] = int(window)
        native["max_position_embeddings"] = current
    parameters = expressible(adapter, config, schemes, record)
    foreign = parameters is None
    if adapter.rotary is not None:
        written["rope_parameters"] = native_parameters(config)
    if adapter.rotary is not None and not keeps_rotation(scheme):
        if parameters is None or scheme.native_window not in (None, current if window is None else window):
            bases = {layer_type: native_parameters(config, layer_type).get("rope_theta") for layer_type in schemes}
            parameters = _nested(config, {k: {"rope_type": RECORD_KEY, "rope_theta": t} for k, t in bases.items()})
            foreign = True
        native["rope_parameters"] = native_parameters(config)
        rotary = getattr(base, adapter.rotary)
        if getattr(rotary, "config", None) is config:  # where it stays in use, it may read it at every call (PhiMoE)
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
    if foreign:
        swaps += [Mark.of(each) for each in ((config,) if config is model.config else (config, model.config))]
    return swaps


def _as_saved(config: Any, written: dict[str, Any]) -> dict[str, Any]:
    """Return the values under the names that they have in the file of this family, as JSON reads them."""
    saved = {config.attribute_map.get(key, key): written[key] for key in BESIDE if written.get(key) is not None}
    return json.loads(json.dumps(saved))


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)
