"""Read the scheme that a config claims, and find the faults in its keys.

`config_formats.read` stops at the first fault. This module records each fault, replaces it by what Transformers makes
of it, and reads on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any

from transformers import modeling_rope_utils

from ..adapters.trained_window import OTHER_NAMES, is_count
from ..errors import OptionError, UnknownNameError, UnsupportedError
from ..schemes import config_formats
from ..schemes.config_formats import SYNONYMS, TYPES, ConfigFault, Reading
from ..schemes.registry import SCHEMES
from .examined import ExaminedModel
from .finding import Finding

ROPE_DICTS = ("rope_parameters", "rope_scaling")
READ_BY_TRANSFORMERS = {*modeling_rope_utils.RopeParameters.__annotations__, "type"}
TYPES_OF_TRANSFORMERS = {"default", *modeling_rope_utils.ROPE_INIT_FUNCTIONS}
TOP_LEVEL_KEYS = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "max_position_embeddings"}
TOP_LEVEL_KEYS |= set(ROPE_DICTS)
"""The top-level rotary keys, to recognize a misspelled one."""


def read_claim(examined: ExaminedModel) -> tuple[Reading | None, list[Finding]]:
    """Return the scheme that the config claims (None if unreadable), and the faults of its keys."""
    findings = list(_misnamed_keys(examined))
    raw_config = copy.deepcopy(examined.raw_config)
    while True:
        try:
            return config_formats.read(raw_config), [*findings, *_unread_keys(examined, findings)]
        except ConfigFault as fault:
            if fault.kind in ("no_rotary_keys", "lists"):  # `check_lengths` checks the lists
                return None, findings
            if fault.kind == "outside_layer_type" and fault.keys == ("truncate",):
                _push_down(raw_config, "truncate")
                continue
            explain, repair = FAULTS.get(fault.kind, (_contradiction, _keep_inner))
            findings.append(explain(examined, fault))
            before = copy.deepcopy(raw_config)
            repair(raw_config, fault)
            if raw_config == before:  # the repair changed nothing, so reading would fail again
                return None, findings
        except UnknownNameError as error:
            return None, [*findings, _unknown_type(examined, error)]
        except UnsupportedError:
            return None, findings
        except OptionError as error:
            where, remedy = _path_of(raw_config), "Correct the value, or remove the key."
            return None, [*findings, Finding("contradiction", "error", where, str(error), "unclear", remedy)]


def rope_dicts(raw_config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every dict of rope parameters in a config with its path: flat ones, and those of each layer type."""
    for prefix, config in (("", raw_config), ("text_config.", raw_config.get("text_config"))):
        for name in ROPE_DICTS:
            entries = config.get(name) if isinstance(config, dict) else None
            if isinstance(entries, dict):
                yield f"{prefix}{name}", entries
                for layer_type, inner in entries.items():
                    if isinstance(inner, dict):
                        yield f"{prefix}{name}.{layer_type}", inner


def _path_of(raw_config: dict[str, Any], key: str | None = None) -> str:
    """Return the path of a rotary key, or without a key the path of the first dict of rope parameters."""
    dicts = list(rope_dicts(raw_config))
    paths = (f"{path}.{key}" for path, entries in dicts if key in entries)
    return next(paths, key or next(iter(dict(dicts)), "config"))


def _unread_key(examined: ExaminedModel, fault: ConfigFault) -> Finding:
    key = fault.keys[0]
    path = _path_of(examined.raw_config, key)
    entries = dict(rope_dicts(examined.raw_config)).get(path.rpartition(".")[0], {})
    value, scheme = entries.get(key), TYPES.get(str(entries.get("rope_type", entries.get("type"))), "rope")
    near = get_close_matches(key, [*config_formats.KEYS[scheme], "original_max_position_embeddings", "rope_theta"], n=1)
    default = f" {near[0]} {_default(scheme, near[0], entries)}." if near else ""
    remedy = f'Write "{near[0]}": {value!r} instead.' if near else f"Remove {key!r}."
    return Finding(
        "unknown_key", "error", path, f"{key}={value!r}", f"Transformers does not read it.{default}",
        f"{remedy} The keys of {scheme!r}: {', '.join(sorted(config_formats.KEYS[scheme]))}.",
    )  # fmt: skip


def _default(scheme: str, option: str, entries: dict[str, Any]) -> str:
    if option in entries:
        return f"is {entries[option]!r}"
    default = next((p.default for p in SCHEMES[scheme].declared_options() if p.name == option), None)
    return f"is {default!r}, the default" if isinstance(default, int | float) else "stays at its default"


def _untyped(examined: ExaminedModel, fault: ConfigFault) -> Finding:
    keys = ", ".join(sorted(fault.keys))
    return Finding(
        "scaling_ignored", "error", _path_of(examined.raw_config, sorted(fault.keys)[0]), f"{keys} without a type",
        "plain RoPE: without 'rope_type' Transformers uses \"default\" and ignores these keys",
        'Add "rope_type": "linear" (or "dynamic", "yarn", "llama3", "longrope"), or remove the keys.',
    )  # fmt: skip


