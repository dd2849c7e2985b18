"""Replace the positional logic of a loaded Transformers model, extend its context, and measure that it reads it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any


def _is_command() -> bool:
    """Return whether this process was started as `pe-patch` or `python -m pe_patch`.

    The command loads the rest of the library when it runs something: `pe-patch --help` needs no torch.
    """
    program, words = sys.argv[0] if getattr(sys, "argv", None) else "", sys.orig_argv
    if program == "-m":
        return words[words.index("-m") + 1 :][:1] == ["pe_patch"] if "-m" in words else False
    # multiprocessing copies the parent's sys.argv into a child, but sys.orig_argv shows how the child was started.
    return PurePath(program).name in ("pe-patch", "pe-patch.exe") and program in words


ROOMS = {"evaluate": ".evaluation", "extend": ".extension"}
"""Names that are imported on first use, since patching does not need what they import (datasets, evaluate)."""

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .extension import extend

if TYPE_CHECKING or not _is_command():
    from .checkpoints import library
    from .checkpoints.library import *  # noqa: F403

    __all__ = ["evaluate", "extend"]
    __all__ += library.__all__


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return getattr(import_module(ROOMS[name], __name__), name)
    if name == "__all__" or not name.startswith("_"):
        loaded = import_module(".checkpoints.library", __name__)
        if name == "__all__":
            return [*ROOMS, *loaded.__all__]
        if name in loaded.__all__:
            return getattr(loaded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(import_module(__name__).__all__)
