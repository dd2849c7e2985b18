"""Hold the settings that all compared schemes share, and the files of a comparison."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import compat
from ..checkpoints import sources
from ..checkpoints.folders import COMPARISON, check_output
from ..data.packaged import __version__
from ..errors import PePatchError, finite
from ..evaluation.results import write_atomically
from ..evaluation.run import DEPTHS
from .compared_scheme import TUNED, ComparedScheme

Task = Any
"""A name from `pe_patch.evaluation.tasks`, or an instance."""


@dataclass(frozen=True)
class Training:
    """The training of every scheme: a recipe in which the model and the scheme are replaced."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    """`key=value` words, as for `pe-patch train`."""
    from_scratch: bool = False
    """True if the model has fresh weights, so that there is nothing to measure before training."""


@dataclass(frozen=True)
class Settings:
    """The settings of one comparison, equal for all schemes and for all runs in one folder."""

    model: str
    """A local folder, a GGUF file or a hub name."""
    contenders: tuple[ComparedScheme, ...]
    """The compared schemes, with the unpatched model first."""
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
    """Number of timing rounds for each scheme."""
    window: int = 0
    """The trained window in tokens, at which the short-context cost is measured."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages to measure: `before` training, `after` it, or both."""
        if self.training is None:
            return ("before",)
        return ("after",) if self.training.from_scratch else ("before", "after")

    def label(self, compared: ComparedScheme, stage: str) -> str:
        """Return the label of a scheme in the rows of one stage."""
        return compared.label + (TUNED if stage == "after" and "before" in self.stages else "")

    @property
    def short(self) -> int:
        """The length in tokens for the short-context cost: the window, or the shortest measured length."""
        return self.window if self.window in self.lengths else self.lengths[0]

    def record(self) -> dict[str, Any]:
        """Return everything that the numbers depend on, as a dict for JSON."""
        content = asdict(replace(self, tasks=(), training=None))
        content |= {"tasks": [repr(task) for task in self.tasks], "version": __version__}
        if self.training is not None:
            recipe = asdict(load_recipe(self.training))
            content["training"] = {"recipe": recipe, "from_scratch": self.training.from_scratch}
        return json.loads(json.dumps(content, default=str))


def load_recipe(training: Training) -> Any:
    """Load the recipe with its overrides."""
    from ..training.run import load_recipe

    return load_recipe(training.recipe, training.overrides)


@dataclass(frozen=True)
class Folder:
    """The files of a comparison. Finished results stay, and the next run with equal settings continues."""

    root: Path

    def of(self, compared: ComparedScheme) -> Path:
        """Return the folder of one scheme."""
        return self.root / "contenders" / compared.folder

    def claim(self, settings: Settings, *, overwrite: bool = False) -> None:
        """Reserve the folder for this comparison.

        Raises:
            PePatchError: the folder holds a comparison with other settings. It is left unchanged.
            OutputError: the folder has other content and `overwrite` is False.
        """
        is_preset = Path(settings.model) == self.root.resolve() / "start"  # a model that the preset built here
        inputs = [None if is_preset else settings.model, settings.text]
        check_output(self.root, COMPARISON, inputs=inputs, overwrite=overwrite)
        file, ours = self.root / "settings.json", settings.record() | fingerprints(settings)
        if not file.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(file, ours)
            return
        theirs = read_json(file)
        if different := differences(ours, theirs):
            raise PePatchError(
                f"{self.root} holds a comparison with another {', '.join(different)}. A folder holds one "
                "comparison: give a new folder, or use that comparison's settings (settings.json) to continue it. "
                "model_files and text_files change when files at the same path change."
            )

    def failures(self, everyone: Sequence[ComparedScheme]) -> dict[str, str]:
        """Return the errors of the last run by label. The next run tries again."""
        files = {entry.label: self.of(entry) / "failed.json" for entry in everyone}
        return {label: read_json(file)["reason"] for label, file in files.items() if file.exists()}

    def unsupported(self, everyone: Sequence[ComparedScheme]) -> dict[str, str]:
        """Return the reasons why schemes cannot work on this model, by label."""
        files = {entry.label: self.of(entry) / "unsupported.json" for entry in everyone}
        return {label: read_json(file)["reason"] for label, file in files.items() if file.exists()}


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Return the dotted names of the differences between two JSON values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        return [
            different
            for key in keys
            for different in differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if ours == theirs else [name]


MODEL_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")
"""Files of a model's folder that its results depend on."""


def fingerprints(settings: Settings) -> dict[str, str]:
    """Return hashes of the model's and the text's files, so that results of changed files are not mixed.

    A hub name has its commit in place of a hash; of a hub data set nothing is known. The standard library changes with
    Python's version.
    """
    found = {}
    if (path := Path(settings.model)).exists():
        files = [path] if path.is_file() else [file for pattern in MODEL_FILES for file in path.glob(pattern)]
        found["model_files"] = _hash_files(files)
    else:
        found["model_files"] = str(compat.commit_hash(sources.empty_model(settings.model).config))
    text = Path(settings.text).expanduser()
    if settings.text == "stdlib":
        found["text_files"] = f"Python {platform.python_version()}"
    elif text.exists():
        found["text_files"] = _hash_files([text] if text.is_file() else text.rglob("*"))
    return found


def _hash_files(files: Iterable[Path]) -> str:
    """Return sixteen hexadecimal digits that identify the names and the contents of files."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(file for file in set(files) if file.is_file()):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as content:
            while block := content.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, with its folder. NaN and infinity, which JSON does not have, become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        PePatchError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PePatchError(f"Cannot read {path}: {error}. Delete it to repeat that part.") from error
