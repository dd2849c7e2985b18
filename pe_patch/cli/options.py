"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or the name of a model on the hub.")]
SchemeName = Annotated[str | None, typer.Option("--scheme", help="A scheme to patch in, by name or as a JSON dict.")]
Factor = Annotated[str | None, typer.Option("--factor", help="The scheme's factor: target over trained length.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the scheme; may be repeated.")
]
OnExisting = Annotated[
    str | None, typer.Option(help="What to do with a scaling the model already has: error, replace or compose.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cuda or cpu (default: a GPU if there is one).")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write into a folder that holds something else; never onto the input.")
]
