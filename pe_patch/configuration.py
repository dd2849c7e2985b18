"""What a patch writes into the config, so that other tools and saved checkpoints tell the truth."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .adapters import Adapter
from .adapters.adapter import native_parameters
from .errors import OptionError
from .scheme import Scheme
from .swaps import Swap

VERSION = 1
FOREIGN = "pe_patch"
"""The rope_type, or model_type, that plain Transformers refuses to load."""

Kinds = dict[str | None, Scheme]
"""The scheme of each layer type that a patch touches; under None where a family has no types."""


def record_of(scheme: Scheme, layers: list[int] | None, given: dict[str, Any]) -> dict[str, Any]:
    """What it takes to apply the same patch again, as it stands in `config.pe_patch`."""
    record: dict[str, Any] = {"version": VERSION, "scheme": scheme.name, "options": scheme.recorded}
    if layers is not None:
        record["layers"] = layers
    for key in ("submodule", "keep_native", "strict"):
        if given[key]:
            record[key] = given[key]
    try:
        return json.loads(json.dumps(record))
    except TypeError as error:
        raise OptionError(
            f"The options of {scheme.name!r} must be numbers, strings, lists or dicts, since they are saved with the "
            f"model: {error}."
        ) from error


def cache_specification(config: Any, record: dict[str, Any], kinds: Kinds) -> str:
    """Return what decides how a patched model encodes the keys that it caches, as JSON."""
    read = {
        str(kind): [scheme.shape.rope_theta, scheme.shape.trained_length, scheme.shape.rotary_dim]
        for kind, scheme in kinds.items()
    }
    return json.dumps([config.model_type, record, read], sort_keys=True)


def expressible(adapter: Adapter, config: Any, kinds: Kinds, record: dict[str, Any]) -> dict[str, Any] | None:
    """The `rope_parameters` (or an empty dict for a family without any) under which plain Transformers computes the
    same logits in one pass, or None if there are none."""
    if record.get("keep_native") or not _whole(adapter, config, kinds, record):
        return None
    scheme = next(iter(kinds.values()))
    if scheme.keeps_rotation:
        return {}
    if adapter.rotary is None:
        return {} if adapter.alibi and scheme.name == adapter.native and not scheme.options else None
    written = {kind: scheme.native() for kind, scheme in kinds.items()}
    each = {kind: parameters for kind, parameters in written.items() if parameters is not None}
    return _nested(config, each) if len(each) == len(written) else None


def _whole(adapter: Adapter, config: Any, kinds: Kinds, record: dict[str, Any]) -> bool:
    """Whether every layer of each type that is touched is touched."""
    chosen = record.get("layers")
    if chosen is None:
        return True
    return adapter.typed and not {kind for i, kind in enumerate(config.layer_types) if i not in chosen} & kinds.keys()


def _nested(config: Any, each: dict[str | None, dict[str, Any]]) -> dict[str, Any]:
    """Rotary parameters as the family writes them: those of each layer type, or flat.

    With them goes the share of the head that rotates, which belongs to the family and not to the scheme.
    """
    whole = {}
    for kind, parameters in each.items():
        share = native_parameters(config, kind).get("partial_rotary_factor")
        whole[kind] = parameters if share is None else {"partial_rotary_factor": share, **parameters}
    return whole[None] if None in whole else {**native_parameters(config), **whole}


def config_swaps(
    head: Any, base: Any, adapter: Adapter, kinds: Kinds, record: dict[str, Any], implementation: str
) -> list[Swap]:
    """The attention implementation, the effective window, the rotary parameters and the record."""
    config, scheme = base.config, next(iter(kinds.values()))
    swaps = [Swap.of(config, "_attn_implementation_internal", implementation)]
    native: dict[str, Any] = {"model_type": head.config.model_type}
    window, current = scheme.effective_window, getattr(config, "max_position_embeddings", None)
    if window is not None and window != current:
        swaps.append(Swap.of(config, "max_position_embeddings", int(window)))
        native["max_position_embeddings"] = current
    if adapter.rotary is not None and not scheme.keeps_rotation:
        parameters = expressible(adapter, config, kinds, record)
        if parameters is None or scheme.native_window not in (None, current if window is None else window):
            foreign = {kind: native_parameters(config, kind).get("rope_theta") for kind in kinds}
            parameters = _nested(config, {k: {"rope_type": FOREIGN, "rope_theta": t} for k, t in foreign.items()})
        native["rope_parameters"] = native_parameters(config)
        rotary = getattr(base, adapter.rotary)
        if getattr(rotary, "config", None) is config:  # where it stays in use, it may read it at every call (PhiMoE)
            swaps.append(Swap.of(rotary, "config", copy.copy(config), direct=True))
        swaps.append(Swap.of(config, "rope_parameters", parameters))
    if config is not head.config:
        native["config"] = next(key for key in head.config.sub_configs if getattr(head.config, key) is config)
    swaps.append(Swap.of(head.config, FOREIGN, {**record, "native": native}))
    return swaps


def saves_foreign(base: Any, adapter: Adapter, kinds: Kinds, record: dict[str, Any]) -> bool:
    """Families without rotary parameters have nothing in their config that plain Transformers would stumble over, so
    their `save_pretrained` is to write a model type that it does not know."""
    return adapter.rotary is None and expressible(adapter, base.config, kinds, record) is None


def save_foreign(
    model: Any, inner: Callable[..., Any], save_directory: str | os.PathLike, *args: Any, **kwargs: Any
) -> Any:
    """The model's own `save_pretrained`, with a model type that only `load_patched` knows."""
    result = inner(save_directory, *args, **kwargs)
    file = Path(save_directory) / "config.json"
    if file.exists():
        write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"model_type": FOREIGN})
    return result


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)
