"""What can go wrong, and how to say it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PePatchError(Exception):
    """Root of everything this library raises on purpose."""


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


class OutputError(PePatchError, FileExistsError):
    """A folder that may not be written to: an input, one that holds something else, or one that cannot be created."""


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
