"""How a run is put on disk so that it can go on after a crash as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .engines import Engine
from .recipe import Recipe, RecipeError

LASTING = ("model", "tokenizer", "scheme", "lora", "distill", "data", "phases", "optimizer", "mixed_precision", "seed")
"""The parts of a recipe that a resumed run must share with the run it goes on from."""


@dataclass
class Progress:
    """Where a run stands: what has been done, so also what comes next."""

    step: int = 0
    """Optimiser steps in all phases."""
    phase: int = 0
    phase_step: int = 0
    """Optimiser steps in this phase."""
    tokens: int = 0
    """Tokens seen, by all processes."""
    recent: list[float] = field(default_factory=list)
    """The accuracies of this phase's last steps, oldest first."""
    losses: list[float] = field(default_factory=list)
    """The losses of this phase's last steps, oldest first."""
    lowest: float | None = None
    """The lowest mean of so many losses in this phase."""

    def next_phase(self) -> None:
        """Begin the phase after this one."""
        self.phase, self.phase_step = self.phase + 1, 0
        self.recent, self.losses, self.lowest = [], [], None


def save_checkpoint(engine: Engine, folder: Path, progress: Progress, recipe: Recipe) -> Path:
    """Write `folder/step-000123` and drop the oldest; a checkpoint is there whole or not at all."""
    accelerator = engine.accelerator
    path = folder / f"step-{progress.step:06d}"
    unfinished = folder / f".{path.name}.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    engine.save(unfinished)
    # Every process has its own random state to write: rename only when all of them have.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        record = {"progress": asdict(progress), "recipe": _lasting(recipe)}
        (unfinished / "progress.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        unfinished.rename(path)
        for old in complete_checkpoints(folder)[: -recipe.checkpoints.keep]:
            (old / "progress.json").unlink()  # first, so that half a checkpoint never looks like a whole one
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "progress.json").is_file())


def find_checkpoint(recipe: Recipe, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None to start; raises where starting would overwrite another run."""
    present = complete_checkpoints(folder)
    if recipe.resume is None:
        if present:
            raise RecipeError(
                f"{folder} already holds the checkpoints of a run ({present[-1].name} is the newest). Give resume=auto "
                "to go on from it, or another output."
            )
        return None
    if recipe.resume == "auto":
        return present[-1] if present else None
    path = Path(recipe.resume)
    if not (path / "progress.json").is_file():
        raise RecipeError(f"resume: {path.absolute()} is no checkpoint of this script. It is 'auto' or such a folder.")
    return path


def load_checkpoint(engine: Engine, path: Path, recipe: Recipe) -> Progress:
    """Put weights, optimiser and random states back; a checkpoint of another recipe raises `RecipeError`."""
    record = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    ours, theirs = _lasting(recipe), record["recipe"]
    different = [name for name in LASTING if ours[name] != theirs.get(name)]
    if different:
        raise RecipeError(
            f"{path} was made by a recipe with another {', '.join(different)}; it cannot be gone on from."
        )
    engine.accelerator.wait_for_everyone()
    engine.load(path)
    return Progress(**record["progress"])


def _lasting(recipe: Recipe) -> dict[str, Any]:
    whole: Any = OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True)
    del whole["data"]["workers"]  # changes how fast data come, not which
    return json.loads(json.dumps({name: whole[name] for name in LASTING}))
