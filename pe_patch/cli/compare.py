"""`pe-patch compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import AsJson, Device, Dtype, Factor, Overwrite
from .output import command_line, console, echo, print_json


@app.command(
    epilog="\b\nExamples:\n"
    '  pe-patch compare ./my-llama --scheme yarn linear "self_extend:group=8,window=1024" --factor 4 --output found\n'
    "  pe-patch compare ./my-llama --scheme yarn ntk --factor 4 --steps 200 --output tuned\n"
    "  pe-patch compare --preset survey --output survey"
)
def compare(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A local folder or the name of a model on the hub.")
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEME...", help="One or more: a name, name:option=value,option=value, or a JSON dict."),
    ] = None,
    factor: Factor = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, metavar="TOKENS...", help="Default: the window x 1, 2, 4 and 8.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK...", help="One or more tasks; see `pe-patch list tasks`.")
    ] = None,
    fine_tune: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE.yaml", help="Train every contender by this recipe, and measure again."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of its last phase; without a recipe, of tiny_yarn's.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions at each length.")] = 50,
    text: Annotated[str, typer.Option(help="stdlib, a folder, a file or a data set of the hub.")] = "stdlib",
    seed: Annotated[int, typer.Option(help="Of the questions, the places in the text and the training.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences in one forward.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="A comparison with a model of its own: survey or demo; takes no MODEL.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A preset's two steps and few questions: does it run?")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes side by side (default: processors / threads, presets: processors; 0: none)."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="The folder of everything; what is finished there is not done again.")
    ] = Path("comparison"),
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Hold several schemes against each other on one model: what each gives beyond the window, and what it costs."""
    from ..compare import command

    asked = {
        "model": model, "scheme": scheme, "factor": factor, "length": length, "task": task, "fine_tune": fine_tune,
        "steps": steps, "samples": samples, "text": text, "seed": seed, "batch_size": batch_size, "dtype": dtype,
        "device": device,
    }  # fmt: skip
    found, page = command.run(
        asked, output, preset=preset, quick=quick, workers=workers, line=command_line(), overwrite=overwrite
    )
    if as_json:
        print_json(found.to_dict())
    else:
        command.show(found, console())
    echo(f"Report: {page}", err=True)
    for label, reason in found.failures.items():
        echo(f"pe-patch: {label} failed: {reason}", err=True)
    if found.failures:
        raise typer.Exit(1)
