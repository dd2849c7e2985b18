"""What the options of a conversion can be."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from ..core.projections import Projections
from ..errors import OptionValueError, nearest, quoted
from .rotary_keys import SELECTIONS as HOW

METHODS = ("transmla", "svd", "mha2mla")
DECOMPOSITIONS = ("joint", "split")
SELECTIONS = tuple(HOW)

OF = {  # option: the methods it is of, and what stands for not given
    "select": (("mha2mla",), "2-norm"),
    "svd": (("mha2mla",), "joint"),
    "freqfold": (("transmla", "svd"), None),
    "balance_kv_ratio": (("transmla",), 1.0),
}


def _one_of(option: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise OptionValueError(
            f"{option}={quoted(value)} does not exist.{nearest(value, choices)} There are: {allowed}."
        )


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_method(method: Any) -> None:
    _one_of("method", method, METHODS)


def check_select(select: Any) -> None:
    _one_of("select", select, SELECTIONS)


def check_unused(method: Any, **options: Any) -> None:
    """Raise `OptionError` for an option of another method."""
    check_method(method)
    refuse_unused(method, **options)


def refuse_unused(method: str, **options: Any) -> None:
    """The same for a method that is known to exist, or that has none of these options."""
    for option, value in options.items():
        methods, default = OF[option]
        if method not in methods and value != default:
            others = " and ".join(map(repr, methods))
            raise OptionValueError(
                f"{method!r} has no use for {option}={quoted(value)}; it is an option of {others}. Leave it out."
            )


def check_decomposition(method: str, svd: Any) -> None:
    _one_of("svd", svd, DECOMPOSITIONS)
    check_unused(method, svd=svd)


def check_rank(method: str, rank: Any, most: int, which: str) -> None:
    if not _whole(rank) or not 1 <= rank <= most:
        raise OptionValueError(
            f"{method!r} got a rank of {quoted(rank)}; give a whole number from 1 to {most}, which is the full "
            f"rank {which}."
        )


def check_ratio(method: str, ratio: Any) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < float(ratio) < math.inf:
        raise OptionValueError(f"{method!r} got balance_kv_ratio={quoted(ratio)}; give a finite number above 0.")
    return float(ratio)


def shared_widths(projections: Projections) -> tuple[list[int], list[int]]:
    """How wide one shared rotary key can be: less than the trained rotary width, or multiples of it."""
    width = projections.rotary_dim
    below = [n for n in range(2, width, 2) if width % n == 0]
    return below, [width * n for n in range(1, projections.kv_heads + 1)]


def check_rope_dim(projections: Projections, method: str, rope_dim: Any) -> None:
    width = projections.rotary_dim
    if method == "mha2mla":
        if not _whole(rope_dim) or rope_dim % 2 or not 2 <= rope_dim <= width:
            raise OptionValueError(
                f"'mha2mla' got rope_dim={quoted(rope_dim)}; give an even number of dims for each key-value head, "
                f"from 2 to {width}, which all rotate."
            )
        return
    below, above = shared_widths(projections)
    if not _whole(rope_dim) or rope_dim not in (*below, *above):
        less = f"{', '.join(map(str, below))}, or " if below else ""
        more = f"a multiple of {width} up to {above[-1]}" if len(above) > 1 else f"{width}"
        raise OptionValueError(
            f"{method!r} got rope_dim={quoted(rope_dim)}; one shared rotary key can have {less}{more} dims, as the "
            f"trained heads rotate {width}."
        )


def folds(projections: Projections, rope_dim: int) -> list[int]:
    """What `freqfold` can be with a shared rotary key of `rope_dim`."""
    pairs, collapse = projections.rotary_dim // 2, max(1, projections.rotary_dim // rope_dim)
    return [n for n in range(collapse, pairs + 1, collapse) if pairs % n == 0]


def check_freqfold(projections: Projections, method: str, rope_dim: int, freqfold: Any) -> int:
    """`freqfold`, or what `chosen_fold` gives for None."""
    allowed = folds(projections, rope_dim)
    if freqfold is None:
        return chosen_fold(projections, rope_dim)
    if not _whole(freqfold) or freqfold not in allowed:
        raise OptionValueError(
            f"{method!r} got freqfold={quoted(freqfold)}; at rope_dim={rope_dim} it can be one of "
            f"{', '.join(map(str, allowed))}, or None for {chosen_fold(projections, rope_dim)}."
        )
    return int(freqfold)


def chosen_fold(projections: Projections, rope_dim: int) -> int:
    """The smallest fold that spans a sixteenth of the frequencies; 1 where more than one head's rotation is kept.

    What the authors found by the model's loss is mostly this (4 of 64 frequencies; for some models 8), and on two small
    models it was as good as the smallest possible or better. With the rotation of two or more heads kept, taking
    neighbours for one cost more than it gained, and with that of all heads nothing is to be gained.
    """
    allowed, pairs = folds(projections, rope_dim), projections.rotary_dim // 2
    return 1 if rope_dim > projections.rotary_dim else next(n for n in allowed if 16 * n >= pairs)
