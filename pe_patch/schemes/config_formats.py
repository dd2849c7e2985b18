"""Read positional configs in all known formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.checks import LARGEST_BASE, LARGEST_FACTOR, check_number, check_window, to_builtin
from ..errors import OptionError, OptionValueError, UnsupportedError, nearest, quoted, unknown


class ConfigFault(OptionError):
    """A fault in a positional config, with the data that `doctor` needs to look for further ones."""

    def __init__(self, message: str, kind: str, *keys: str) -> None:
        super().__init__(message)
        self.kind = kind
        """"no_rotary_keys", "unread", "untyped", "two_formats", "outside_layer_type", "ratio", "lists" or one of
        `SYNONYMS`."""
        self.keys = keys


@dataclass(frozen=True)
class Specification:
    """A scheme by name, with its options."""

    scheme: str
    options: dict[str, Any] = field(default_factory=dict)
    partial_rotary_factor: float | None = None
    """Share of each head that rotates, if the config states it. It is only compared with the built model."""


Reading = Specification | dict[str, Specification]

TYPES = {
    "default": "rope",
    "none": "rope",  # llama.cpp
    "linear": "linear",
    "dynamic": "dynamic_ntk",
    "yarn": "yarn",
    "deepseek_yarn": "yarn",  # vLLM
    "dynamic-yarn": "dynamic_yarn",  # the YaRN authors' modelling code
    "dynamic_yarn": "dynamic_yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",  # Phi-3 before Transformers 4.43
    "proportional": "proportional",
}
"""Name of the scheme by `rope_type` (in Transformers 4 `type`)."""

UNSUPPORTED_TYPES = {
    "mrope": "positions along time, height and width",
    "xdrope": "positions along several axes",
    "axial": "positions along two axes",
    "deepseek_llama_scaling": "a temperature that grows with the position",
    "mllama4": "positions of a vision encoder",
    "fope": "learned mixes of frequencies, for which there is the scheme 'fope'",
    "pe_patch": "a scheme that the checkpoint's own record names; load it with load_patched",
}
UNSUPPORTED_KEYS = {
    "mrope_section": "positions along time, height and width",
    "mrope_interleaved": "positions along time, height and width",
    "llama_4_scaling_beta": "a temperature that grows with the position",
    "rope_ratio": "a base multiplied by this ratio; give rope_theta instead",
    "use_dynamic_ntk": "Qwen 1's stepped dynamic NTK",
}

OF_THE_FAMILY = ("mrope_section", "mrope_interleaved", "llama_4_scaling_beta")
"""Keys by which a model's own code acts under every scheme, so that they say nothing about its scaling."""

