"""Define `pe-patch compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import AsJson, Device, Dtype, Factor, Overwrite, parse_length_option
from .output import command_line, console, echo, is_quiet, note, print_json, set_continues


@app.command(
    epilog="\b\nExamples:\n"
    '  pe-patch compare ./my-llama --scheme yarn linear "self_extend:group=8,window=1024" --factor 4 --output found\n'
    "  pe-patch compare ./my-llama --scheme yarn ntk --factor 4 --steps 200 --output tuned\n"
    "  pe-patch compare --preset survey --output survey"
)
def compare(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A folder, GGUF file or hub name.")] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCHEME...", help="One or more schemes: a name, name:option=value,option=value, or a JSON dict."
        ),
    ] = None,
    factor: Factor = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            parser=parse_length_option,
            metavar="TOKENS...",
            help="One or more lengths in tokens, such as 8192 or 8k (default: the window x 1, 2, 4 and 8).",
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK...", help="One or more tasks; see `pe-patch list tasks`.")
    ] = None,
    fine_tune: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE.yaml", help="Train each scheme with this recipe, and measure again."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the recipe's last phase (default recipe: tiny_yarn).")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Questions at each length; below 32, perplexity reads less text, too.")
    ] = 50,
    text: Annotated[str, typer.Option(help="Text source: stdlib, a folder, a file or a hub data set.")] = "stdlib",
    seed: Annotated[int, typer.Option(help="Random seed for questions, text positions and training.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences in one forward pass.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Run a prepared comparison with its own model: survey or demo. Takes no MODEL.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Test a preset with two steps and few questions.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Parallel processes (default: processors / threads; for presets: processors; 0: none)."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Output folder. A rerun skips finished work in it.")] = Path(
        "comparison"
    ),
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare several schemes on one model: quality beyond the window, and cost."""
    from ..compare import command

    arguments = {
        "model": model, "scheme": scheme, "factor": factor, "length": length, "task": task, "fine_tune": fine_tune,
        "steps": steps, "samples": samples, "text": text, "seed": seed, "batch_size": batch_size, "dtype": dtype,
        "device": device,
    }  # fmt: skip
    set_continues(output)
    comparison, page = command.run(
        arguments,
        output,
        preset=preset,
        quick=quick,
        workers=workers,
        line=command_line(),
        overwrite=overwrite,
        progress=not is_quiet(),
    )
    if as_json:
        print_json(comparison.to_dict())
    else:
        command.show(comparison, console())
    note(f"Report: {page}")
    for label, reason in comparison.failures.items():
        echo(f"pe-patch: {label} failed: {reason}", err=True)
    if comparison.failures:
        raise typer.Exit(1)
