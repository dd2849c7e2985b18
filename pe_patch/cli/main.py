"""Run the commands of `pe-patch`. Each command is a module; importing it here registers it."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from ..errors import OptionError, PePatchError, TerminationSignal, UnknownNameError, sigterm_raises

# The order of the imports is the order in --help.
from . import (  # noqa: F401
    advise,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    extend,
    generate,
    inspect,
    list_,
    search,
    selftest,
    train,
)
from .application import app
from .output import echo, how_to_continue, json_alone, logging_to_terminal, print_traceback, set_continues, set_quiet
from .several import spread
from .wording import for_command_line

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes after SIGINT and SIGTERM, as a shell reports them."""
EVERYWHERE = {"--debug": "debug", "-v": "verbose", "--verbose": "verbose", "-q": "quiet", "--quiet": "quiet"}
"""Flags that every command takes, at any place."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 1 for a failure, 2 for wrong usage, 130 (SIGINT), 143 (SIGTERM).

    Args:
        arguments: the words after `pe-patch`; None takes `sys.argv`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {EVERYWHERE[word] for word in words if word in EVERYWHERE}
    words = [word for word in words if word not in EVERYWHERE]
    command = words[0] if words else ""
    level = logging.ERROR if "quiet" in flags else logging.INFO if "verbose" in flags else None
    set_quiet("quiet" in flags)
    set_continues(None)
    try:
        with logging_to_terminal(command, level):
            return _run(words, flags, command)
    finally:
        set_quiet(False)


def _run(words: list[str], flags: set[str], command: str) -> int:
    """Run a command and return the exit code."""
    try:
        if {"quiet", "verbose"} <= flags:
            raise OptionError("-q and -v exclude each other: leave one out.")
        with sigterm_raises(), json_alone() if "--json" in words else nullcontext():
            app(spread(words), prog_name="pe-patch")
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
        if code == INTERRUPTED and (remedy := how_to_continue()):  # typer has turned Ctrl-C into this exit
            echo(f"pe-patch: Interrupted.{remedy}", err=True)
        return code
    except TerminationSignal:
        echo(f"pe-patch: SIGTERM received.{how_to_continue()}", err=True)
        return TERMINATED
    except Exception as error:
        if "debug" in flags:
            sys.excepthook = print_traceback
            raise
        kind = "" if isinstance(error, PePatchError) else f"{type(error).__name__}: "
        message = for_command_line(" ".join(str(error).split()), command)
        if isinstance(error, OSError) and not isinstance(error, PePatchError) and (remedy := how_to_continue()):
            message = f"{message}. Correct this.{remedy}"  # a full disk, or a folder that became read-only
        echo(f"pe-patch: {kind}{message}", err=True)
        return 2 if isinstance(error, UnknownNameError | OptionError) else 1
    return 0
