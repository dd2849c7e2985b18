"""Define `pe-patch demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import AsJson, Overwrite
from .output import print_results


@app.command(epilog="\b\nExample:\n  pe-patch demo --output report")
def demo(
    output: Annotated[Path, typer.Option(help="Output folder for the report.")] = Path("report"),
    steps: Annotated[int | None, typer.Option(min=0, help="Steps of the fine-tuning (default: the recipe's).")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Train the base model first.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Use fewer questions and steps.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed for questions and training.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Extend a small model to eight times its window: measure six schemes, fine-tune with one, write a report."""
    from dataclasses import replace

    from rich.console import Console

    from ..checkpoints.sources import quiet_transformers
    from ..compare import demo as demonstration

    quiet_transformers()
    settings = demonstration.quick(output) if quick else demonstration.DemoSettings(output=output)
    chosen = replace(settings, from_scratch=from_scratch, seed=seed, steps=settings.steps if steps is None else steps)
    chosen = replace(chosen, overwrite=overwrite)
    results = demonstration.run(chosen, Console(stderr=as_json))
    if as_json:
        print_results(results)
