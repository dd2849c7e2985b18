"""What is the same for all contenders, and where on disk everything stands."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.folders import COMPARISON, check_output
from ..data.packaged import __version__
from ..errors import PePatchError
from ..evaluation.results import write_atomically
from ..evaluation.run import DEPTHS
from .contender import TUNED, Contender

Task = Any
"""A name from `pe_patch.evaluation.tasks`, or an instance."""


@dataclass(frozen=True)
class Training:
    """The same training for every contender: a recipe of `recipes/`, whose model and scheme are put in."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    """`key=value` words, as the training script takes them."""
    from_scratch: bool = False
    """The model has fresh weights: there is nothing to measure before it is trained."""


@dataclass(frozen=True)
class Settings:
    """One comparison. Nothing here may differ between the contenders, or between the parts of one folder."""

    model: str
    """A folder, or a name on the hub."""
    contenders: tuple[Contender, ...]
    """The model as it is comes first."""
    lengths: tuple[int, ...]
    tasks: tuple[Task, ...] = ("perplexity", "needle")
    samples: int = 50
    depths: tuple[float, ...] = DEPTHS
    text: str = "stdlib"
    seed: int = 0
    training: Training | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int | None = None
    rounds: int = 5
    """How often each contender is timed."""
    window: int = 0
    """Tokens that the model was trained at; what is measured there is the short-context cost."""

    @property
    def stages(self) -> tuple[str, ...]:
        """What is measured of each contender: `before` training, `after` it, or both."""
        if self.training is None:
            return ("before",)
        return ("after",) if self.training.from_scratch else ("before", "after")

    def label(self, contender: Contender, stage: str) -> str:
        """What a contender is called in the rows of one stage."""
        return contender.label + (TUNED if stage == "after" and "before" in self.stages else "")

    @property
    def short(self) -> int:
        """The length at which short-context cost is read: the window, or the shortest that is measured."""
        return self.window if self.window in self.lengths else self.lengths[0]

    def record(self) -> dict[str, Any]:
        """Everything that the numbers depend on (JSON-able)."""
        found = asdict(replace(self, tasks=(), training=None))
        found |= {"tasks": [repr(task) for task in self.tasks], "version": __version__}
        if self.training is not None:
            recipe = asdict(load_recipe(self.training))
            found["training"] = {"recipe": recipe, "from_scratch": self.training.from_scratch}
        return json.loads(json.dumps(found, default=str))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that a scheme must be trained: whether it must is what is found out here."""
    logger = logging.getLogger("pe_patch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_recipe(training: Training) -> Any:
    """The recipe as it stands in its file, with its overrides."""
    from ..training.reading import load_recipe

    return load_recipe(training.recipe, training.overrides)


@dataclass(frozen=True)
class Folder:
    """Where a comparison stands on disk. What is finished stays; the next run with the same settings goes on."""

    root: Path

    def of(self, contender: Contender) -> Path:
        return self.root / "contenders" / contender.folder

    def claim(self, settings: Settings, *, overwrite: bool = False) -> None:
        """Make the folder this comparison's; one that holds another raises `PePatchError` and is left as it is.

        One that holds anything else raises `OutputError` unless `overwrite=True`.
        """
        own = Path(settings.model) == self.root.resolve() / "start"  # a preset's model, made here
        inputs = [None if own else settings.model, settings.text]
        check_output(self.root, COMPARISON, inputs=inputs, overwrite=overwrite)
        file, ours = self.root / "settings.json", settings.record()
        if not file.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(file, ours)
            return
        theirs = read_json(file)
        if different := differences(ours, theirs):
            raise PePatchError(
                f"{self.root} holds a comparison with another {', '.join(different)}. Numbers of two comparisons are "
                "not mixed: give a new folder, or the settings of that one (settings.json) to go on with it."
            )

    def failures(self, everyone: Sequence[Contender]) -> dict[str, str]:
        """What went wrong in the last run, by label; it is tried again in the next."""
        files = {one.label: self.of(one) / "failed.json" for one in everyone}
        return {label: read_json(file)["reason"] for label, file in files.items() if file.exists()}

    def unsupported(self, everyone: Sequence[Contender]) -> dict[str, str]:
        """Why a scheme cannot work on this model, by label."""
        files = {one.label: self.of(one) / "unsupported.json" for one in everyone}
        return {label: read_json(file)["reason"] for label, file in files.items() if file.exists()}


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """The dotted names of what differs between two JSON values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        return [
            found
            for key in keys
            for found in differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if ours == theirs else [name]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PePatchError(f"{path} cannot be read: {error}. Remove it to have that part done again.") from error
