"""Print results: tables for people, JSON for programs.

All output of the command line passes through here, because it may quote a checkpoint. Escape sequences, control
characters and direction marks are shown, not executed.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer

from ..errors import escape, finite, printable
from .wording import for_command_line

_quiet = False
_continues: Any = None
"""Output folder in which the same command continues; None if it starts over."""
_stdout: Any = None
"""Destination of JSON while other output is redirected; None is the current standard output."""


def set_quiet(quiet: bool) -> None:
    """Set whether commands print only results and errors."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Return whether commands print only results and errors."""
    return _quiet


def set_continues(output: Any) -> None:
    """Set the output folder in which the same command continues after it was stopped; None if it starts over."""
    global _continues
    _continues = output


def how_to_continue() -> str:
    """Return what to type after the command was stopped, or an empty string if it keeps nothing."""
    if _continues is None:
        return ""
    return f" Give the same command again: it continues from what is finished in {_continues}."


def note(text: Any, always: bool = False) -> None:
    """Print a line about the run on stderr; a quiet command prints it only with `always`."""
    if always or not _quiet:
        echo(text, err=True)


def write(text: str) -> None:
    """Print a piece of text without a line break, with control characters escaped."""
    typer.echo(printable(text), nl=False)
    sys.stdout.flush()


def echo(text: Any, err: bool = False) -> None:
    """Print a line with control characters escaped."""
    typer.echo(printable(text), err=err)


def console(stderr: bool = False) -> Any:
    """Return a rich console that escapes control characters."""
    from rich.console import Console

    class PrintableConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    # A pipe has no width, so do not fold tables to 80 columns there.
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return PrintableConsole(stderr=stderr) if terminal else PrintableConsole(stderr=stderr, width=160)


def print_json(value: Any) -> None:
    """Print a value as JSON, with control characters escaped, and null for NaN and infinity."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    typer.echo(escape(text, lambda character: f"\\u{ord(character):04x}"), file=_stdout)


@contextmanager
def json_alone() -> Iterator[None]:
    """Reserve standard output for JSON: redirect what libraries print (such as DeepSpeed on import) to stderr."""
    global _stdout
    _stdout = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = None


class PrintableFormatter(logging.Formatter):
    """Escape log messages of this and other libraries, and name the flags of the command in those of this one."""

    command = ""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return printable(for_command_line(text, self.command) if record.name.startswith("pe_patch") else text)


class FirstOnly(logging.Filter):
    """Drop the warnings that were logged before, as where a command patches the same model for each of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        repeated = record.levelno == logging.WARNING and message in self.seen
        self.seen.add(message)
        return not repeated


@contextmanager
def logging_to_terminal(command: str = "", level: int | None = None) -> Iterator[None]:
    """Send log messages and Python's warnings to stderr, as `logging.basicConfig` does, escaped, until the end.

    Then handlers and levels are as before, so that a program that calls `main` keeps its own.

    Args:
        command: the name of the command.
        level: the least level of this library's messages; None for warnings and above.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    handler.addFilter(FirstOnly())
    root, ours = logging.getLogger(), logging.getLogger("pe_patch")
    theirs = logging.getLogger("bitsandbytes")  # it warns about a kernel that a CPU does not need
    before = PrintableFormatter.command, ours.level, theirs.level
    if free := not root.handlers:
        root.addHandler(handler)
    PrintableFormatter.command = command
    ours.setLevel(logging.NOTSET if level is None else level)
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        PrintableFormatter.command, our_level, their_level = before
        ours.setLevel(our_level)
        theirs.setLevel(their_level)
        if free:
            root.removeHandler(handler)


def print_traceback(kind: Any, error: Any, trace: Any) -> None:
    """Print an uncaught exception; replaces `sys.excepthook`."""
    echo("".join(traceback.format_exception(kind, error, trace)).rstrip(), err=True)


def print_results(results: Any) -> None:
    """Print the rows of an evaluation as JSON."""
    from dataclasses import asdict

    print_json({"config": results.config, "rows": [asdict(row) for row in results.rows]})


def command_line() -> str:
    """Return the command that the user typed."""
    import shlex

    return shlex.join(["pe-patch", *sys.argv[1:]])
