"""Windows, factors and temperatures that contradict each other, and layers that cannot see the added length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..adapters.trained_window import built_window, is_count, trained_window
from ..schemes.config_formats import TYPES, left_as_it_was, yarn_temperature
from .claims import filled_in, named_window, rope_dicts, said_window, window_reversed
from .finding import Finding
from .subject import Subject

FALLS_BACK = {"yarn", "dynamic_yarn", "llama3", "longrope"}
"""Schemes for which Transformers takes another window where original_max_position_embeddings is missing."""
TOLERANCE = 0.05
"""By what share a factor on cos and sin may differ from its formula before it is told."""


def check_lengths(subject: Subject) -> list[Finding]:
    """All findings about lengths and temperatures."""
    findings = [*_whole(subject), *_unnamed(subject)]
    for path, entries in rope_dicts(subject.said):
        scheme = TYPES.get(str(entries.get("rope_type", entries.get("type"))))
        if scheme in FALLS_BACK:
            findings += _window(subject, path, entries, scheme)
        factor = _factor(subject, entries)
        if scheme in ("yarn", "dynamic_yarn") and factor:
            findings += _yarn_temperature(path, entries, factor)
        if scheme == "longrope":
            findings += [*_lists(subject, path, entries), *_longrope_temperature(subject, path, entries, factor)]
        if scheme not in (None, "rope") and factor and factor > 1:
            findings += _sliding(subject, path, entries, factor)
    return findings


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _unnamed(subject: Subject) -> Iterator[Finding]:
    """A window that is missing, no number of tokens, or written into a model that was built with another one."""
    config = subject.text_config
    if config is None or not hasattr(config, "max_position_embeddings"):
        return
    key, written = named_window(subject)
    remedy = f'Write the length that the model was trained for, such as "{key}": 4096.'
    if not written and filled_in(subject):
        yield Finding(
            "window_unknown", "error", key, "no window",
            f"{config.max_position_embeddings} tokens, which is only the default of {type(config).__name__}", remedy,
        )  # fmt: skip
    for name, value in list(written.items())[:1]:
        if not is_count(value) and not isinstance(value, float):
            yield Finding("window_unknown", "error", name, f"{name}={value!r}", "no number of tokens", remedy)
    built = built_window(subject.model) if subject.live else None
    if built is not None and subject.window > built[0]:
        yield Finding(
            "window_raised", "error", key, f"{key}={subject.window}",
            f"{built[0]} tokens, which {built[1]} was built for: the config was changed afterwards",
            f'patch_model(model, "yarn", factor={subject.window / built[0]:g}), or set it back to {built[0]}.',
        )  # fmt: skip


def _trained(subject: Subject, entries: dict[str, Any]) -> int:
    """The trained window that is in effect."""
    own = next((p for kind in (None, "full_attention") if (p := subject.parameters(kind))), {})
    return said_window(subject.said, entries) or int(own.get("original_max_position_embeddings") or subject.window)


def _factor(subject: Subject, entries: dict[str, Any]) -> float | None:
    """The factor in effect: the one that is written, else the ratio of the two windows."""
    written, trained = entries.get("factor"), _trained(subject, entries)
    return _number(written) if written is not None else subject.window / trained if trained else None


def _whole(subject: Subject) -> Iterator[Finding]:
    maximum = subject.text.get("max_position_embeddings")
    if isinstance(maximum, float):
        yield Finding(
            "window_not_whole", "error", "max_position_embeddings", f"max_position_embeddings={maximum!r}",
            "a number of tokens with a decimal point", f'Write "max_position_embeddings": {int(maximum)}.',
        )  # fmt: skip


def _window(subject: Subject, path: str, entries: dict[str, Any], scheme: str) -> Iterator[Finding]:
    written, maximum = said_window(subject.said, entries), subject.window
    where = f"{path}.original_max_position_embeddings"
    factor = _number(entries.get("factor"))
    if not written and not subject.live and maximum:
        taken = _trained(subject, entries)
        remedy = 'Write the window before the extension as "original_max_position_embeddings".'
        if factor:
            extended = (
                f'"original_max_position_embeddings": {int(maximum / factor)} if {maximum} is the extended window'
            )
            unwidened = (
                f'"original_max_position_embeddings": {maximum}, "max_position_embeddings": {int(maximum * factor)}'
            )
            remedy = f"Write {extended}; else {unwidened}."
        yield Finding(
            "window_missing", "error", where, f"{scheme} from an unnamed window to {maximum} tokens",
            f"Transformers takes {taken} for the trained window",
            remedy,
        )  # fmt: skip
    elif written > maximum > 0 and scheme in ("llama3", "dynamic_yarn"):
        yield window_reversed(where, written, maximum)
    elif (
        scheme != "longrope"
        and factor
        and factor > 1
        and (written == maximum or written == left_as_it_was(subject.family, maximum))
    ):
        yield Finding(
            "window_not_widened", "note", "max_position_embeddings",
            f"{scheme} by {factor:g} from {written} tokens, and max_position_embeddings={maximum}",
            f"scaled for {int(factor * written)} tokens; what goes by max_position_embeddings stops at {maximum}",
            f'Write "max_position_embeddings": {int(factor * written)}, if the longer window is to be used.',
        )  # fmt: skip


def _yarn_temperature(path: str, entries: dict[str, Any], factor: float) -> Iterator[Finding]:
    given, mscale, all_dim = (_number(entries.get(key)) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    formula = meant = yarn_temperature(factor)
    if mscale is not None:
        meant = yarn_temperature(factor, mscale)
    if all_dim is not None:
        meant /= yarn_temperature(factor, all_dim)
    if given is not None:
        asked = "(0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1)" if mscale and all_dim else "0.1 ln s + 1"
        yield from _far(path, given, meant, f"{asked} for s={factor:g}")
    elif (mscale is None) != (all_dim is None) and not math.isclose(meant, formula):
        key, value = ("mscale", mscale) if all_dim is None else ("mscale_all_dim", all_dim)
        yield Finding(
            "attention_factor", "warning", f"{path}.{key}",
            f"{key}={value:g}, by DeepSeek's code cos and sin times {meant:.4f}",
            f"cos and sin times {formula:.4f}: Transformers reads mscale and mscale_all_dim only together",
            f'Write "attention_factor": {meant:.6f} beside it, or give both; remove {key} if {formula:.4f} is meant.',
        )  # fmt: skip


def _longrope_temperature(
    subject: Subject, path: str, entries: dict[str, Any], factor: float | None
) -> Iterator[Finding]:
    given, trained = _number(entries.get("attention_factor")), _trained(subject, entries)
    if given is not None and factor and trained > 1:
        expected = math.sqrt(1 + math.log(max(factor, 1)) / math.log(trained))
        yield from _far(path, given, expected, f"sqrt(1 + ln s / ln {trained}) for s={factor:g}")


def _far(path: str, given: float, expected: float, formula: str) -> Iterator[Finding]:
    if abs(given / expected - 1) > TOLERANCE:
        yield Finding(
            "attention_factor", "warning", f"{path}.attention_factor", f"attention_factor={given:g}",
            f"scores times {(given / expected) ** 2:.3f} of what {formula} gives, {expected:.4f}",
            f'Remove attention_factor, or write "attention_factor": {expected:.6f}, unless the model was trained so.',
        )  # fmt: skip


def _lists(subject: Subject, path: str, entries: dict[str, Any]) -> Iterator[Finding]:
    head = subject.head_dim
    part = entries.get("partial_rotary_factor") or subject.text.get("partial_rotary_factor") or 1.0
    pairs = int(head * part) // 2
    for key in ("short_factor", "long_factor"):
        values = entries.get(key)
        where = f"{path}.{key}"
        if not isinstance(values, list) or not all(_number(value) is not None for value in values):
            yield Finding(
                "list_faulty", "error", where, f"{key}={values!r}", "no list of numbers, so no frequencies",
                f"Give one number for each of {pairs} pairs.",
            )  # fmt: skip
        elif pairs and len(values) != pairs:
            yield Finding(
                "list_faulty", "error", where, f"{len(values)} entries", f"{pairs} pairs rotate in a head of {head}",
                f"Give {pairs} numbers: this list belongs to a rotary width of {2 * len(values)}.",
            )  # fmt: skip
        else:
            yield from _unusual(where, [float(value) for value in values])


def _unusual(where: str, values: list[float]) -> Iterator[Finding]:
    below = [k for k, value in enumerate(values) if value < 1]
    falling = [k for k in range(1, len(values)) if values[k] < values[k - 1] - 1e-6]
    if below:
        yield Finding(
            "list_faulty", "warning", where, f"entry {below[0]} is {values[below[0]]:g}",
            f"pair {below[0]} turns faster than in the unscaled model", "Entries divide frequencies: give 1 or more.",
        )  # fmt: skip
    if falling:
        k = falling[0]
        yield Finding(
            "list_faulty", "warning", where, f"entry {k} is {values[k]:g} after {values[k - 1]:g}",
            f"pair {k} is stretched less than the faster one before it",
            "The search for these lists keeps them in rising order: compare with the list that was published.",
        )  # fmt: skip


def _sliding(subject: Subject, path: str, entries: dict[str, Any], factor: float) -> Iterator[Finding]:
    config = subject.text_config
    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    known = trained_window(subject.model, config).scaled_length if config is not None else None
    whole = known or max(subject.window, int(factor * _trained(subject, entries)))
    all_slide = kinds is None or set(kinds) == {"sliding_attention"}
    if isinstance(sliding, int) and sliding and all_slide and sliding < whole:
        yield Finding(
            "sliding_window", "warning", "sliding_window", f"{whole} tokens by factor {factor:g} in {path}",
            f"every layer sees {sliding} tokens back and no farther (sliding_window), so no distance is longer",
            'Write "sliding_window": null, or leave the scaling out.',
        )  # fmt: skip
