"""Parse the compared schemes and their options."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.sources import parse_options
from ..errors import OptionError, quoted
from ..schemes.registry import ALIASES, SCHEMES, find_scheme

LONGEST_NAME = 120
"""Characters in the name of a scheme's folder."""
AS_IT_IS = "as it is"
"""Label of the unpatched model."""
TUNED = ", fine-tuned"
"""Suffix of labels in rows that were measured after training."""


@dataclass(frozen=True)
class ComparedScheme:
    """One scheme of the comparison with its options, or the unpatched model."""

    label: str
    scheme: str | None = None
    """A name in SCHEMES; None is the unpatched model."""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The label as a folder name. A long one ends in a hash, because file systems stop at 255 bytes."""
        name = re.sub(r"[^a-zA-Z0-9.=-]+", "_", self.label).strip("_")
        if len(name) <= LONGEST_NAME:
            return name
        return f"{name[: LONGEST_NAME - 13]}-{hashlib.sha256(self.label.encode()).hexdigest()[:12]}"

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `patch_model`."""
        return {"scheme": self.scheme, **self.options}


def parse_schemes(
    given: Sequence[str | Mapping[str, Any] | ComparedScheme], *, factor: float | None = None, untouched: str = AS_IT_IS
) -> tuple[ComparedScheme, ...]:
    """Parse the compared schemes and put the unpatched model, the reference of all of them, first.

    A scheme is a name, `name:option=value,option=value`, or a dict in any config format (JSON on the command line).
    Entries of the same scheme get their options as part of their labels.

    Args:
        given: the schemes.
        factor: passed to each scheme that requires a factor, and to each that accepts one and has no options.
        untouched: label of the unpatched model.

    Raises:
        UnknownNameError: a scheme does not exist.
        OptionError: an option does not exist, or two entries are equal.
    """
    if not given:
        raise OptionError("Give at least one scheme to compare with the unpatched model.")
    schemes = [entry if isinstance(entry, ComparedScheme) else _read(entry, factor) for entry in given]
    names = [entry.scheme for entry in schemes]
    labelled = [
        ComparedScheme(_with_options(entry), entry.scheme, entry.options) if names.count(entry.scheme) > 1 else entry
        for entry in schemes
    ]
    everyone = (ComparedScheme(untouched), *labelled)
    folders = [entry.folder for entry in everyone]
    if twice := sorted({entry.label for entry in everyone if folders.count(entry.folder) > 1}):
        raise OptionError(f"{', '.join(twice)} is given twice; each entry of the comparison needs its own options.")
    return everyone


def without_factor(everyone: Sequence[ComparedScheme]) -> list[str]:
    """Return the labels of the schemes without a factor, which a common factor does not reach."""
    return [entry.label for entry in everyone if entry.scheme is not None and "factor" not in entry.options]


def split_options(text: str) -> list[str]:
    """Split `a=1,b=[2,3]` into `a=1` and `b=[2,3]`, ignoring commas within brackets."""
    words, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and depth == 0:
            words.append(text[start:place])
            start = place + 1
    return [word.strip() for word in (*words, text[start:]) if word.strip()]


def _read(word: str | Mapping[str, Any], factor: float | None) -> ComparedScheme:
    if isinstance(word, str) and word.lstrip().startswith("{"):
        try:
            word = json.loads(word)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{quoted(word)} is not JSON: {error}") from error
    if isinstance(word, str):
        name, _, rest = word.partition(":")
        named, options = name.strip(), parse_options(split_options(rest))
    else:
        named, options = dict(word), {}
    if factor is not None and isinstance(named, str) and _wants_factor(ALIASES.get(named, named), options):
        options.setdefault("factor", factor)
    scheme, options = find_scheme(named, options)
    return ComparedScheme(scheme.name, scheme.name, options)


def _wants_factor(scheme: str, options: Mapping[str, Any]) -> bool:
    """Return whether a common factor applies: it is required, or accepted and there are no other options."""
    if scheme not in SCHEMES or "factor" not in SCHEMES[scheme].option_names():
        return False
    if not options:
        return True
    try:
        SCHEMES[scheme].check_options(dict(options))
    except OptionError:  # it lacks the factor; other errors are raised when it is read with one
        return True
    return False


def _with_options(entry: ComparedScheme) -> str:
    options = ", ".join(f"{name}={value}" for name, value in entry.options.items())
    return f"{entry.scheme} ({options})" if options else str(entry.scheme)
