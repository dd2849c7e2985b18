"""Train or fine-tune a causal language model after a recipe, with the positions that the recipe asks for.

accelerate launch recipes/finetune.py recipes/configs/tiny_yarn.yaml seed=1 phases.0.steps=100
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import PePatchError
from .guard import LEFT, Left, Unfinished
from .reading import load_recipe
from .recipe import Recipe, RecipeError
from .trainer import Trainer

__all__ = ["Recipe", "load_recipe", "main", "train"]


EXIT_CODES: dict[type[PePatchError], int] = {RecipeError: 2, Left: LEFT, PePatchError: 1}


def train(recipe: Recipe) -> Any:
    """Run the recipe and return the trained model, which is also in `<output>/model`; a dry run trains nothing."""
    trainer = Trainer(recipe)
    return trainer.show_plan() if recipe.dry_run else trainer.run()


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for a recipe that is wrong, 1 for a run that failed, 143 for one that
    SIGTERM ended and that was saved, 130 for one that was interrupted after its model was saved."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="a YAML file, such as recipes/configs/tiny_yarn.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value or nested.key=value, with or without leading --")
    parser.add_argument("--dry-run", action="store_true", help="print what it would do and cost, and stop")
    known, dashed = parser.parse_known_args(arguments)
    overrides = [*known.overrides, *dashed, *["dry_run=true"] * known.dry_run]
    try:
        train(load_recipe(known.recipe, overrides))
    except tuple(EXIT_CODES) as error:
        print(error, file=sys.stderr)
        if isinstance(error, Unfinished):
            return error.exit_code
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    return 0
