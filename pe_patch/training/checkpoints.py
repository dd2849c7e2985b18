"""Save and find checkpoints, so that a resumed run continues exactly or is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import quoted
from .libraries import OmegaConf
from .recipe import Recipe, RecipeError

LASTING = ("model", "tokenizer", "scheme", "lora", "distill", "data", "phases", "optimizer", "mixed_precision", "seed")
"""Parts of a recipe that a resumed run must share with its checkpoint."""
RECORD = "progress.json"
"""File of a checkpoint that holds its progress, its recipe, its launch, and a list of its files."""
SUPERSEDED = "superseded"
"""Folder for checkpoints of steps that a run has left again, because it was resumed from an earlier one."""
BLOCK, BLOCKS = 1 << 20, 32
"""Size in bytes and number of the blocks of a file that its digest reads."""


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

    def check(self) -> None:
        """Raise `TypeError` if a value that was read from a file has another type."""
        for name in ("step", "phase", "phase_step", "tokens"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise TypeError(f"{name} is {quoted(getattr(self, name))}")
        numbers = {
            "recent": self.recent,
            "losses": self.losses,
            "lowest": [0.0 if self.lowest is None else self.lowest],
        }
        for name, values in numbers.items():
            if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
                raise TypeError(f"{name} is {quoted(getattr(self, name))}")

    def next_phase(self) -> None:
        """Move to the next phase and reset what belongs to one phase."""
        self.phase, self.phase_step = self.phase + 1, 0
        self.recent, self.losses, self.lowest = [], [], None


class DamagedCheckpoint(RecipeError):
    """Raised if a file of a checkpoint is missing, has another size or has other content than was written."""


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(path.name.partition("-")[2])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, in the order of their steps."""
    found = (path for path in folder.glob("step-*") if path.name[5:].isdigit() and (path / RECORD).is_file())
    return sorted(found, key=step_of)


