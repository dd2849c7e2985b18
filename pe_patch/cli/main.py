"""Run the commands of `pe-patch`. Each command is a module; importing it here registers it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from ..errors import OptionError, PePatchError, UnknownNameError

# The order of the imports is the order in --help.
from . import (  # noqa: F401
    advise,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    list_,
    search,
    selftest,
    train,
)
from .application import app
from .output import echo, json_alone, log_to_terminal, print_traceback, set_quiet
from .several import spread
from .wording import for_command_line

EVERYWHERE = {"--debug": "debug", "-v": "verbose", "--verbose": "verbose", "-q": "quiet", "--quiet": "quiet"}
"""Flags that every command takes, at any place."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 1 for a failure, 2 for wrong usage.

    Args:
        arguments: the words after `pe-patch`; None takes `sys.argv`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {EVERYWHERE[word] for word in words if word in EVERYWHERE}
    words = [word for word in words if word not in EVERYWHERE]
    command = words[0] if words else ""
    set_quiet("quiet" in flags)
    log_to_terminal(command, logging.ERROR if "quiet" in flags else logging.INFO if "verbose" in flags else None)
    try:
        if {"quiet", "verbose"} <= flags:
            raise OptionError("-q and -v exclude each other: leave one out.")
        with json_alone() if "--json" in words else nullcontext():
            app(spread(words), prog_name="pe-patch")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception as error:
        if "debug" in flags:
            sys.excepthook = print_traceback
            raise
        kind = "" if isinstance(error, PePatchError) else f"{type(error).__name__}: "
        message = for_command_line(" ".join(str(error).split()), command)
        echo(f"pe-patch: {kind}{message}", err=True)
        return 2 if isinstance(error, UnknownNameError | OptionError) else 1
    return 0
