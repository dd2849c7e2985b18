"""Who is compared: a scheme with its options, or the model as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.loading import parse_options
from ..errors import OptionError
from ..schemes.registry import ALIASES, SCHEMES, find_scheme

AS_IT_IS = "as it is"
"""The label of the model that nothing was done to."""
TUNED = ", fine-tuned"
"""What a label ends with in the rows that were measured after training."""


@dataclass(frozen=True)
class Contender:
    """One line of the comparison."""

    label: str
    scheme: str | None = None
    """A name in SCHEMES; None is the model as it is."""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^a-zA-Z0-9.=-]+", "_", self.label).strip("_")

    def arguments(self) -> dict[str, Any]:
        """What `patch_model` is called with, beside the model."""
        return {"scheme": self.scheme, **self.options}


def contenders(
    given: Sequence[str | Mapping[str, Any] | Contender], *, factor: float | None = None, untouched: str = AS_IT_IS
) -> tuple[Contender, ...]:
    """The contenders that were asked for, behind the model as it is, which all are held against.

    One is written as a scheme's name, `name:option=value,option=value`, or a dict in any config dialect (on the command
    line as JSON). `factor` goes to every scheme that must have one, and to those that can and were named without
    options. Two of one scheme are told apart by their options.

    Raises:
        UnknownNameError, OptionError: a scheme or an option that does not exist, or a line that stands there twice.
    """
    if not given:
        raise OptionError("Name at least one scheme to compare with the model as it is.")
    found = [one if isinstance(one, Contender) else _read(one, factor) for one in given]
    names = [one.scheme for one in found]
    told_apart = [
        Contender(_with_options(one), one.scheme, one.options) if names.count(one.scheme) > 1 else one for one in found
    ]
    everyone = (Contender(untouched), *told_apart)
    labels = [one.folder for one in everyone]
    if twice := sorted({one.label for one in everyone if labels.count(one.folder) > 1}):
        raise OptionError(f"{', '.join(twice)} stands there twice; each line of the comparison needs its own options.")
    return everyone


def without_factor(everyone: Sequence[Contender]) -> list[str]:
    """The labels of the schemes that have no factor: one for all of them did not reach these."""
    return [one.label for one in everyone if one.scheme is not None and "factor" not in one.options]


def split_options(text: str) -> list[str]:
    """`a=1,b=[2,3]` as `a=1` and `b=[2,3]`: commas within brackets do not separate."""
    parts, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _read(word: str | Mapping[str, Any], factor: float | None) -> Contender:
    if isinstance(word, str) and word.lstrip().startswith("{"):
        try:
            word = json.loads(word)
        except ValueError as error:
            raise OptionError(f"{word!r} is not JSON: {error}") from error
    if isinstance(word, str):
        name, _, rest = word.partition(":")
        named, options = name.strip(), parse_options(split_options(rest))
    else:
        named, options = dict(word), {}
    if factor is not None and isinstance(named, str) and _wants_factor(ALIASES.get(named, named), options):
        options.setdefault("factor", factor)
    scheme, options = find_scheme(named, options)
    return Contender(scheme.name, scheme.name, options)


def _wants_factor(scheme: str, options: Mapping[str, Any]) -> bool:
    """A factor that a scheme can do without is left out where it was given options, which say how far it reaches."""
    if scheme not in SCHEMES or "factor" not in SCHEMES[scheme].option_names():
        return False
    if not options:
        return True
    try:
        SCHEMES[scheme].check_options(dict(options))
    except OptionError:  # it lacks the factor; what else may be wrong is told when it is read with one
        return True
    return False


def _with_options(one: Contender) -> str:
    options = ", ".join(f"{name}={value}" for name, value in one.options.items())
    return f"{one.scheme} ({options})" if options else str(one.scheme)
