"""How commands say what they found: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer


def console() -> Any:
    from rich.console import Console

    # A pipe has no width of its own: tables are not folded to 80 columns there.
    return Console() if sys.stdout.isatty() else Console(width=160)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_results(results: Any) -> None:
    from dataclasses import asdict

    print_json({"config": results.config, "rows": [asdict(row) for row in results.rows]})


def command_line() -> str:
    import shlex

    return shlex.join(["pe-patch", *sys.argv[1:]])
