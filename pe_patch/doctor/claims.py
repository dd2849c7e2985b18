"""What a config claims, and the faults in its keys.

`dialects.read` stops at the first fault. Here each is written down, what Transformers makes of it is put in its place,
and reading goes on.
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
from .finding import Finding
from .subject import Subject

ROPE_DICTS = ("rope_parameters", "rope_scaling")
READ_BY_TRANSFORMERS = {*modeling_rope_utils.RopeParameters.__annotations__, "type"}
TYPES_OF_TRANSFORMERS = {"default", *modeling_rope_utils.ROPE_INIT_FUNCTIONS}
LONE_KEYS = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "max_position_embeddings"}
LONE_KEYS |= set(ROPE_DICTS)
"""Keys of a whole config that a misspelt one is compared with."""


def read_claim(subject: Subject) -> tuple[Reading | None, list[Finding]]:
    """The scheme that the config asks for, None where it asks for none that is known; and the faults of its keys."""
    findings = list(_stray(subject))
    said = copy.deepcopy(subject.said)
    while True:
        try:
            return config_formats.read(said), [*findings, *_unread(subject, findings)]
        except ConfigFault as fault:
            if fault.kind in ("silent", "lists"):  # lists are looked at by themselves
                return None, findings
            if fault.kind == "beside" and fault.keys == ("truncate",):
                _push_down(said, "truncate")
                continue
            explain, repair = FAULTS.get(fault.kind, (_contradiction, _keep_inner))
            findings.append(explain(subject, fault))
            before = copy.deepcopy(said)
            repair(said, fault)
            if said == before:  # nothing that can be taken away, so nothing more can be read
                return None, findings
        except UnknownNameError as error:
            return None, [*findings, _unknown_type(subject, error)]
        except UnsupportedError:
            return None, findings
        except OptionError as error:
            remedy = "Correct the value, or remove the key."
            return None, [*findings, Finding("contradiction", "error", _where(said), str(error), "unclear", remedy)]


def rope_dicts(said: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dict of rotary parameters in a config, with its path: flat, and of each layer type."""
    for prefix, config in (("", said), ("text_config.", said.get("text_config"))):
        for name in ROPE_DICTS:
            entries = config.get(name) if isinstance(config, dict) else None
            if isinstance(entries, dict):
                yield f"{prefix}{name}", entries
                for kind, inner in entries.items():
                    if isinstance(inner, dict):
                        yield f"{prefix}{name}.{kind}", inner


def _where(said: dict[str, Any], key: str | None = None) -> str:
    """The path of a key, or of the rotary parameters as a whole."""
    paths = list(rope_dicts(said))
    found = (f"{path}.{key}" for path, entries in paths if key in entries)
    return next(found, key or next(iter(dict(paths)), "config"))


def _unread_key(subject: Subject, fault: ConfigFault) -> Finding:
    key = fault.keys[0]
    path = _where(subject.said, key)
    entries = dict(rope_dicts(subject.said)).get(path.rpartition(".")[0], {})
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
    found = next((p.default for p in SCHEMES[scheme].declared_options() if p.name == option), None)
    return f"is {found!r}, the default" if isinstance(found, int | float) else "stays at its default"


def _untyped(subject: Subject, fault: ConfigFault) -> Finding:
    keys = ", ".join(sorted(fault.keys))
    return Finding(
        "scaling_ignored", "error", _where(subject.said, sorted(fault.keys)[0]), f"{keys} without a type",
        "plain RoPE: without 'rope_type' Transformers takes \"default\" and reads none of it",
        'Add "rope_type": "linear" (or "dynamic", "yarn", "llama3", "longrope"), or remove the keys.',
    )  # fmt: skip


def _two_dialects(subject: Subject, fault: ConfigFault) -> Finding:
    text = subject.text if any(key in subject.text for key in ROPE_DICTS) else subject.said
    return Finding(
        "two_dialects", "error", "rope_scaling, rope_parameters",
        f"rope_parameters={short(text['rope_parameters'])}, rope_scaling={short(text['rope_scaling'])}",
        "rope_scaling: Transformers takes it whole and drops rope_parameters, with the base in it",
        "Remove rope_scaling and write all that is meant, rope_theta too, into rope_parameters.",
    )  # fmt: skip


