"""`pe-patch demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import AsJson, Overwrite
from .output import print_results


@app.command(epilog="\b\nExample:\n  pe-patch demo --output report")
def demo(
    output: Annotated[Path, typer.Option(help="The folder of the report.")] = Path("report"),
    steps: Annotated[int | None, typer.Option(min=0, help="Steps of the fine-tune (default: the recipe's).")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Train the base model first.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer questions and steps: a first look.")] = False,
    seed: Annotated[int, typer.Option(help="Of the questions and of the training.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Take a small model to eight times its window, measure six schemes, fine-tune with one, write a report."""
    from dataclasses import replace

    from rich.console import Console

    from ..checkpoints.loading import quiet_host
    from ..compare import demo as demonstration

    quiet_host()
    settings = demonstration.quick(output) if quick else demonstration.Settings(output=output)
    chosen = replace(settings, from_scratch=from_scratch, seed=seed, steps=settings.steps if steps is None else steps)
    chosen = replace(chosen, overwrite=overwrite)
    results = demonstration.run(chosen, Console(stderr=as_json))
    if as_json:
        print_results(results)
