"""Define arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or a hub name.")]
SchemeName = Annotated[
    str | None, typer.Option("--scheme", help="Scheme to patch the model with, by name or as a JSON dict.")
]
Factor = Annotated[str | None, typer.Option("--factor", help="The scheme's factor: target length / trained length.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Set an option of the scheme. Repeatable.")
]
OnExisting = Annotated[
    str | None, typer.Option(help="How to handle the model's existing scaling: error, replace or compose.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[str, typer.Option(help="Data type: auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda or cpu (default: a GPU if available).")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write into a folder with other content. Inputs are never overwritten.")
]
