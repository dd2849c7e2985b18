"""Check the record of a patch that was read from a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING

from ..adapters import ADAPTERS
from ..errors import CheckpointError, OptionError, nearest, quoted
from ..schemes.registry import ALIASES, SCHEMES

VERSION = 1
RECORD_KEY = "pe_patch"
"""The key of the record in a config, and the `rope_type` of rotary parameters that Transformers cannot express."""
BESIDE = ("max_position_embeddings", "rope_parameters")
"""Keys of a config that a patch writes or starts from."""


def framework_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `patch_model` in a record, without the scheme and its options."""
    return {key: record[key] for key in ("layers", "submodule", "keep_native", "strict") if key in record}


Test = tuple[Callable[[Any], bool], str]
"""A predicate for allowed values, and the allowed values in words."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _layers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_whole(index) and index >= 0 for index in value)


def _texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _rotary(value: Any) -> bool:
    """Return whether a value can be rotary parameters, flat or nested by layer type."""
    if not isinstance(value, dict):
        return value is None
    theta = value.get("rope_theta", 1.0)
    return (
        _number(theta)
        and 0 < theta < 1e300
        and all(map(_rotary, (inner for inner in value.values() if isinstance(inner, dict))))
    )


SCHEME: dict[str, Test] = {
    "version": (lambda value: _whole(value) and value >= 1, "a whole number from 1"),
    "scheme": (_is(str), "the name of a scheme"),
    "options": (_is(dict), "an object with the options of the scheme, {} for none"),
    "layers": (_layers, "a list of layer numbers from 0"),
    "submodule": (_is(str), "the name of a submodule"),
    "keep_native": (_is(bool), "true or false"),
    "strict": (_is(bool), "true or false"),
}
CONFIG: dict[str, Test] = {
    "native": (_is(dict), "an object with the values that the config had before the patch"),
    "written": (_is(dict), "an object with the values that the patch wrote into the config"),
}
WINDOW: Test = (
    lambda value: value is None or (_whole(value) and 0 <= value < 2**31),
    "a whole number of tokens below 2147483648, or null",
)
NATIVE: dict[str, Test] = {
    "model_type": (
        lambda value: isinstance(value, str) and (value in CONFIG_MAPPING or value in ADAPTERS),
        "a family of Transformers, or one that was registered here",
    ),
    "config": (_is(str), "the key of the part of the config that was patched"),
    "max_position_embeddings": WINDOW,
    "rope_parameters": (_rotary, "an object with a positive rope_theta, or null"),
    "architectures": (_texts, "a list of class names, or null"),
    "hidden": (_is(dict), "an object with the value that the note for readers replaced"),
}
REMEDY = "Save the patched model again with save_pretrained, or restore the file as it was saved"


def check_scheme(record: Any, source: str) -> dict[str, Any]:
    """Return the record of a scheme from a file, after a check of its types, version and names.

    Args:
        record: the value in the file.
        source: the file, for messages.

    Raises:
        CheckpointError: the record is damaged or newer. The message names the file, the key and the value.
    """
    _check("", record, {}, (), source, "an object, the record of a patch")
    _check("", record, {"version": SCHEME["version"]}, ("version",), source)
    if record["version"] > VERSION:
        raise CheckpointError(
            f"{source} was written by a newer pe_patch (record version {record['version']}; this one reads up to "
            f"{VERSION}): upgrade pe_patch."
        )
    _check("", record, SCHEME, ("scheme", "options"), source)
    name = record["scheme"]
    if name not in SCHEMES and name not in ALIASES:
        raise CheckpointError(
            f"{source}: the record of the patch names the scheme {name!r}, which does not exist here."
            f"{nearest(name, SCHEMES)} Import what defines it first, or correct the name."
        )
    try:
        SCHEMES[ALIASES.get(name, name)].check_options(record["options"])
    except OptionError as error:
        raise CheckpointError(
            f"{source}: {RECORD_KEY}.options is {_shown(record['options'])}. {error} {REMEDY}."
        ) from error
    return record


def check_record(record: Any, stored: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the record of a patch in a model's config, after a check of its values and of the config around it.

    Args:
        record: the value of `pe_patch` in the config.
        stored: the whole config in the file.
        source: the file, for messages.

    Raises:
        CheckpointError: the record is damaged, has a newer version, or contradicts the config.
    """
    check_scheme(record, source)
    _check("", record, CONFIG, ("native",), source)
    native = record["native"]
    _check(".native", native, NATIVE, ("model_type",), source)
    part = native.get("config")
    if part is not None and not isinstance(stored.get(part), dict):
        raise CheckpointError(
            f"{source}: {RECORD_KEY}.native.config is {_shown(part)}, and the config has no such part ({part} is "
            f"{_shown(stored.get(part))}). {REMEDY}."
        )
    family = stored.get("model_type")
    if family != native["model_type"] and not str(family).startswith(RECORD_KEY):
        raise _contradiction(source, [("model_type", native["model_type"], family)])
    beside = stored if part is None else stored[part]
    apart = [
        each for key, value in record.get("written", {}).items() for each in differences(key, value, beside.get(key))
    ]
    if apart:
        raise _contradiction(source, apart, "" if part is None else f"{part}.")
    return record


def _contradiction(source: str, apart: list[tuple[str, Any, Any]], part: str = "") -> CheckpointError:
    conflicts = "; ".join(
        f"{part}{key} is {_shown(theirs)}, and the record of the patch was written beside {_shown(ours)}"
        for key, ours, theirs in apart[:4]
    )
    return CheckpointError(
        f"{source} contradicts itself: {conflicts}. The record ({RECORD_KEY}) decides how the model computes, so an "
        f"edit of the config alone has no effect. Write {', '.join(_shown(ours) for _, ours, _ in apart[:4])} back; to "
        "change the positions, load the model as it was saved, call patch_model(model, ..., on_existing='replace') and "
        "save it again."
    )


MISSING = "missing"


def differences(key: str, ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """Return the entries in which two values of a config differ, as tuples of name, first value and second value."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            difference
            for name in dict.fromkeys((*ours, *theirs))
            for difference in differences(f"{key}.{name}", ours.get(name, MISSING), theirs.get(name, MISSING))
        ]
    return [] if _same(ours, theirs) else [(key, ours, theirs)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(ours: Any, theirs: Any) -> bool:
    if _number(ours) and _number(theirs):
        small = abs(ours) < 1e300 and abs(theirs) < 1e300  # a longer integer has no float
        return ours == theirs or (small and math.isclose(ours, theirs, rel_tol=1e-6))
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check(
    where: str, values: Any, tests: dict[str, Test], required: tuple[str, ...], source: str, expected: str = "an object"
) -> None:
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{source}: the record of the patch is damaged: {RECORD_KEY}{where} is {_shown(values)}; expected "
            f"{expected}. {REMEDY}."
        )
    for key in required:
        if key not in values:
            raise CheckpointError(
                f"{source}: the record of the patch is damaged: {RECORD_KEY}{where} is {_shown(values)} and lacks "
                f"{quoted(key)}, {tests[key][1]}. {REMEDY}."
            )
    for key, (allowed, words) in tests.items():
        if key in values and not allowed(values[key]):
            raise CheckpointError(
                f"{source}: the record of the patch is damaged: {RECORD_KEY}{where}.{key} is {_shown(values[key])}; "
                f"expected {words}. {REMEDY}."
            )
