"""Find contradicting windows, factors and temperatures, and layers that cannot see the added length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .. import compat
from ..adapters.trained_window import built_window, is_count, trained_window
from ..schemes.config_formats import TYPES, trained_window_below, yarn_temperature
from .claims import filled_in, named_window, rope_dicts, window_reversed, written_window
from .examined import ExaminedModel
from .finding import Finding

FALLS_BACK = {"yarn", "dynamic_yarn", "llama3", "longrope"}
"""Schemes for which Transformers uses another window if original_max_position_embeddings is missing."""
TOLERANCE = 0.05
"""The relative difference between a factor on cos and sin and its formula that is not reported."""


def check_lengths(examined: ExaminedModel) -> list[Finding]:
    """Return all findings about lengths and temperatures."""
    findings = [*_fractional_window(examined), *_unknown_window(examined)]
    for path, entries in rope_dicts(examined.raw_config):
        scheme = TYPES.get(str(entries.get("rope_type", entries.get("type"))))
        if scheme in FALLS_BACK:
            findings += _window(examined, path, entries, scheme)
        factor = _factor(examined, entries)
        if scheme in ("yarn", "dynamic_yarn") and factor:
            findings += _yarn_temperature(path, entries, factor)
        if scheme == "longrope":
            findings += [*_lists(examined, path, entries), *_longrope_temperature(examined, path, entries, factor)]
        if scheme not in (None, "rope") and factor and factor > 1:
            findings += _sliding(examined, path, entries, factor)
    return findings


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _unknown_window(examined: ExaminedModel) -> Iterator[Finding]:
    """Find a window that is missing, is not a number of tokens, or was raised after the model was built."""
    config = examined.text_config
    if config is None or not hasattr(config, "max_position_embeddings"):
        return
    key, written = named_window(examined)
    remedy = f'Write the length that the model was trained for, such as "{key}": 4096.'
    if not written and filled_in(examined):
        yield Finding(
            "window_unknown", "error", key, "no window",
            f"{config.max_position_embeddings} tokens, the default of {type(config).__name__}", remedy,
        )  # fmt: skip
    for name, value in list(written.items())[:1]:
        if not is_count(value) and not isinstance(value, float):
            yield Finding("window_unknown", "error", name, f"{name}={value!r}", "not a number of tokens", remedy)
    built = built_window(examined.model) if examined.live else None
    if built is not None and examined.window > built[0]:
        yield Finding(
            "window_raised", "error", key, f"{key}={examined.window}",
            f"{built[0]} tokens, the length that {built[1]} was built for: the config changed afterwards",
            f'Use patch_model(model, "yarn", factor={examined.window / built[0]:g}), or set it back to {built[0]}.',
        )  # fmt: skip


def _trained(examined: ExaminedModel, entries: dict[str, Any]) -> int:
    """Return the trained window in effect, in tokens."""
    written = written_window(examined.raw_config, entries)
    parameters = examined.parameters(None) or examined.parameters("full_attention")
    return written or int(parameters.get("original_max_position_embeddings") or examined.window)


def _factor(examined: ExaminedModel, entries: dict[str, Any]) -> float | None:
    """Return the factor in effect: the written one, or else the ratio of the two windows."""
    written, trained = entries.get("factor"), _trained(examined, entries)
    return _number(written) if written is not None else examined.window / trained if trained else None


def _fractional_window(examined: ExaminedModel) -> Iterator[Finding]:
    maximum = examined.raw_text_config.get("max_position_embeddings")
    if isinstance(maximum, float):
        yield Finding(
            "window_not_whole", "error", "max_position_embeddings", f"max_position_embeddings={maximum!r}",
            "a number of tokens with a decimal point", f'Write "max_position_embeddings": {int(maximum)}.',
        )  # fmt: skip


def _window(examined: ExaminedModel, path: str, entries: dict[str, Any], scheme: str) -> Iterator[Finding]:
    written, maximum = written_window(examined.raw_config, entries), examined.window
    where = f"{path}.original_max_position_embeddings"
    factor = _number(entries.get("factor"))
    if not written and not examined.live and maximum:
        fallback = _trained(examined, entries)
        remedy = 'Write the window before the extension as "original_max_position_embeddings".'
        if factor:
            if_extended = (
                f'"original_max_position_embeddings": {int(maximum / factor)} if {maximum} is the extended window'
            )
            if_original = (
                f'"original_max_position_embeddings": {maximum}, "max_position_embeddings": {int(maximum * factor)}'
            )
            remedy = f"Write {if_extended}; otherwise {if_original}."
        yield Finding(
            "window_missing", "error", where, f"{scheme} from an unstated window to {maximum} tokens",
            f"Transformers takes {fallback} for the trained window",
            remedy,
        )  # fmt: skip
    elif written > maximum > 0 and scheme in ("llama3", "dynamic_yarn"):
        yield window_reversed(where, written, maximum)
    elif (
        scheme != "longrope"
        and factor
        and factor > 1
        and (written == maximum or written == trained_window_below(examined.family, maximum))
    ):
        yield Finding(
            "window_not_widened", "note", "max_position_embeddings",
            f"{scheme} by {factor:g} from {written} tokens, and max_position_embeddings={maximum}",
            f"scaled for {int(factor * written)} tokens; tools that read max_position_embeddings stop at {maximum}",
            f'Write "max_position_embeddings": {int(factor * written)} to use the longer window.',
        )  # fmt: skip


def _yarn_temperature(path: str, entries: dict[str, Any], factor: float) -> Iterator[Finding]:
    given, mscale, all_dim = (_number(entries.get(key)) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    default = intended = yarn_temperature(factor)
    if mscale is not None:
        intended = yarn_temperature(factor, mscale)
    if all_dim is not None:
        intended /= yarn_temperature(factor, all_dim)
    if given is not None:
        formula = "(0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1)" if mscale and all_dim else "0.1 ln s + 1"
        yield from _unusual_temperature(path, given, intended, f"{formula} for s={factor:g}")
    elif (mscale is None) != (all_dim is None) and not math.isclose(intended, default):
        key, value = ("mscale", mscale) if all_dim is None else ("mscale_all_dim", all_dim)
        yield Finding(
            "attention_factor", "warning", f"{path}.{key}",
            f"{key}={value:g}, which in DeepSeek's code gives cos and sin times {intended:.4f}",
            f"cos and sin times {default:.4f}: Transformers reads mscale and mscale_all_dim only together",
            f'Add "attention_factor": {intended:.6f}, or give both; remove {key} if {default:.4f} is intended.',
        )  # fmt: skip


def _longrope_temperature(
    examined: ExaminedModel, path: str, entries: dict[str, Any], factor: float | None
) -> Iterator[Finding]:
    given, trained = _number(entries.get("attention_factor")), _trained(examined, entries)
    if given is not None and factor and trained > 1:
        expected = math.sqrt(1 + math.log(max(factor, 1)) / math.log(trained))
        yield from _unusual_temperature(path, given, expected, f"sqrt(1 + ln s / ln {trained}) for s={factor:g}")


def _unusual_temperature(path: str, given: float, expected: float, formula: str) -> Iterator[Finding]:
    if abs(given / expected - 1) > TOLERANCE:
        yield Finding(
            "attention_factor", "warning", f"{path}.attention_factor", f"attention_factor={given:g}",
            f"scores are {(given / expected) ** 2:.3f} times those of the formula {formula} = {expected:.4f}",
            f'Remove attention_factor or write "attention_factor": {expected:.6f}, unless training used this value.',
        )  # fmt: skip


def _lists(examined: ExaminedModel, path: str, entries: dict[str, Any]) -> Iterator[Finding]:
    head = examined.head_dim
    fraction = entries.get("partial_rotary_factor") or examined.raw_text_config.get("partial_rotary_factor") or 1.0
    pairs = int(head * fraction) // 2
    for key in ("short_factor", "long_factor"):
        values = entries.get(key)
        where = f"{path}.{key}"
        if not isinstance(values, list) or not all(_number(value) is not None for value in values):
            yield Finding(
                "list_faulty", "error", where, f"{key}={values!r}", "not a list of numbers, so no frequencies",
                f"Give one number for each of the {pairs} pairs.",
            )  # fmt: skip
        elif pairs and len(values) != pairs:
            yield Finding(
                "list_faulty", "error", where, f"{len(values)} entries",
                f"{pairs} pairs rotate in a head of {head} dimensions",
                f"Give {pairs} numbers: this list is for {2 * len(values)} rotating dimensions.",
            )  # fmt: skip
        else:
            yield from _unusual_entries(where, [float(value) for value in values])


def _unusual_entries(where: str, values: list[float]) -> Iterator[Finding]:
    below = [k for k, value in enumerate(values) if value < 1]
    falling = [k for k in range(1, len(values)) if values[k] < values[k - 1] - 1e-6]
    if below:
        yield Finding(
            "list_faulty", "warning", where, f"entry {below[0]} is {values[below[0]]:g}",
            f"pair {below[0]} turns faster than in the unscaled model",
            "Each entry divides a frequency: give 1 or more.",
        )  # fmt: skip
    if falling:
        k = falling[0]
        yield Finding(
            "list_faulty", "warning", where, f"entry {k} is {values[k]:g} after {values[k - 1]:g}",
            f"pair {k} is stretched less than the faster pair before it",
            "The search for these lists keeps them non-decreasing: compare with the published list.",
        )  # fmt: skip


def _sliding(examined: ExaminedModel, path: str, entries: dict[str, Any], factor: float) -> Iterator[Finding]:
    config = examined.text_config
    sliding = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    known = trained_window(examined.model, config).scaled_length if config is not None else None
    extended = known or max(examined.window, int(factor * _trained(examined, entries)))
    all_slide = layer_types is None or compat.attending_layer_types(config) == {"sliding_attention"}
    if isinstance(sliding, int) and sliding and all_slide and sliding < extended:
        yield Finding(
            "sliding_window", "warning", "sliding_window", f"{extended} tokens by factor {factor:g} in {path}",
            f"every layer sees at most {sliding} tokens back (sliding_window), so no distance is longer",
            'Write "sliding_window": null, or remove the scaling.',
        )  # fmt: skip
