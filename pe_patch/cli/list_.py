"""`pe-patch list`."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import app
from .options import AsJson
from .output import console, print_json


@app.command("list", epilog="\b\nExample:\n  pe-patch list schemes --json")
def list_(
    what: Annotated[str | None, typer.Argument(metavar="[schemes|families|tasks]", help="Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the schemes, the model families and the tasks, each with a clause and its paper."""
    from . import catalogue

    found = catalogue.catalogue()
    if what is not None:
        found = {what: catalogue.part(found, what)}
    if as_json:
        print_json(found)
        return
    for table in catalogue.tables(found):
        console().print(table)