def _two_dialects(examined: ExaminedModel, fault: ConfigFault) -> Finding:
    config = examined.raw_text_config
    if not any(key in config for key in ROPE_DICTS):
        config = examined.raw_config
    parameters, scaling = format_value(config["rope_parameters"]), format_value(config["rope_scaling"])
    return Finding(
        "two_dialects", "error", "rope_scaling, rope_parameters",
        f"rope_parameters={parameters}, rope_scaling={scaling}",
        "rope_scaling: Transformers takes it whole and drops rope_parameters, including its rope_theta",
        "Remove rope_scaling and write every value, including rope_theta, into rope_parameters.",
    )  # fmt: skip


def _beside(examined: ExaminedModel, fault: ConfigFault) -> Finding:
    path = _path_of(examined.raw_config, fault.keys[0])
    return Finding(
        "scaling_ignored", "error", path, f"{path.rpartition('.')[2]} beside the dicts of layer types",
        "not read: each layer type reads only its own dict",
        "Move the key into the dict of each layer type that needs it, or remove it.",
    )  # fmt: skip


def _contradiction(examined: ExaminedModel, fault: ConfigFault) -> Finding:
    kind, keys = fault.kind, list(fault.keys)
    values = [f"{path}.{key}={entries[key]!r}" for path, entries in rope_dicts(examined.raw_config)
              for key in SYNONYMS[kind] if entries.get(key) is not None]  # fmt: skip
    values += [
        f"{key}={examined.raw_text_config[key]!r}"
        for key in SYNONYMS[kind]
        if examined.raw_text_config.get(key) is not None
    ]
    effect = "the innermost value"
    if kind == "theta":
        parameters = [examined.parameters(rotation.layer_type) for rotation in examined.rotations()]
        bases = sorted({f"{each['rope_theta']:.10g}" for each in parameters if each.get("rope_theta")})
        effect = f"base {', '.join(bases)}: the value in the rope parameters wins"
    if kind == "type":
        effect = "'rope_type' wins"
    return Finding(
        "theta_lost" if kind == "theta" else "contradiction", "error", _path_of(examined.raw_config, keys[0]),
        " and ".join(dict.fromkeys(values)), effect,
        f"Keep the value that you want as {SYNONYMS[kind][0]!r} in rope_parameters, and remove the others.",
    )  # fmt: skip


def _ratio(examined: ExaminedModel, fault: ConfigFault) -> Finding:
    path = _path_of(examined.raw_config, "factor")
    entries = dict(rope_dicts(examined.raw_config)).get(path.rpartition(".")[0], {})
    trained = written_window(examined.raw_config, entries)
    factor, maximum = float(entries["factor"]), examined.window
    if trained > maximum:
        return window_reversed(path, trained, maximum)
    reach = int(factor * trained)
    return Finding(
        "factor_mismatch", "error", path,
        f"factor={factor:g}, but max_position_embeddings={maximum} over original_max_position_embeddings={trained} is "
        f"{maximum / trained:g}",
        f"frequencies for {reach} tokens ({factor:g} x {trained}); servers and evaluation tools use {maximum}",
        f'Write "max_position_embeddings": {reach}, or "factor": {maximum / trained:g}.',
    )  # fmt: skip


def window_reversed(where: str, trained: int, maximum: int) -> Finding:
    """Return the finding that the trained window exceeds the extended one."""
    return Finding(
        "window_reversed", "error", where,
        f"original_max_position_embeddings={trained} and max_position_embeddings={maximum}",
        f"a scaling that starts from {trained} trained tokens, in a model that claims {maximum}",
        "original_max_position_embeddings is the length before scaling, max_position_embeddings the length after. "
        f'Write "original_max_position_embeddings": {maximum}, "max_position_embeddings": {trained}, or correct both.',
    )  # fmt: skip


def written_window(raw_config: dict[str, Any], entries: dict[str, Any]) -> int:
    """Return the trained window that the rope dict `entries` or the config states, in tokens; 0 if undeclared."""
    key = "original_max_position_embeddings"
    inner = raw_config.get("text_config")
    text = inner if isinstance(inner, dict) else raw_config
    return int(entries.get(key) or text.get(key) or raw_config.get(key) or 0)


def _unknown_type(examined: ExaminedModel, error: UnknownNameError) -> Finding:
    path = next((f"{p}.{key}" for p, entries in rope_dicts(examined.raw_config) for key in ("rope_type", "type")
                 if entries.get(key) not in (None, *TYPES)), "rope_type")  # fmt: skip
    return Finding(
        "unknown_type", "error", path, f"{error}".split(" There are")[0], "no such type",
        f"Write one of {', '.join(sorted(TYPES_OF_TRANSFORMERS))}.",
    )  # fmt: skip


def _remove(raw_config: dict[str, Any], fault: ConfigFault) -> None:
    """Remove the keys from the rope parameters; without a type, also from the config around them."""
    dicts = [entries for _, entries in rope_dicts(raw_config)]
    if fault.kind == "untyped":
        dicts += [raw_config, raw_config.get("text_config") or {}]
    for entries in dicts:
        for key in fault.keys:
            entries.pop(key, None)


