"""Save and load checkpoints, so that a resumed run continues exactly."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .engines import Engine
from .libraries import OmegaConf
from .recipe import Recipe, RecipeError

LASTING = ("model", "tokenizer", "scheme", "lora", "distill", "data", "phases", "optimizer", "mixed_precision", "seed")
"""Parts of a recipe that a resumed run must share with its checkpoint."""


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0
    """Optimiser steps in all phases so far."""
    phase: int = 0
    """Index of the current phase."""
    phase_step: int = 0
    """Optimiser steps in the current phase so far."""
    tokens: int = 0
    """Tokens seen by all processes."""
    recent: list[float] = field(default_factory=list)
    """Accuracies of the last steps of this phase, oldest first."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last steps of this phase in nats, oldest first."""
    lowest: float | None = None
    """Lowest mean of that many losses in this phase; None until there are enough."""

    def next_phase(self) -> None:
        """Move to the next phase and reset what belongs to one phase."""
        self.phase, self.phase_step = self.phase + 1, 0
        self.recent, self.losses, self.lowest = [], [], None


def save_checkpoint(engine: Engine, folder: Path, progress: Progress, recipe: Recipe) -> Path:
    """Write `folder/step-000123` atomically, delete the oldest checkpoints, and return the new path."""
    accelerator = engine.accelerator
    path = folder / f"step-{progress.step:06d}"
    unfinished = folder / f".{path.name}.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    engine.save(unfinished)
    # Every process writes its random state; rename the folder only after all have.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        record = {"progress": asdict(progress), "recipe": _lasting(recipe)}
        (unfinished / "progress.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        unfinished.rename(path)
        for old in complete_checkpoints(folder)[: -recipe.checkpoints.keep]:
            (old / "progress.json").unlink()  # first, so that a partly deleted checkpoint never looks complete
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "progress.json").is_file())


def find_checkpoint(recipe: Recipe, folder: Path) -> Path | None:
    """Return the checkpoint to resume from, or None to start.

    Raises:
        RecipeError: starting would overwrite another run's checkpoints, or `resume` is not a checkpoint.
    """
    present = complete_checkpoints(folder)
    if recipe.resume is None:
        if present:
            raise RecipeError(
                f"{folder} already holds checkpoints of a run (newest: {present[-1].name}). Give resume=auto to "
                "resume from it, or another output."
            )
        return None
    if recipe.resume == "auto":
        return present[-1] if present else None
    path = Path(recipe.resume)
    if not (path / "progress.json").is_file():
        raise RecipeError(f"resume: {path.absolute()} is not a checkpoint; use 'auto' or a step-* folder.")
    return path


def load_checkpoint(engine: Engine, path: Path, recipe: Recipe) -> Progress:
    """Restore weights, optimiser and random states, and return the progress.

    Raises:
        RecipeError: the checkpoint belongs to a different recipe.
    """
    record = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    ours, theirs = _lasting(recipe), record["recipe"]
    different = [name for name in LASTING if ours[name] != theirs.get(name)]
    if different:
        raise RecipeError(f"{path} was made by a recipe with another {', '.join(different)}; cannot resume from it.")
    engine.accelerator.wait_for_everyone()
    engine.load(path)
    return Progress(**record["progress"])


def _lasting(recipe: Recipe) -> dict[str, Any]:
    whole: Any = OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True)
    del whole["data"]["workers"]  # changes the loading speed, not the data
    return json.loads(json.dumps({name: whole[name] for name in LASTING}))
