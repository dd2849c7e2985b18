"""Train or fine-tune a causal language model from a recipe, with the positional scheme that the recipe names.

accelerate launch recipes/finetune.py recipes/configs/tiny_yarn.yaml seed=1 phases.0.steps=100
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..compat import require_extra
from ..errors import PePatchError
from .guard import TERMINATED_EXIT_CODE, PostTrainingError, Terminated
from .reading import load_recipe
from .recipe import Recipe, RecipeError
from .trainer import Trainer

__all__ = ["Recipe", "load_recipe", "main", "train"]


EXIT_CODES: dict[type[PePatchError], int] = {RecipeError: 2, Terminated: TERMINATED_EXIT_CODE, PePatchError: 1}


def train(recipe: Recipe) -> Any:
    """Run the recipe and return the trained model, also saved in `<output>/model`. A dry run trains nothing."""
    require_extra("train")  # the picture comes last, and nothing may be lost then
    trainer = Trainer(recipe)
    return trainer.show_plan() if recipe.dry_run else trainer.run()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: the words after the command; None takes `sys.argv`.

    Returns:
        0 after a complete run, 2 for an invalid recipe, 1 for a failed run, 143 for a run that SIGTERM ended after a
        checkpoint was saved, and 130 for a run that was interrupted after its model was saved.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="Path of a YAML file, such as recipes/configs/tiny_yarn.yaml")
    parser.add_argument(
        "overrides", nargs="*", help="Set recipe values: key=value or nested.key=value, with or without a leading --."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Print the plan and its cost, and exit without training."
    )
    known, dashed = parser.parse_known_args(arguments)
    overrides = [*known.overrides, *dashed, *["dry_run=true"] * known.dry_run]
    try:
        train(load_recipe(known.recipe, overrides))
    except tuple(EXIT_CODES) as error:
        print(error, file=sys.stderr)
        if isinstance(error, PostTrainingError):
            return error.exit_code
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    return 0
