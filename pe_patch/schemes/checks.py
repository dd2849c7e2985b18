"""What a value of an option must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from ..errors import OptionValueError


def check_number(
    scheme: str, option: str, value: Any, low: float, high: float = math.inf, *, exclusive: bool = False, do: str = ""
) -> float:
    """`value` as a float; an `OptionError` unless it is a finite number in [low, high], or (low, high] if exclusive."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if number and (low < float(value) if exclusive else low <= float(value)) and float(value) <= high:
        return float(value)
    upper = "" if math.isinf(high) else f" and at most {high:g}"
    allowed = f"a finite number {'above' if exclusive else 'of at least'} {low:g}{upper}"
    raise OptionValueError(f"{scheme!r} got {option}={value!r}; {option} must be {allowed}.{' ' + do if do else ''}")


def check_length(scheme: str, option: str, value: Any) -> int | None:
    """`value` as a number of tokens, or None; an `OptionError` unless it is a whole number of at least 1."""
    if value is None:
        return None
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1:
        return int(value)
    raise OptionValueError(
        f"{scheme!r} got {option}={value!r}; give a whole number of tokens, at least 1, or leave it out."
    )


def check_order(scheme: str, low: tuple[str, float], high: tuple[str, float]) -> None:
    """Raise `OptionError` when the (option, value) `low` exceeds `high`."""
    if low[1] > high[1]:
        raise OptionValueError(
            f"{scheme!r} got {low[0]}={low[1]:g} and {high[0]}={high[1]:g}; {low[0]} may not exceed {high[0]}. "
            "Exchange the two values."
        )


def check_list(scheme: str, option: str, value: Any, count: int) -> list[float]:
    """`value` as `count` positive floats, one for each rotated pair, or an `OptionError`."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise OptionValueError(f"{scheme!r} got {option}={value!r}; give a list of {count} numbers, one for each pair.")
    if len(value) != count:
        raise OptionValueError(
            f"{scheme!r} got {len(value)} entries in {option}, but this attention rotates {count} pairs; give {count} "
            "numbers (the list of another head size does not fit)."
        )
    return [check_number(scheme, f"{option}[{k}]", entry, 0.0, exclusive=True) for k, entry in enumerate(value)]


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
    raise OptionValueError(f"{scheme!r} got {option}={value!r}; give True or False.")
