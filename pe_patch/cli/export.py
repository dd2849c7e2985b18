"""`pe-patch export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import AsJson, Dtype, Factor, Model, OnExisting, Options, SchemeName
from .output import print_json


@app.command(
    epilog="\b\nExample:\n  pe-patch export ./my-llama ./my-llama-32k --scheme yarn --factor 8 --target transformers"
)
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    scheme: SchemeName = None,
    factor: Factor = None,
    option: Options = None,
    on_existing: OnExisting = None,
    target: Annotated[str, typer.Option(help="For whom: transformers, ...")] = "transformers",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a model with its scheme so that it loads without pe_patch."""
    from pe_patch import export as export_model
    from pe_patch import loading

    loaded, tokenizer = loading.load(model, dtype, "cpu")
    loading.apply(loaded, scheme, factor, option, on_existing)
    written = export_model(loaded, output, target=target)
    tokenizer.save_pretrained(written)
    if as_json:
        print_json({"path": str(written), "target": target})
    else:
        typer.echo(f"Written to {written}")