YARN_KEYS = {"factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
KEYS = {
    "rope": set(),
    "linear": {"factor"},
    "dynamic_ntk": {"factor", "expected_length"},
    "yarn": YARN_KEYS,
    "dynamic_yarn": YARN_KEYS | {"expected_length"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"long_factor", "short_factor", "factor", "attention_factor", "expected_length"},
    "proportional": {"partial_rotary_factor", "factor"},
}
"""Keys of a scheme's dict beside the type, the base and the trained window; they are names of options."""

NEEDS_WINDOW = {"dynamic_ntk", "yarn", "dynamic_yarn", "llama3", "longrope"}
"""Schemes whose formula holds the trained window, for which Transformers falls back to max_position_embeddings."""
FACTOR_IS_RATIO = {"linear", "yarn", "longrope"}
"""Schemes whose factor is max_position_embeddings over the trained window (Llama 3.1 has 8 where that ratio is 16)."""

UNSCALED_MAXIMA = {("qwen3", 40960): 32768, ("qwen3_moe", 40960): 32768, ("mistral", 32768): 8192}
"""Trained windows of models whose config allows more, by family and `max_position_embeddings`. A scaling that their
authors add starts from the trained window and leaves that number as it was."""

SYNONYMS = {
    "type": ("rope_type", "type"),
    "theta": ("rope_theta", "theta", "rotary_emb_base", "base"),
    "part": ("partial_rotary_factor", "rotary_pct"),
    "trained": ("original_max_position_embeddings",),
    "maximum": ("max_position_embeddings",),
}
WHOLE_CONFIG = {"model_type", "architectures", "hidden_size", "text_config", "rotary_pct", "rotary_emb_base"}
WHOLE_CONFIG |= {"rope_scaling", "rope_parameters", "max_position_embeddings"}
"""Keys that distinguish a model's whole config from a dict of rotary parameters."""


def yarn_temperature(factor: float, slope: float = 1.0) -> float:
    """Return 0.1 m ln s + 1, the square root of YaRN's inverse temperature; 1 without an extension.

    Source: Peng et al. 2023, arXiv 2309.00071, equation 22.
    """
    return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0


def trained_window_below(family: Any, maximum: Any) -> int | None:
    """Return the trained window of a family that ships this larger `max_position_embeddings`; else None."""
    return UNSCALED_MAXIMA.get((family, maximum)) if isinstance(family, str) and isinstance(maximum, int) else None


def read(config: Mapping[str, Any]) -> Reading:
    """Return the scheme and options that `config` describes, or one specification for each layer type.

    Reads v4 `rope_scaling`, v5 `rope_parameters` (flat, or nested per layer type), a model's whole config, and this
    library's own `{"scheme": name, **options}`.

    Raises:
        OptionError: a key that is unknown, or two that contradict each other.
        UnknownNameError: a rope type that does not exist.
        UnsupportedError: one that exists elsewhere and not here.
    """
    if not isinstance(config, Mapping) or not config:
        raise OptionError(f"A positional config is a dict that is not empty; got {quoted(config)}.")
    config = to_builtin(config)
    if stray := [key for key in config if not isinstance(key, str)]:
        raise OptionValueError(f"The keys of a positional config are strings; got {quoted(stray[0])}.")
    entries = {key: value for key, value in config.items() if value is not None or key == "rope_scaling"}
    if isinstance(record := entries.get("pe_patch", entries), Mapping) and "scheme" in record:
        return _read_library_dict(record)
    for key, value in entries.items():
        _check_kind(key, value)
    typed = any(key in entries for key in SYNONYMS["type"])
    if entries.keys() & {"rope_scaling", "rope_parameters"} or (not typed and entries.keys() & WHOLE_CONFIG):
        return _read_model_config(entries)
    if any(isinstance(value, Mapping) for value in entries.values()):
        return _nested(dict(config), {})
    return _read_rotary_dict(entries, {})


def _check_kind(key: str, value: Any) -> None:
    """Raise `OptionValueError` for what JSON cannot hold, such as a matrix, which nothing below could compare."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            _check_kind(f"{key}.{name}", entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            _check_kind(key, entry)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise OptionValueError(
            f"{key}={quoted(value)} is of type {type(value).__name__}; a config holds numbers, strings, lists and "
            "dicts."
        )


def _pop_value(entries: dict[str, Any], setting: str, outer: Mapping[str, Any] | None = None) -> Any:
    """Remove every synonym of `setting` from `entries` and return their one value.

    `outer` has the values of the config around the dict.
    """
    found = {key: entries.pop(key) for key in SYNONYMS[setting] if entries.get(key) is not None}
    if outer and outer.get(setting) is not None:
        found["the surrounding config's value"] = outer[setting]
    values = [
        TYPES.get(value, value) if setting == "type" and isinstance(value, str) else value for value in found.values()
    ]
    if any(value != values[0] for value in values):
        values_shown = " and ".join(f"{key}={quoted(value)}" for key, value in found.items())
        raise ConfigFault(f"Contradiction: {values_shown}. Keep the one that is meant.", setting, *found)
    return _checked(setting, values[0], next(iter(found))) if values else None


def _checked(setting: str, value: Any, key: str) -> Any:
    """Check the value of one of `SYNONYMS` and return it, or raise `OptionValueError`."""
    if setting == "type":
        if not isinstance(value, str):
            raise OptionValueError(f"{key}={quoted(value)} is no name of a rope type, such as 'yarn'.")
        return value
    if setting == "part":
        return check_number("config", key, value, 0.0, 1.0, exclusive=True)
    if setting == "theta":
        return check_number("config", key, value, 1.0, LARGEST_BASE, exclusive=True)
    return check_window("config", key, value)


def _read_library_dict(entries: Mapping[str, Any]) -> Specification:
    """Read `{"scheme": name, **options}`, or the record of a saved patch, `{"version", "scheme", "options"}`."""
    options = {key: value for key, value in entries.items() if key not in ("scheme", "version")}
    if isinstance(options.get("options"), Mapping):
        options = dict(options["options"])
    if not isinstance(entries.get("scheme"), str):
        raise OptionError(f"'scheme' must be the name of a scheme; got {quoted(entries.get('scheme'))}.")
    for key in SYNONYMS["type"]:
        if key in options:
            raise OptionError(f"Contradiction: 'scheme' and {quoted(key)} both name a scheme. Keep 'scheme'.")
    return Specification(entries["scheme"], options)


def _read_model_config(config: dict[str, Any]) -> Reading:
    """Read a model's whole config."""
    own_keys = {"rope_scaling", "rope_parameters", *SYNONYMS["theta"], *SYNONYMS["part"]}
    if isinstance(config.get("text_config"), Mapping) and not config.keys() & own_keys:
        return read(config["text_config"])
    if stray := config.keys() & {"factor", "long_factor", "attention_factor", "low_freq_factor"}:
        key = sorted(stray)[0]
        message = f"{quoted(key)} has no effect without a rope_type. Add rope_type='yarn', for example."
        raise ConfigFault(message, "untyped", *stray)
    if not config.keys() & own_keys:
        message = "This config says nothing of rotary positions: neither rope_parameters nor rope_theta."
        raise ConfigFault(message, "no_rotary_keys")
    _refuse(config)
    inner, other = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    for key, value in (("rope_parameters", inner), ("rope_scaling", other)):
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise OptionValueError(f"{key}={quoted(value)} is not a dict whose keys are strings.")
    if inner and other and dict(inner) != dict(other):
        message = "Contradiction: rope_parameters and rope_scaling differ. Keep rope_parameters."
        raise ConfigFault(message, "two_formats", "rope_parameters", "rope_scaling")
    inner = dict(inner or other)
    outer = {setting: _pop_value(config, setting) for setting in ("theta", "part", "trained", "maximum")}
    local = config.get("rope_local_base_freq")  # Gemma 3 before Transformers 5: one base for the sliding layers
    if any(isinstance(value, Mapping) for value in inner.values()):
        return _nested(inner, outer)
    before = trained_window_below(config.get("model_type"), outer["maximum"])
    if before is not None and before in (inner.get(SYNONYMS["trained"][0]), outer["trained"]):
        outer["maximum"] = before
    whole = _read_rotary_dict(inner, outer)
    if local is None:
        return whole
    local = check_number("config", "rope_local_base_freq", local, 1.0, LARGEST_BASE, exclusive=True)
    return {"full_attention": whole, "sliding_attention": Specification("rope", {"theta": local})}


def _nested(config: dict[str, Any], outer: Mapping[str, Any]) -> dict[str, Specification]:
    """Read one dict for each layer type; None means layers without positions."""
    for key, value in config.items():
        if value is not None and not isinstance(value, Mapping):
            message = f"{quoted(key)}={quoted(value)} is beside layer types; move it into the dict of each layer type."
            raise ConfigFault(message, "outside_layer_type", key)
    specifications = {}
    for layer, value in config.items():
        entries = dict(value or {})
        if stray := [key for key in (layer, *entries) if not isinstance(key, str)]:
            raise OptionValueError(f"The keys of a positional config are strings; got {quoted(stray[0])}.")
        default = {setting: value for setting, value in outer.items() if not entries.keys() & set(SYNONYMS[setting])}
        specifications[layer] = Specification("nope") if value is None else _read_rotary_dict(entries, default)
    return specifications


def _read_rotary_dict(entries: dict[str, Any], outer: Mapping[str, Any]) -> Specification:
    """Read a dict of rotary parameters; `outer` has theta, part, trained and maximum of the whole config."""
    entries = {key: value for key, value in entries.items() if value is not None}
    scheme = _scheme(entries)
    _refuse(entries)
    theta, part = _pop_value(entries, "theta", outer), _pop_value(entries, "part", outer)
    trained, maximum = _pop_value(entries, "trained", outer), _pop_value(entries, "maximum", outer)
    if scheme == "proportional" and part is not None:
        entries["partial_rotary_factor"], part = part, None
    if rewrite := REWRITES.get(scheme):
        rewrite(entries, maximum)
    allowed = KEYS[scheme]
    for key in entries:
        if key not in allowed:
            known = sorted(allowed | {"rope_type", "rope_theta", "original_max_position_embeddings"})
            message = (
                f"A config of {scheme!r} has no key {quoted(key)}.{nearest(key, known)} "
                f"Its keys are: {', '.join(known)}."
            )
            raise ConfigFault(message, "unread", key)
    if scheme in FACTOR_IS_RATIO:
        _reconcile(scheme, entries, trained, maximum)
    if trained is None and scheme in NEEDS_WINDOW:
        trained = maximum
    shared = {"theta": theta, "original_max_position_embeddings": trained}
    return Specification(scheme, entries | {key: value for key, value in shared.items() if value is not None}, part)


def _scheme(entries: dict[str, Any]) -> str:
    """Return the scheme that the dict's type names; without a type, plain RoPE if no key needs another scheme."""
    rope_type = _pop_value(entries, "type")
    if rope_type is None:
        extra = entries.keys() - {key for keys in SYNONYMS.values() for key in keys} - UNSUPPORTED_KEYS.keys()
        if extra:
            message = f"{sorted(extra)[0]!r} has no effect without a rope_type. Add rope_type='yarn', for example."
            raise ConfigFault(message, "untyped", *extra)
        return "rope"
    if rope_type in UNSUPPORTED_TYPES:
        raise UnsupportedError(f"rope_type {quoted(rope_type)} is not supported: {UNSUPPORTED_TYPES[rope_type]}.")
    if rope_type not in KEYS:
        raise unknown("rope_type", str(rope_type), TYPES)
    return rope_type


def _refuse(entries: Mapping[str, Any]) -> None:
    """Raise for a key that asks for something this library does not have."""
    for key, meaning in UNSUPPORTED_KEYS.items():
        if entries.get(key):
            raise UnsupportedError(f"{quoted(key)} is not supported: {meaning}.")


def _reconcile(scheme: str, entries: dict[str, Any], trained: Any, maximum: Any) -> None:
    """Derive a missing factor from the two windows, or check that a given factor agrees with them."""
    if not trained or not maximum or maximum == trained:  # equal: the config's window was left as it was
        return
    ratio, factor = maximum / trained, entries.get("factor")
    if factor is None:
        entries["factor"] = ratio
    elif (
        isinstance(factor, int | float)
        and math.isfinite(factor)
        and factor != math.ceil(ratio)
        and abs(factor - ratio) > 0.01 * ratio
    ):
        raise ConfigFault(
            f"Contradiction: {scheme!r} has factor={factor:g}, but max_position_embeddings={maximum} over "
            f"original_max_position_embeddings={trained} is {ratio:g}. Correct one of the three.",
            "ratio",
            "factor",
        )


def _rewrite_yarn(entries: dict[str, Any], maximum: Any) -> None:
    """Convert the YaRN authors' and vLLM's keys to options.

    `attn_factor` multiplies the temperature, `extrapolation_factor` is always 1, and `finetuned` does not affect a
    fixed factor.
    """
    entries.pop("finetuned", None)
    _rewrite_multiplier(entries)
    if entries.pop("extrapolation_factor", 1) != 1:
        raise UnsupportedError("'extrapolation_factor' other than 1 is not supported: no released model has one.")


def _rewrite_multiplier(entries: dict[str, Any]) -> None:
    multiplier = entries.pop("attn_factor", None)
    if multiplier is None:
        return
    multiplier = check_number("config", "attn_factor", multiplier, 0.0, LARGEST_FACTOR)
    given, factor = entries.get("attention_factor"), entries.get("factor")
    if given is not None:
        if given != multiplier:
            raise OptionError(
                f"Contradiction: attention_factor={quoted(given)} and attn_factor={quoted(multiplier)}. Keep "
                "attention_factor."
            )
    elif multiplier != 1:
        if not isinstance(factor, int | float) or "mscale" in entries:
            raise OptionError("'attn_factor' multiplies 0.1 ln factor + 1; give 'factor' with it and no 'mscale'.")
        entries["attention_factor"] = multiplier * yarn_temperature(check_number("config", "factor", factor, 1.0))


def _rewrite_dynamic_yarn(entries: dict[str, Any], maximum: Any) -> None:
    """Set `expected_length` for a model fine-tuned at its longest length."""
    if entries.get("finetuned") and maximum is not None:
        entries.setdefault("expected_length", maximum)
    _rewrite_yarn(entries, maximum)


def _rewrite_longrope(entries: dict[str, Any], maximum: Any) -> None:
    """Merge Phi-3.5-MoE's two attention factors, one for each list, into one."""
    short, long = entries.pop("short_mscale", None), entries.pop("long_mscale", None)
    if short != long:
        raise UnsupportedError(
            f"short_mscale={quoted(short)} and long_mscale={quoted(long)} differ; one factor must serve both."
        )
    if long is not None and entries.setdefault("attention_factor", long) != long:
        raise OptionError(
            f"Contradiction: attention_factor={quoted(entries['attention_factor'])} and long_mscale={quoted(long)}."
        )
    lists = [entries[key] for key in ("short_factor", "long_factor") if key in entries]
    if len(lists) == 2 and all(hasattr(one, "__len__") for one in lists) and len(lists[0]) != len(lists[1]):
        message = f"Contradiction: short_factor has {len(lists[0])} entries and long_factor {len(lists[1])}."
        raise ConfigFault(message, "lists", "short_factor", "long_factor")


REWRITES: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "yarn": _rewrite_yarn,
    "dynamic_yarn": _rewrite_dynamic_yarn,
    "longrope": _rewrite_longrope,
}
"""Keys of some formats that have to be converted to options."""
