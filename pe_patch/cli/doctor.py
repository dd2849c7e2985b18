"""Define `pe-patch doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import app
from .options import AsJson
from .output import console, print_json


@app.command(epilog="\b\nExample:\n  pe-patch doctor ./my-llama-32k\n  pe-patch doctor ./config.json --json")
def doctor(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A checkpoint folder, GGUF file, config.json or hub name.")
    ],
    as_json: AsJson = False,
) -> None:
    """Compare what a config claims about positions with what the built model does. Needs no weights.

    Exits with code 1 if they differ.
    """
    from ..doctor import diagnose
    from ..doctor.report import render

    diagnosis = diagnose(path)
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        console().print(render(diagnosis))
    if not diagnosis.healthy:
        raise typer.Exit(1)
