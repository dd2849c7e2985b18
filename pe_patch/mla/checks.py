"""Checks of the options of a conversion."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from ..core.projections import Projections
from ..errors import OptionValueError, nearest, quoted
from .rotary_keys import SELECTIONS as SELECTION_FUNCTIONS

METHODS = ("transmla", "svd", "mha2mla")
DECOMPOSITIONS = ("joint", "split")
SELECTIONS = tuple(SELECTION_FUNCTIONS)

METHODS_OF_OPTION = {
    "select": (("mha2mla",), "2-norm"),
    "svd": (("mha2mla",), "joint"),
    "freqfold": (("transmla", "svd"), None),
    "balance_kv_ratio": (("transmla",), 1.0),
}
"""The methods that use each option, and the option's default."""


def _check_choice(option: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `OptionValueError` for a value that is not one of the choices."""
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise OptionValueError(
            f"{option}={quoted(value)} does not exist.{nearest(value, choices)} Use one of {allowed}."
        )


def _is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, other than a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_method(method: Any) -> None:
    """Raise `OptionValueError` for an unknown method."""
    _check_choice("method", method, METHODS)


def check_select(select: Any) -> None:
    """Raise `OptionValueError` for an unknown selection of rotary dimensions."""
    _check_choice("select", select, SELECTIONS)


def check_unused(method: Any, **options: Any) -> None:
    """Raise `OptionValueError` for an unknown method, or for an option of another method."""
    check_method(method)
    refuse_unused(method, **options)


def refuse_unused(method: str, **options: Any) -> None:
    """Raise `OptionValueError` for an option that the method does not use; the method itself is not checked."""
    for option, value in options.items():
        methods, default = METHODS_OF_OPTION[option]
        if method not in methods and value != default:
            others = " and ".join(map(repr, methods))
            raise OptionValueError(
                f"{method!r} has no use for {option}={quoted(value)}; it is an option of {others}. Leave it out."
            )


def check_decomposition(method: str, svd: Any) -> None:
    """Raise `OptionValueError` for an unknown `svd`, or one that the method does not use."""
    _check_choice("svd", svd, DECOMPOSITIONS)
    check_unused(method, svd=svd)


def check_rank(method: str, rank: Any, most: int, which: str) -> None:
    """Raise `OptionValueError` for a rank outside 1 to `most`; `which` completes "the full rank" in the message."""
    if not _is_whole(rank) or not 1 <= rank <= most:
        raise OptionValueError(
            f"{method!r} got a rank of {quoted(rank)}; give a whole number from 1 to {most}, which is the full "
            f"rank {which}."
        )


def check_ratio(method: str, ratio: Any) -> float:
    """Return `balance_kv_ratio` as a float; raise `OptionValueError` unless it is positive and finite."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < float(ratio) < math.inf:
        raise OptionValueError(f"{method!r} got balance_kv_ratio={quoted(ratio)}; give a finite number above 0.")
    return float(ratio)


def shared_widths(projections: Projections) -> tuple[list[int], list[int]]:
    """Return the allowed widths of a shared rotary key: divisors of the trained rotary width, and multiples of it."""
    width = projections.rotary_dim
    below = [n for n in range(2, width, 2) if width % n == 0]
    return below, [width * n for n in range(1, projections.kv_heads + 1)]


def check_rope_dim(projections: Projections, method: str, rope_dim: Any) -> None:
    """Raise `OptionValueError` for a number of rotary dimensions that the method cannot keep."""
    width = projections.rotary_dim
    if method == "mha2mla":
        if not _is_whole(rope_dim) or rope_dim % 2 or not 2 <= rope_dim <= width:
            raise OptionValueError(
                f"'mha2mla' got rope_dim={quoted(rope_dim)}; give an even number of dims for each key-value head, "
                f"from 2 to {width}, the rotary width of the trained heads."
            )
        return
    below, above = shared_widths(projections)
    if not _is_whole(rope_dim) or rope_dim not in (*below, *above):
        divisors = f"{', '.join(map(str, below))}, or " if below else ""
        multiples = f"a multiple of {width} up to {above[-1]}" if len(above) > 1 else f"{width}"
        raise OptionValueError(
            f"{method!r} got rope_dim={quoted(rope_dim)}; one shared rotary key can have {divisors}{multiples} dims, "
            f"since the rotary width of the trained heads is {width}."
        )


def folds(projections: Projections, rope_dim: int) -> list[int]:
    """Return the allowed values of `freqfold` for a shared rotary key of `rope_dim`."""
    pairs, collapse = projections.rotary_dim // 2, max(1, projections.rotary_dim // rope_dim)
    return [n for n in range(collapse, pairs + 1, collapse) if pairs % n == 0]


def check_freqfold(projections: Projections, method: str, rope_dim: int, freqfold: Any) -> int:
    """Return `freqfold`, or `default_fold` for None; raise `OptionValueError` for a value that is not allowed."""
    allowed = folds(projections, rope_dim)
    if freqfold is None:
        return default_fold(projections, rope_dim)
    if not _is_whole(freqfold) or freqfold not in allowed:
        raise OptionValueError(
            f"{method!r} got freqfold={quoted(freqfold)}; at rope_dim={rope_dim} it can be one of "
            f"{', '.join(map(str, allowed))}, or None for {default_fold(projections, rope_dim)}."
        )
    return int(freqfold)


def default_fold(projections: Projections, rope_dim: int) -> int:
    """Return the smallest fold that spans a sixteenth of the frequencies, or 1 if `rope_dim` exceeds the rotary width.

    The authors chose the fold by the model's loss, and mostly found this value (4 of 64 frequencies; 8 for some
    models). On two small models it was at least as good as the smallest possible fold. If the rotation of two or more
    heads is kept, folding cost more than it gained; if that of all heads is kept, folding cannot gain anything.
    """
    allowed, pairs = folds(projections, rope_dim), projections.rotary_dim // 2
    return 1 if rope_dim > projections.rotary_dim else next(n for n in allowed if 16 * n >= pairs)
