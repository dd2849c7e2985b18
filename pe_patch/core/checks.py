"""What a value of an option must be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from ..errors import OptionValueError, nearest, quoted

LARGEST = 1e6
"""Of numbers for which nothing else is said; what is larger overflows somewhere, or is a slip of the keyboard."""
LARGEST_BASE = 1e30
LARGEST_FACTOR = 100.0
"""Of what multiplies cos and sin, queries or scores."""
LARGEST_LENGTH = 10**12
"""In tokens. The regimes of a sequence grow to 2^23 times this, which int64 still holds."""
LARGEST_TABLE = 2**31
"""Entries of a table, 8 GiB in float32."""


def plain(value: Any) -> Any:
    """Return numbers and lists of other libraries as Python's, which every check and a saved record understand.

    Scalars of NumPy and of PyTorch, fractions, and arrays of floating-point numbers of one dimension are changed.
    """
    if value is None or isinstance(value, bool | str | bytes) or type(value) in (int, float):
        return value
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
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
    """`value` as a finite float, or None where it is none; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def check_number(
    scheme: str, option: str, value: Any, low: float, high: float = LARGEST, *, exclusive: bool = False, do: str = ""
) -> float:
    """`value` as a float; an `OptionValueError` unless it is a number in [low, high], or (low, high] if exclusive."""
    number = _number(value)
    if number is not None and (low < number if exclusive else low <= number) and number <= high:
        return number
    allowed = f"a finite number {'above' if exclusive else 'of at least'} {low:g} and at most {high:g}"
    do = f" {do}" if do else ""
    raise OptionValueError(f"{scheme!r} got {option}={quoted(value)}; {option} must be {allowed}.{do}")


def check_length(
    scheme: str, option: str, value: Any, low: int = 1, high: int = LARGEST_LENGTH, *, what: str = "number of tokens"
) -> int | None:
    """`value` as a whole number from `low` to `high`, or None; an `OptionValueError` where it is none."""
    if value is None:
        return None
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    raise OptionValueError(
        f"{scheme!r} got {option}={quoted(value)}; give a whole {what}, at least {low} and at most {high}, or leave it "
        "out."
    )


def check_window(scheme: str, option: str, value: Any) -> int | None:
    """`check_length` for a window that comes from a config, which may write 4096.0."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    return check_length(scheme, option, whole)


def check_count(scheme: str, option: str, value: Any, low: int, high: int, do: str = "") -> int:
    """`value` as a whole number from `low` to `high`, or an `OptionValueError`."""
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    do = f" {do}" if do else ""
    raise OptionValueError(
        f"{scheme!r} got {option}={quoted(value)}; {option} must be a whole number of at least {low} and at most "
        f"{high}.{do}"
    )


def check_table(scheme: str, option: str, rows: int, width: int) -> int:
    """`rows`, or an `OptionValueError` where a table of so many rows would not fit into memory."""
    if rows * width <= LARGEST_TABLE:
        return rows
    raise OptionValueError(
        f"{scheme!r} got {option}={rows}; its table would have {rows} x {width} entries. Give at most "
        f"{LARGEST_TABLE // width}."
    )


def check_choice(scheme: str, option: str, value: Any, choices: Iterable[str]) -> str:
    """`value`, or an `OptionValueError` unless it is one of `choices`."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return value
    near = nearest(value, choices) if isinstance(value, str) else ""
    raise OptionValueError(
        f"{scheme!r} got {option}={quoted(value)}; {option}={quoted(value)} is not one of {', '.join(choices)}.{near}"
    )


def check_order(scheme: str, low: tuple[str, float], high: tuple[str, float]) -> None:
    """Raise `OptionError` when the (option, value) `low` exceeds `high`."""
    if low[1] > high[1]:
        raise OptionValueError(
            f"{scheme!r} got {low[0]}={low[1]:g} and {high[0]}={high[1]:g}; {low[0]} may not exceed {high[0]}. "
            "Exchange the two values."
        )


def check_list(
    scheme: str, option: str, value: Any, count: int, *, has: str = "rotates", each: str = "pair", high: float = LARGEST
) -> list[float]:
    """`value` as `count` positive floats, one for each of something, or an `OptionValueError`."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise OptionValueError(
            f"{scheme!r} got {option}={quoted(value)}; give a list of {count} positive numbers, one for each {each}."
        )
    if len(value) != count:
        raise OptionValueError(
            f"{scheme!r} got {len(value)} entries in {option}, and this attention {has} {count} {each}s; "
            f"{option} needs {count} positive numbers, one for each {each}."
        )
    do = f"{option} needs {count} positive numbers, one for each {each}."
    return [
        check_number(scheme, f"{option}[{k}]", entry, 0.0, high, exclusive=True, do=do) for k, entry in enumerate(value)
    ]


def check_width(scheme: str, dim: int) -> None:
    """Raise `OptionError` where the base change theta s^(r / (r - 2)) has no meaning."""
    if dim == 2:
        raise OptionValueError(
            f"{scheme!r} changes the base by s^(r / (r - 2)), which a rotary width of r=2 does not allow; use 'linear'."
        )


def check_flag(scheme: str, option: str, value: Any) -> bool:
    """`value` as it is, or an `OptionError` unless it is True or False."""
    if isinstance(value, bool):
        return value
    raise OptionValueError(f"{scheme!r} got {option}={quoted(value)}; give True or False.")
