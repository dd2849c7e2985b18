"""Define `pe-patch train`."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import app


@app.command(
    epilog="\b\nExamples:\n  pe-patch train tiny_yarn --dry-run\n  pe-patch train my_recipe.yaml seed=1 "
    "phases.0.steps=100\n  accelerate launch --num_processes 8 -m pe_patch.training yarn_llama_32k"
)
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Path of a YAML file, or the name of a shipped recipe.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Set recipe values.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, its memory and its time without training.")
    ] = False,
) -> None:
    """Train or fine-tune a model with a recipe, in one process.

    For several processes, run: accelerate launch -m pe_patch.training RECIPE [KEY=VALUE]...
    """
    from ..training.run import main

    raise typer.Exit(main([recipe, *(overrides or ()), *["--dry-run"] * dry_run]))
