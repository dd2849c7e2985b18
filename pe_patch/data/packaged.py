"""Locate files that come with the package: the demo model and the recipes."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.2.0"

PACKAGE = Path(__file__).resolve().parents[1]
DEMO = "demo"
"""Name of the packaged model wherever a model is named."""
DEMO_MODEL = PACKAGE / "assets" / DEMO


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: `pe_patch/recipes` in a wheel, `recipes` in a checkout.

    Raises:
        FileNotFoundError: neither folder exists.
    """
    for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes"):
        if (folder / "configs").is_dir():
            return folder
    raise FileNotFoundError(f"The recipes are missing from {PACKAGE / 'recipes'}; reinstall pe_patch.")


def shipped_recipes() -> dict[str, Path]:
    """Return the path of each shipped recipe by its name, such as `tiny_yarn`."""
    return {path.stem: path for path in sorted((recipes_folder() / "configs").glob("*.yaml"))}
