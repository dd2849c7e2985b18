"""How commands say what they found: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer

_stdout: Any = None
"""Where JSON goes while other output is kept away from it; None is the present standard output."""


def console() -> Any:
    from rich.console import Console

    # A pipe has no width of its own: tables are not folded to 80 columns there.
    return Console() if sys.stdout.isatty() else Console(width=160)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False), file=_stdout)


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


def print_results(results: Any) -> None:
    from dataclasses import asdict

    print_json({"config": results.config, "rows": [asdict(row) for row in results.rows]})


def command_line() -> str:
    import shlex

    return shlex.join(["pe-patch", *sys.argv[1:]])