def _beside(subject: Subject, fault: ConfigFault) -> Finding:
    path = _where(subject.said, fault.keys[0])
    return Finding(
        "scaling_ignored", "error", path, f"{path.rpartition('.')[2]} beside the dicts of layer types",
        "not read: each layer type turns by its own dict alone",
        "Move the key into the dict of each layer type that is meant, or remove it.",
    )  # fmt: skip


def _contradiction(subject: Subject, fault: ConfigFault) -> Finding:
    what, keys = fault.kind, list(fault.keys)
    values = [f"{path}.{key}={entries[key]!r}" for path, entries in rope_dicts(subject.said)
              for key in SYNONYMS[what] if entries.get(key) is not None]  # fmt: skip
    values += [f"{key}={subject.text[key]!r}" for key in SYNONYMS[what] if subject.text.get(key) is not None]
    effect = "the innermost value"
    if what == "theta":
        parameters = [subject.parameters(turning.kind) for turning in subject.turnings()]
        bases = sorted({f"{each['rope_theta']:.10g}" for each in parameters if each.get("rope_theta")})
        effect = f"base {', '.join(bases)}: the one in the rotary parameters wins"
    if what == "type":
        effect = "'rope_type' wins"
    return Finding(
        "theta_lost" if what == "theta" else "contradiction", "error", _where(subject.said, keys[0]),
        " and ".join(dict.fromkeys(values)), effect,
        f"Keep the value that is meant, once, as {SYNONYMS[what][0]!r} in rope_parameters.",
    )  # fmt: skip


def _ratio(subject: Subject, fault: ConfigFault) -> Finding:
    path = _where(subject.said, "factor")
    entries = dict(rope_dicts(subject.said)).get(path.rpartition(".")[0], {})
    trained = said_window(subject.said, entries)
    factor, maximum = float(entries["factor"]), subject.window
    if trained > maximum:
        return window_reversed(path, trained, maximum)
    reach = int(factor * trained)
    return Finding(
        "factor_mismatch", "error", path,
        f"factor={factor:g}, yet max_position_embeddings={maximum} over original_max_position_embeddings={trained} is "
        f"{maximum / trained:g}",
        f"frequencies for {reach} tokens ({factor:g} x {trained}); servers and harnesses go by {maximum}",
        f'Write "max_position_embeddings": {reach}, or "factor": {maximum / trained:g}.',
    )  # fmt: skip


def window_reversed(where: str, trained: int, maximum: int) -> Finding:
    """The trained window is said to be longer than the extended one."""
    return Finding(
        "window_reversed", "error", where,
        f"original_max_position_embeddings={trained} and max_position_embeddings={maximum}",
        f"a scaling that starts from {trained} trained tokens, in a model that claims {maximum}",
        "original_max_position_embeddings is the length before scaling and max_position_embeddings the one after: "
        f'write "original_max_position_embeddings": {maximum}, "max_position_embeddings": {trained}, or correct both.',
    )  # fmt: skip


def said_window(said: dict[str, Any], entries: dict[str, Any]) -> int:
    """The trained window that is written in the dict itself or beside it; 0 where none is."""
    key = "original_max_position_embeddings"
    inner = said.get("text_config")
    text = inner if isinstance(inner, dict) else said
    return int(entries.get(key) or text.get(key) or said.get(key) or 0)


def _unknown_type(subject: Subject, error: UnknownNameError) -> Finding:
    path = next((f"{p}.{key}" for p, entries in rope_dicts(subject.said) for key in ("rope_type", "type")
                 if entries.get(key) not in (None, *TYPES)), "rope_type")  # fmt: skip
    return Finding(
        "unknown_type", "error", path, f"{error}".split(" There are")[0], "no such type",
        f"Write one of {', '.join(sorted(TYPES_OF_TRANSFORMERS))}.",
    )  # fmt: skip


def _remove(said: dict[str, Any], fault: ConfigFault) -> None:
    """Take the keys out of the rotary parameters; what stands beside them is out of reach of a scheme anyway."""
    places = [entries for _, entries in rope_dicts(said)]
    if fault.kind == "untyped":
        places += [said, said.get("text_config") or {}]
    for entries in places:
        for key in fault.keys:
            entries.pop(key, None)


def _keep_scaling(said: dict[str, Any], fault: ConfigFault) -> None:
    for config in (said, said.get("text_config")):
        if isinstance(config, dict) and all(config.get(key) for key in ROPE_DICTS):
            dropped = config.pop("rope_parameters")
            if dropped.get("rope_theta"):  # the base is part of the claim still
                config["rope_theta"] = dropped["rope_theta"]


