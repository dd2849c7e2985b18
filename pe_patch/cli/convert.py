"""Define `pe-patch convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import AsJson, Device, Dtype, Model, Options, Overwrite, parse_length_option
from .output import console, is_quiet, print_json


@app.command(
    epilog="\b\nExamples:\n  pe-patch convert ./my-llama --to mla --cache-ratio 1/4 --out ./my-llama-mla\n"
    "  pe-patch convert ./my-llama --to mla --sweep --output sweep"
)
def convert(
    model: Model,
    to: Annotated[str, typer.Option(help="Target: mla, multi-head latent attention.")],
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD...", help="Method: transmla (default), mha2mla or svd; sweep: all."),
    ] = None,
    kv_rank: Annotated[int | None, typer.Option(min=1, help="Width of the cached latent.")] = None,
    cache_ratio: Annotated[
        list[str] | None, typer.Option(metavar="SHARE...", help="Share of the cache size to keep, such as 1/8.")
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(min=0, help="Maximum relative increase of the loss, such as 0.02.")
    ] = None,
    rope_dim: Annotated[int | None, typer.Option(min=2, help="Number of dimensions that still rotate.")] = None,
    option: Options = None,
    calibration: Annotated[
        str, typer.Option(help="Calibration text: stdlib, a folder, a file or a hub data set.")
    ] = "stdlib",
    calibration_tokens: Annotated[
        int, typer.Option(parser=parse_length_option, metavar="TOKENS", help="Number of calibration tokens.")
    ] = 65536,
    text: Annotated[
        str | None, typer.Option(help="Text to measure on (default: held-out files of the calibration text).")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            parser=parse_length_option,
            metavar="TOKENS",
            help="Length to measure at (default: the window, at most 2048).",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of questions about facts hidden in the text.")] = 100,
    no_retrieval: Annotated[bool, typer.Option("--no-retrieval", help="Measure loss only, without retrieval.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Compare methods at several sizes without saving a model.")
    ] = False,
    keep_original: Annotated[bool, typer.Option("--keep-original", help="Also save the replaced weights.")] = False,
    out: Annotated[Path | None, typer.Option(help="Save the converted model to this folder.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the sweep's table and picture.")] = Path("sweep"),
    overwrite: Overwrite = False,
    seed: Annotated[int, typer.Option(help="Random seed for calibration, questions and text positions.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Convert a trained model to a smaller cache, and measure the change. Fine-tune the result afterwards."""
    from ..convert import command

    sizes = {"kv_rank": kv_rank, "cache_ratio": cache_ratio, "max_loss": max_loss, "rope_dim": rope_dim}
    request = command.Request(
        target=to, methods=method or (), sizes=sizes, options=option or (), sweep=sweep, out=out, output=output,
        keep_original=keep_original, overwrite=overwrite,
    )  # fmt: skip
    questions = 0 if no_retrieval and not sweep else samples
    measurement = {
        "calibration": calibration,
        "tokens": calibration_tokens,
        "text": text,
        "length": length,
        "seed": seed,
    }
    result = command.run(
        model, request, {**measurement, "questions": questions}, (dtype, device), progress=not is_quiet()
    )
    if as_json:
        print_json(result.to_dict())
    else:
        result.show(console())
