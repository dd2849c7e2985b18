"""What a patch writes into the config, so that other tools and saved checkpoints tell the truth."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .adapters import Adapter
from .adapters.adapter import native_parameters
from .errors import OptionError
from .scheme import Scheme
from .swaps import Swap, bind

VERSION = 1
FOREIGN = "pe_patch"
"""The rope_type, or model_type, that plain Transformers refuses to load."""


def record_of(scheme: Scheme, layers: list[int] | None, given: dict[str, Any]) -> dict[str, Any]:
    """What it takes to apply the same patch again, as it stands in `config.pe_patch`."""
    record: dict[str, Any] = {"version": VERSION, "scheme": scheme.name, "options": scheme.options}
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


def expressible(adapter: Adapter, scheme: Scheme, record: dict[str, Any]) -> dict[str, Any] | None:
    """The `rope_parameters` (or an empty dict for a family without any) under which plain Transformers computes the
    same logits in one pass, or None if there are none."""
    if "layers" in record or record.get("keep_native"):
        return None
    if adapter.rotary is None:
        return {} if adapter.alibi and scheme.name == adapter.native and not scheme.options else None
    return scheme.native()


def with_partial_rotary(config: Any, parameters: dict[str, Any]) -> dict[str, Any]:
    """Add the share of the head that rotates, which belongs to the family and not to the scheme."""
    share = native_parameters(config).get("partial_rotary_factor")
    return parameters if share is None else {"partial_rotary_factor": share, **parameters}


def config_swaps(
    head: Any, base: Any, adapter: Adapter, scheme: Scheme, record: dict[str, Any], implementation: str
) -> list[Swap]:
    """The attention implementation, the effective window, the rotary parameters and the record."""
    config = base.config
    swaps = [Swap.of(config, "_attn_implementation_internal", implementation)]
    native: dict[str, Any] = {"model_type": head.config.model_type}
    window, current = scheme.effective_window, getattr(config, "max_position_embeddings", None)
    if window is not None and window != current:
        swaps.append(Swap.of(config, "max_position_embeddings", int(window)))
        native["max_position_embeddings"] = current
    if adapter.rotary is not None:
        parameters = expressible(adapter, scheme, record)
        if parameters is None or scheme.native_window not in (None, current if window is None else window):
            theta = native_parameters(config).get("rope_theta")
            parameters = {"rope_type": FOREIGN, "rope_theta": theta}
        native["rope_parameters"] = native_parameters(config)
        swaps.append(Swap.of(config, "rope_parameters", with_partial_rotary(config, parameters)))
    if config is not head.config:
        native["config"] = next(key for key in head.config.sub_configs if getattr(head.config, key) is config)
    swaps.append(Swap.of(head.config, FOREIGN, {**record, "native": native}))
    return swaps


def save_swaps(head: Any, base: Any, adapter: Adapter, scheme: Scheme, record: dict[str, Any]) -> list[Swap]:
    """Families without rotary parameters have nothing in their config that plain Transformers would stumble over, so
    their `save_pretrained` writes a model type that it does not know."""
    if adapter.rotary is not None or expressible(adapter, scheme, record) is not None:
        return []
    return [bind(owner, "save_pretrained", save_foreign) for owner in {id(head): head, id(base): base}.values()]


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