def _keep_scaling(raw_config: dict[str, Any], fault: ConfigFault) -> None:
    for config in (raw_config, raw_config.get("text_config")):
        if isinstance(config, dict) and all(config.get(key) for key in ROPE_DICTS):
            dropped = config.pop("rope_parameters")
            if dropped.get("rope_theta"):  # the config still claims this base
                config["rope_theta"] = dropped["rope_theta"]


def _keep_inner(raw_config: dict[str, Any], fault: ConfigFault) -> None:
    """Keep a value inside the rope parameters over one beside them, and the first of two synonyms in one dict."""
    if fault.kind not in SYNONYMS or fault.kind == "type":  # each of two types needs different keys
        return
    names = SYNONYMS[fault.kind]
    inside = any(entries.get(key) is not None for _, entries in rope_dicts(raw_config) for key in names)
    outside = [raw_config, raw_config.get("text_config") or {}] if inside else []
    kept = fault.keys[0]
    for entries in outside:
        for key in names:
            entries.pop(key, None)
    for _, entries in rope_dicts(raw_config):
        for key in names:
            if key != kept and entries.get(kept) is not None:
                entries.pop(key, None)


def _push_down(raw_config: dict[str, Any], key: str) -> None:
    """Move `truncate` into the YaRN dicts: Transformers reads it only beside the dicts of layer types."""
    for _, entries in list(rope_dicts(raw_config)):
        if any(isinstance(inner, dict) for inner in entries.values()) and key in entries:
            value = entries.pop(key)
            for inner in entries.values():
                if isinstance(inner, dict) and TYPES.get(str(inner.get("rope_type", inner.get("type")))) == "yarn":
                    inner[key] = value


def _drop_window(raw_config: dict[str, Any], fault: ConfigFault) -> None:
    for config in (raw_config, raw_config.get("text_config")):
        if isinstance(config, dict):
            config.pop("max_position_embeddings", None)


FAULTS: dict[
    str, tuple[Callable[[ExaminedModel, ConfigFault], Finding], Callable[[dict[str, Any], ConfigFault], None]]
] = {
    "unread": (_unread_key, _remove),
    "untyped": (_untyped, _remove),
    "outside_layer_type": (_beside, _remove),
    "two_formats": (_two_dialects, _keep_scaling),
    "ratio": (_ratio, _drop_window),
}
"""For each kind of fault, the function that describes it and the one that removes it from the config."""


def _misnamed_keys(examined: ExaminedModel) -> Iterator[Finding]:
    """Find top-level keys that are misspelled rotary keys, or that hold rope parameters under another name."""
    known = type(examined.text_config)
    for key, value in examined.raw_text_config.items():
        if key in TOP_LEVEL_KEYS or hasattr(known, key) or key in getattr(known, "__dataclass_fields__", {}):
            continue
        near = get_close_matches(key, TOP_LEVEL_KEYS, n=1, cutoff=0.85)
        typed = isinstance(value, dict) and str(value.get("rope_type", value.get("type"))) in TYPES.keys() - {"none"}
        if near or (typed and key != "pe_patch"):
            name = near[0] if near else "rope_parameters"
            yield Finding(
                "unknown_key", "error", key, f"{key}={format_value(value)}", "Transformers does not read it.",
                f"Rename it to {name!r}.",
            )  # fmt: skip


def _unread_keys(examined: ExaminedModel, findings: list[Finding]) -> Iterator[Finding]:
    """Find rotary keys that only other tools read and that no finding reports yet."""
    reported = {finding.where for finding in findings}
    for path, entries in rope_dicts(examined.raw_config):
        for key, value in entries.items():
            if key not in READ_BY_TRANSFORMERS and not isinstance(value, dict) and f"{path}.{key}" not in reported:
                yield Finding(
                    "unread_key", "note", f"{path}.{key}", f"{key}={value!r}",
                    "Transformers does not read it; if that changes a number, another finding reports it",
                    "Remove it, or keep it for the tool that reads it.",
                )  # fmt: skip


def named_window(examined: ExaminedModel) -> tuple[str, dict[str, Any]]:
    """Return the family's key for the window, and every config key that states a window with its value."""
    mapped = getattr(examined.text_config, "attribute_map", {})
    key = mapped.get("max_position_embeddings", "max_position_embeddings")
    names = dict.fromkeys((key, "max_position_embeddings", *OTHER_NAMES))
    return key, {
        name: examined.raw_text_config[name] for name in names if examined.raw_text_config.get(name) is not None
    }


def filled_in(examined: ExaminedModel) -> bool:
    """Return whether the window is only the default of the config class.

    This does not apply to a `text_config`, in which Transformers omits default values.
    """
    known = is_count(getattr(examined.text_config, "max_position_embeddings", None))
    return (
        known
        and not examined.live
        and examined.raw_text_config is examined.raw_config
        and not named_window(examined)[1]
    )


def format_value(value: Any) -> str:
    """Return a config value as short text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{value[0]}, {value[1]}, ... {value[-1]}]"
    return f"{value}"
