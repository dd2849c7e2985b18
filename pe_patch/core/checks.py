"""Checks of option values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from ..errors import OptionValueError, nearest, quoted

LARGEST = 1e6
"""Limit of numbers without another limit; larger ones overflow or are typing errors."""
LARGEST_BASE = 1e30
LARGEST_FACTOR = 100.0
"""Limit of factors on cos and sin, queries or scores."""
LARGEST_LENGTH = 10**12
"""Limit of lengths in tokens. Regimes grow to 2^23 times this, which fits int64."""
LARGEST_TABLE = 2**31
"""Limit of the entries of a table, 8 GiB in float32."""


def to_builtin(value: Any) -> Any:
    """Convert numbers and lists of other libraries to Python's, which checks and saved records understand.

    This covers scalars of NumPy and PyTorch, fractions, and one-dimensional arrays of floating-point numbers.
    """
    if value is None or isinstance(value, bool | str | bytes) or type(value) in (int, float):
        return value
    if isinstance(value, Mapping):
        return {key: to_builtin(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_builtin(entry) for entry in value)
    dimensions, dtype = getattr(value, "ndim", None), str(getattr(value, "dtype", ""))
    if dimensions == 0 and hasattr(value, "item") and not getattr(value, "is_meta", False):
        return value.item()
    if dimensions == 1 and "float" in dtype and hasattr(value, "tolist") and not getattr(value, "is_meta", False):
        return value.tolist()
    if isinstance(value, Integral):
        return int(value)
    number = _number(value)
    return value if number is None else number


def _number(value: Any) -> float | None:
    """Return `value` as a finite float, or None if it is no number; True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def check_number(
    scheme: str,
    option: str,
    value: Any,
    low: float,
    high: float = LARGEST,
    *,
    exclusive: bool = False,
    remedy: str = "",
) -> float:
    """Return `value` as a float in [low, high], or (low, high] if exclusive; else raise `OptionValueError`."""
    number = _number(value)
    if number is not None and (low < number if exclusive else low <= number) and number <= high:
        return number
    allowed = f"a finite number {'above' if exclusive else 'of at least'} {low:g} and at most {high:g}"
    remedy = f" {remedy}" if remedy else ""
    raise OptionValueError(f"{scheme!r} got {option}={quoted(value)}; {option} must be {allowed}.{remedy}")


def check_length(
    scheme: str, option: str, value: Any, low: int = 1, high: int = LARGEST_LENGTH, *, what: str = "number of tokens"
) -> int | None:
    """Return `value` as a whole number from `low` to `high`, or None; raise `OptionValueError` for anything else."""
    if value is None:
        return None
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    raise OptionValueError(
        f"{scheme!r} got {option}={quoted(value)}; give a whole {what}, at least {low} and at most {high}, or leave it "
        "out."
    )


def check_window(scheme: str, option: str, value: Any) -> int | None:
    """Return what `check_length` returns for a window, which a config may write as 4096.0."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    return check_length(scheme, option, whole)


def check_count(scheme: str, option: str, value: Any, low: int, high: int, remedy: str = "") -> int:
    """Return `value` as a whole number from `low` to `high`, or raise `OptionValueError`."""
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    remedy = f" {remedy}" if remedy else ""
    raise OptionValueError(
        f"{scheme!r} got {option}={quoted(value)}; {option} must be a whole number of at least {low} and at most "
        f"{high}.{remedy}"
    )


def check_table(scheme: str, option: str, rows: int, width: int) -> int:
    """Return `rows`, or raise `OptionValueError` if a table of that many rows does not fit into memory."""
    if rows * width <= LARGEST_TABLE:
        return rows
    raise OptionValueError(
        f"{scheme!r} got {option}={rows}; its table would have {rows} x {width} entries. Give at most "
        f"{LARGEST_TABLE // width}."
    )


def check_choice(scheme: str, option: str, value: Any, choices: Iterable[str]) -> str:
    """Return `value`, or raise `OptionValueError` unless it is one of `choices`."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return value
    near = nearest(value, choices) if isinstance(value, str) else ""
    raise OptionValueError(
        f"{scheme!r} got {option}={quoted(value)}; {option}={quoted(value)} is not one of {', '.join(choices)}.{near}"
    )


def check_order(scheme: str, low: tuple[str, float], high: tuple[str, float]) -> None:
    """Raise `OptionValueError` if the value of the (option, value) pair `low` exceeds that of `high`."""
    if low[1] > high[1]:
        raise OptionValueError(
            f"{scheme!r} got {low[0]}={low[1]:g} and {high[0]}={high[1]:g}; {low[0]} may not exceed {high[0]}. "
            "Exchange the two values."
        )


def check_list(
    scheme: str,
    option: str,
    value: Any,
    count: int,
    *,
    verb: str = "rotates",
    unit: str = "pair",
    high: float = LARGEST,
) -> list[float]:
    """Return `value` as `count` positive floats, or raise `OptionValueError`."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise OptionValueError(
            f"{scheme!r} got {option}={quoted(value)}; give a list of {count} positive numbers, one for each {unit}."
        )
    if len(value) != count:
        raise OptionValueError(
            f"{scheme!r} got {len(value)} entries in {option}, and this attention {verb} {count} {unit}s; "
            f"{option} needs {count} positive numbers, one for each {unit}."
        )
    remedy = f"{option} needs {count} positive numbers, one for each {unit}."
    return [
        check_number(scheme, f"{option}[{k}]", entry, 0.0, high, exclusive=True, remedy=remedy)
        for k, entry in enumerate(value)
    ]


def check_width(scheme: str, dim: int) -> None:
    """Raise `OptionValueError` for a rotary width for which theta s^(r / (r - 2)) is undefined."""
    if dim == 2:
        raise OptionValueError(
            f"{scheme!r} changes the base by s^(r / (r - 2)), which a rotary width of r=2 does not allow; use 'linear'."
        )


def check_flag(scheme: str, option: str, value: Any) -> bool:
    """Return `value`, or raise `OptionValueError` unless it is True or False."""
    if isinstance(value, bool):
        return value
    raise OptionValueError(f"{scheme!r} got {option}={quoted(value)}; give True or False.")