def _keep_inner(said: dict[str, Any], fault: ConfigFault) -> None:
    """Where a value stands inside and outside, the one inside; where a dict has two, the first of the synonyms."""
    if fault.kind not in SYNONYMS or fault.kind == "type":  # of two types each would need keys of its own
        return
    names = SYNONYMS[fault.kind]
    inside = any(entries.get(key) is not None for _, entries in rope_dicts(said) for key in names)
    outside = [said, said.get("text_config") or {}] if inside else []
    kept = fault.keys[0]
    for entries in outside:
        for key in names:
            entries.pop(key, None)
    for _, entries in rope_dicts(said):
        for key in names:
            if key != kept and entries.get(kept) is not None:
                entries.pop(key, None)


def _push_down(said: dict[str, Any], key: str) -> None:
    """Transformers reads `truncate` beside the dicts of layer types, and there alone."""
    for _, entries in list(rope_dicts(said)):
        if any(isinstance(inner, dict) for inner in entries.values()) and key in entries:
            value = entries.pop(key)
            for inner in entries.values():
                if isinstance(inner, dict) and TYPES.get(str(inner.get("rope_type", inner.get("type")))) == "yarn":
                    inner[key] = value


def _leave_window(said: dict[str, Any], fault: ConfigFault) -> None:
    for config in (said, said.get("text_config")):
        if isinstance(config, dict):
            config.pop("max_position_embeddings", None)


FAULTS: dict[str, tuple[Callable[[Subject, ConfigFault], Finding], Callable[[dict[str, Any], ConfigFault], None]]] = {
    "unread": (_unread_key, _remove),
    "untyped": (_untyped, _remove),
    "beside": (_beside, _remove),
    "two_dialects": (_two_dialects, _keep_scaling),
    "ratio": (_ratio, _leave_window),
}
"""How each kind of fault is told, and what stands in its place for Transformers."""


def _stray(subject: Subject) -> Iterator[Finding]:
    """Keys of the whole config that mean a rotary one and are called otherwise."""
    known = type(subject.text_config)
    for key, value in subject.text.items():
        if key in LONE_KEYS or hasattr(known, key) or key in getattr(known, "__dataclass_fields__", {}):
            continue
        near = get_close_matches(key, LONE_KEYS, n=1, cutoff=0.85)
        typed = isinstance(value, dict) and str(value.get("rope_type", value.get("type"))) in TYPES.keys() - {"none"}
        if near or (typed and key != "pe_patch"):
            name = near[0] if near else "rope_parameters"
            yield Finding(
                "unknown_key", "error", key, f"{key}={short(value)}", "Transformers does not read it.",
                f"Call it {name!r}.",
            )  # fmt: skip


def _unread(subject: Subject, told: list[Finding]) -> Iterator[Finding]:
    """Keys that other tools read and Transformers does not, which matter only where they change a number."""
    reported = {finding.where for finding in told}
    for path, entries in rope_dicts(subject.said):
        for key, value in entries.items():
            if key not in READ_BY_TRANSFORMERS and not isinstance(value, dict) and f"{path}.{key}" not in reported:
                yield Finding(
                    "unread_key", "note", f"{path}.{key}", f"{key}={value!r}",
                    "Transformers does not read it; where that changes a number, another finding says so",
                    "Remove it, or leave it for the tool that reads it.",
                )  # fmt: skip


def named_window(subject: Subject) -> tuple[str, dict[str, Any]]:
    """Return the family's key for the window, and every key of the config that names one, with its value."""
    mapped = getattr(subject.text_config, "attribute_map", {})
    key = mapped.get("max_position_embeddings", "max_position_embeddings")
    names = dict.fromkeys((key, "max_position_embeddings", *OTHER_NAMES))
    return key, {name: subject.text[name] for name in names if subject.text.get(name) is not None}


def filled_in(subject: Subject) -> bool:
    """Return whether the window is the default of the config's class. A `text_config` is another matter: Transformers
    leaves out of it what its class says anyway."""
    known = is_count(getattr(subject.text_config, "max_position_embeddings", None))
    return known and not subject.live and subject.text is subject.said and not named_window(subject)[1]


def short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{value[0]}, {value[1]}, ... {value[-1]}]"
    return f"{value}"
