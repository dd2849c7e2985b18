"""What can go wrong, and how to say it."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the order in which the characters around them are shown."""
CATEGORIES = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Control characters, lone surrogates, and the separators of lines and paragraphs."""


def printable(value: Any, keep: str = "\n\t") -> str:
    r"""Return the text of `value` with control characters and direction marks escaped, as in `\x1b` or `\u2028`.

    What comes from a file goes through here before it is shown: a terminal would obey the escape sequences in it.

    Args:
        keep: control characters that stay as they are.
    """
    return escape(str(value), lambda character: character.encode("unicode_escape").decode("ascii"), keep)


def escape(text: str, write: Callable[[str], str], keep: str = "\n\t") -> str:
    """Return the text with each character that acts on a terminal replaced by what `write` makes of it."""
    if text.isprintable():
        return text
    return "".join(each if each in keep or not _acts(each) else write(each) for each in text)


def _acts(character: str) -> bool:
    return character in BIDI or unicodedata.category(character) in CATEGORIES


class PrintableFilter(logging.Filter):
    """Escape the messages of a logger, which may quote files."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if (escaped := printable(message)) != message:
            record.msg, record.args = escaped, ()
        return True


class PePatchError(Exception):
    """Root of everything this library raises on purpose. Its message is safe to print."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UnknownNameError(PePatchError, ValueError):
    """A scheme, family, task or target that does not exist."""


class OptionError(PePatchError, TypeError):
    """An option that is unknown or missing, or a value that it cannot take."""


class NoEffectError(PePatchError, RuntimeError):
    """A requested effect did not reach a module."""


class AlreadyPatchedError(PePatchError, RuntimeError):
    """The model carries a patch, or a scaling of its own, that this call did not say what to do with."""


class UnsupportedError(PePatchError, NotImplementedError):
    """A pair of scheme and model, or scheme and backend, that cannot work."""


class BeyondWindowError(PePatchError, ValueError):
    """A sequence is longer than the window the model is patched for."""


class CheckpointError(PePatchError, OSError):
    """A folder that is not a checkpoint, or a checkpoint that does not hold what it claims."""


class MismatchError(PePatchError, ValueError):
    """An adapter of another scheme than the model stands under."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'yarn'?"` for the closest of `choices`, or an empty string when none is close."""
    matches = get_close_matches(str(name), list(choices), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not in a registry: what was asked, the near name, what there is."""
    choices = sorted(choices)
    return UnknownNameError(f"Unknown {kind} {name!r}.{nearest(name, choices)} There are: {', '.join(choices)}.")
