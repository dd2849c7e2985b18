"""How commands say what they found: tables for people, JSON for machines.

All output of the command line goes through here, since all of it may quote a checkpoint: escape sequences, control
characters and direction marks are shown, not obeyed.
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

from ..errors import escape, printable

_stdout: Any = None
"""Where JSON goes while other output is kept away from it; None is the present standard output."""


def echo(text: Any, err: bool = False) -> None:
    """Print a line, with what a terminal would obey escaped."""
    typer.echo(printable(text), err=err)


def console(stderr: bool = False) -> Any:
    from rich.console import Console

    class PrintableConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    # A pipe has no width of its own: tables are not folded to 80 columns there.
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return PrintableConsole(stderr=stderr) if terminal else PrintableConsole(stderr=stderr, width=160)


def print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    typer.echo(escape(text, lambda character: f"\\u{ord(character):04x}"), file=_stdout)


@contextmanager
def json_alone() -> Iterator[None]:
    """Keep standard output for JSON: what libraries print there (DeepSpeed does, when imported) goes to stderr."""
    global _stdout
    _stdout = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = None


class PrintableFormatter(logging.Formatter):
    """Escape every message that reaches the terminal, of this library or of another."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_terminal() -> None:
    """Send log messages and Python's warnings to stderr, as `logging.basicConfig` does, escaped."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])


def print_traceback(kind: Any, error: Any, trace: Any) -> None:
    """Print an uncaught exception; takes the place of `sys.excepthook`."""
    echo("".join(traceback.format_exception(kind, error, trace)).rstrip(), err=True)


def print_results(results: Any) -> None:
    from dataclasses import asdict

    print_json({"config": results.config, "rows": [asdict(row) for row in results.rows]})


def command_line() -> str:
    import shlex

    return shlex.join(["pe-patch", *sys.argv[1:]])
