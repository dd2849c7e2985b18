"""Define `pe-patch export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import AsJson, Dtype, Factor, Model, OnExisting, Options, Overwrite, SchemeName, TargetLength
from .output import echo, print_json

TARGET = "Target: transformers, transformers4, vllm, sglang, llamacpp, or deepseek (latent attention)."


@app.command(epilog="\b\nExample:\n  pe-patch export ./my-llama ./my-llama-32k --scheme yarn --factor 8 --target vllm")
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Output folder.")],
    scheme: SchemeName = None,
    factor: Factor = None,
    target_length: TargetLength = None,
    option: Options = None,
    on_existing: OnExisting = None,
    target: Annotated[str, typer.Option(help=TARGET)] = "transformers",
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a model with its scheme so that it loads without pe_patch, and print how to serve it."""
    from ..checkpoints import sources
    from ..checkpoints.exporters.checkpoint import read_commands
    from ..checkpoints.exporters.export import TARGETS
    from ..checkpoints.exporters.export import export as export_model
    from ..checkpoints.folders import EXPORT, check_output
    from ..errors import unknown

    if target not in TARGETS:  # check before loading the model
        raise unknown("export target", target, TARGETS)
    check_output(output, EXPORT, inputs=[model], overwrite=overwrite)
    loaded, tokenizer = sources.load(model, dtype, "cpu")
    sources.apply(loaded, scheme, factor, option, on_existing, target_length)
    written = export_model(loaded, output, target=target, tokenizer=tokenizer, overwrite=overwrite)
    commands = read_commands(written)
    if as_json:
        print_json({"path": str(written), "target": target, "commands": commands})
        return
    echo(f"Wrote {written}")
    for command in commands:
        echo(f"  {command}")
    if commands:
        echo("See SERVE.md in this folder for details.")
