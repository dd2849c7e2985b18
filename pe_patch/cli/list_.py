"""Define `pe-patch list`."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import app
from .options import AsJson
from .output import console, echo, print_json


@app.command(
    "list",
    epilog="\b\nExamples:\n  pe-patch list schemes --json\n  pe-patch list schemes yarn\n  pe-patch list tasks needle",
)
def list_(
    kind: Annotated[
        str | None, typer.Argument(metavar="[schemes|families|tasks]", help="What to list (default: everything).")
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One of them, with its options and what they mean.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List schemes, model families and tasks, each with a summary and its paper; or show one with its options."""
    from . import catalogue

    entries = catalogue.catalogue()
    if kind is not None and name is not None:
        entry = catalogue.entry_of(entries, kind, name)
        if as_json:
            print_json(entry)
            return
        for part in catalogue.page(kind, entry):
            if isinstance(part, str):
                echo(part)
            else:
                console().print(part)
        return
    if kind is not None:
        entries = {kind: catalogue.entries_of(entries, kind)}
    if as_json:
        print_json(entries)
        return
    for table in catalogue.tables(entries):
        console().print(table)
