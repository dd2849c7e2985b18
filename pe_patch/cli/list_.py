"""Define `pe-patch list`."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import app
from .options import AsJson
from .output import console, print_json


@app.command("list", epilog="\b\nExample:\n  pe-patch list schemes --json")
def list_(
    kind: Annotated[
        str | None, typer.Argument(metavar="[schemes|families|tasks]", help="What to list (default: everything).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List schemes, model families and tasks, each with a summary and its paper."""
    from . import catalogue

    entries = catalogue.catalogue()
    if kind is not None:
        entries = {kind: catalogue.entries_of(entries, kind)}
    if as_json:
        print_json(entries)
        return
    for table in catalogue.tables(entries):
        console().print(table)