def publish(written: Path, folder: Path, progress: Progress, recipe: Recipe, facts: Mapping[str, Any]) -> Path:
    """Turn a folder of written files into the checkpoint `folder/step-000123`, complete or not at all.

    Args:
        written: the folder with the files of all processes, on the same disk.
        folder: the folder of the checkpoints.
        progress: the progress of the run.
        recipe: the recipe of the run.
        facts: what a resumed run must share with this one, such as the number of processes.
    """
    files = {str(path.relative_to(written)): digest(path) for path in sorted(written.rglob("*")) if path.is_file()}
    record = {"progress": asdict(progress), "recipe": _lasting(recipe), "facts": dict(facts), "files": files}
    (written / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    for path in (*written.rglob("*"), written):
        _synchronise(path)
    final = folder / f"step-{progress.step:06d}"
    if final.exists():
        shutil.rmtree(final)
    written.rename(final)
    _synchronise(folder)
    return final


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest complete checkpoints, and what interrupted writes left behind."""
    for old in complete_checkpoints(folder)[:-keep]:
        (old / RECORD).unlink()  # first, so that a partly deleted checkpoint never looks complete
        shutil.rmtree(old)
    for path in folder.glob("step-*"):
        if path.is_dir() and not (path / RECORD).is_file():
            shutil.rmtree(path)


def digest(path: Path) -> str:
    """Return a hash of a file's size and content; of a large file, evenly spaced blocks."""
    size = path.stat().st_size
    count = min(BLOCKS, -(-size // BLOCK))
    starts = range(0, size, BLOCK) if size <= BLOCK * BLOCKS else np.linspace(0, size - BLOCK, count, dtype=np.int64)
    content = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in starts:
            file.seek(int(start))
            content.update(file.read(BLOCK))
    return content.hexdigest()


def _synchronise(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the record of a checkpoint after checking its files.

    Raises:
        DamagedCheckpoint: the record cannot be read, or a file is not as it was written.
    """
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        files, progress = record["files"], Progress(**record["progress"])
        progress.check()
        if wrong := [name for name in ("files", "recipe", "facts") if not isinstance(record[name], dict)]:
            raise TypeError(f"{wrong[0]} is not an object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path / RECORD} cannot be read ({type(error).__name__}: {error}).") from error
    if progress.step != step_of(path):
        raise DamagedCheckpoint(f"{path} holds the files of step {progress.step}.")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing.")
        if digest(file) != expected:
            raise DamagedCheckpoint(f"{file} is not as it was written: it is truncated, or from another checkpoint.")
    return record


def find_checkpoint(recipe: Recipe, folder: Path) -> Path | None:
    """Return the checkpoint to resume from, or None to start.

    Raises:
        RecipeError: starting would overwrite another run's checkpoints, or `resume` is not a checkpoint, or no
            checkpoint is intact.
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
        return _newest_intact(present)
    path = Path(recipe.resume)
    if not (path / RECORD).is_file():
        raise RecipeError(f"resume: {path.absolute()} is not a checkpoint; use 'auto' or a step-* folder.")
    read_checkpoint(path)
    return path


def _newest_intact(present: list[Path]) -> Path | None:
    problems: list[str] = []
    for path in reversed(present):
        try:
            read_checkpoint(path)
        except DamagedCheckpoint as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"Warning: {problem} Resuming from {path} instead.", file=sys.stderr)
        return path
    if problems:
        raise RecipeError(
            f"resume: no checkpoint is intact: {' '.join(problems)} Give another output to start again, or delete "
            f"{present[0].parent}."
        )
    return None


def check_resumable(path: Path, recipe: Recipe, facts: Mapping[str, Any]) -> Progress:
    """Return the progress of a checkpoint.

    Raises:
        RecipeError: the checkpoint belongs to another recipe, other data or another launch; the message lists what
            changed.
    """
    record = read_checkpoint(path)
    ours, theirs = _lasting(recipe), record["recipe"]
    different = [name for name in LASTING if ours[name] != theirs.get(name)]
    if different:
        changes = [change for name in different for change in _changes(name, theirs.get(name), ours[name])]
        raise RecipeError(
            f"{path} was made by a recipe with another {', '.join(different)}; cannot resume from it. Changed since: "
            f"{'; '.join(changes)}. Restore these values, or give another output; model.source={path.parents[1]}/model "
            "continues from trained weights once a run has ended."
        )
    changes = [change for key in facts for change in _changes(key, record["facts"].get(key), facts[key])]
    if changes:
        raise RecipeError(
            f"{path} cannot be resumed exactly, because something outside the recipe changed: {'; '.join(changes)}. "
            "Restore it, or start a new run with another output."
        )
    return Progress(**record["progress"])


def set_aside(folder: Path, checkpoint: Path) -> list[Path]:
    """Move the checkpoints that do not belong to a run resumed from `checkpoint`, and return their new paths."""
    own = checkpoint.resolve().parent == folder.resolve()
    moved = []
    for path in complete_checkpoints(folder):
        if own and step_of(path) <= step_of(checkpoint):
            continue
        target = folder / SUPERSEDED / path.name
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        moved.append(path.rename(target))
    return moved


def _changes(key: str, before: Any, after: Any) -> list[str]:
    """Return `key: before -> after` for each difference between two values, by dotted keys."""
    if before == after:
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = list(dict.fromkeys([*before, *after]))
        return [change for name in keys for change in _changes(f"{key}.{name}", before.get(name), after.get(name))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [change for index, (old, new) in pairs for change in _changes(f"{key}.{index}", old, new)]
    return [f"{key}: {_short(before)} -> {_short(after)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _lasting(recipe: Recipe) -> dict[str, Any]:
    whole: Any = OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True)
    del whole["data"]["workers"]  # changes the loading speed, not the data
    return json.loads(json.dumps({name: whole[name] for name in LASTING}))
