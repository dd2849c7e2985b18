"""Check a folder before anything is written to it, and put new content there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import OutputError

PathLike = str | os.PathLike[str]

HARMLESS = (".*", "*.log", "*.out", "*.err")
"""Files that a folder may hold beside anything else: hidden ones, and logs of the command itself."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json", "*.gguf")
"""Files of a model that its loaders find by their names."""
EXPORT_RECORD = "pe_patch_export.json"
"""File in which an export lists what it wrote, so that a later one knows what it may replace."""


@dataclass(frozen=True)
class Kind:
    """What one command writes into a folder, and how a folder of it is recognised."""

    name: str
    signs: tuple[str, ...] = ()
    """Files of which a folder of this kind has at least one. `name.json:key` is a JSON object with that key."""
    includes: frozenset[str] = field(default_factory=frozenset)
    """Names of kinds whose files a folder of this kind holds too."""

    def wrote(self, folder: Path) -> bool:
        """Return whether this command has written to the folder before."""
        return any(_has(folder, sign) for sign in self.signs)


EVALUATION = Kind("an evaluation", ("journal.jsonl", "results.jsonl"))
COMPARISON = Kind("a comparison", ("settings.json:contenders", "start/model.safetensors"), frozenset({EVALUATION.name}))
SEARCH = Kind("a search", ("settings.json:iterations", "search.jsonl", "best.json:long_factor"))
SWEEP = Kind("a sweep of conversions", ("sweep.jsonl",))
TRAINING = Kind("a training run", ("recipe.yaml", "log.jsonl", "checkpoints"))
DEMO = Kind(
    "a demonstration", ("yarn/recipe.yaml", "base/recipe.yaml", "config.json:factor"), frozenset({EVALUATION.name})
)
EXPORT = Kind("an export", (EXPORT_RECORD,))
MODEL = Kind("a converted model")
"""A conversion is written to a new or empty folder only."""

KINDS = (EVALUATION, COMPARISON, SEARCH, SWEEP, TRAINING, DEMO, EXPORT)


def check_output(folder: PathLike, kind: Kind, *, inputs: Iterable[Any] = (), overwrite: bool = False) -> Path:
    """Raise `OutputError` unless a command may write to a folder; nothing is created.

    The folder may be missing, empty, or one that the same command has written to before.

    Args:
        folder: where the command is to write.
        kind: what it writes.
        inputs: what it reads: paths, and names of models or data sets, of which only existing paths count. The folder
            may not be one of them, lie inside one, or contain one, whatever `overwrite` says.
        overwrite: also accept a folder that holds something else.

    Returns:
        The absolute path of the folder, links resolved.
    """
    path = Path(folder).expanduser()
    try:
        real = Path(os.path.realpath(path))
        os.lstat(real)
    except (FileNotFoundError, NotADirectoryError):  # the first is well, the second is explained below
        pass
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be a folder ({error}); give another one.") from error
    if real.exists() and not real.is_dir():
        raise OutputError(f"{path} is a file; give a folder.")
    if path.is_symlink() and not real.exists():
        raise OutputError(f"{path} is a link to {real}, which does not exist; give another folder, or create that one.")
    blocked = next((parent for parent in real.parents if parent.exists() and not parent.is_dir()), None)
    if blocked is not None:
        raise OutputError(f"{path} cannot be created: {blocked} is a file. Give another folder.")
    refuse_input(real, inputs, shown=path)
    if not overwrite and (found := foreign_content(real, kind)):
        raise OutputError(
            f"{path} is not an empty folder: it holds {found}, and {kind.name} would be written into it. Give another "
            "folder, or --overwrite (overwrite=True in Python) to write there; other files stay."
        )
    return real


def refuse_input(folder: PathLike, inputs: Iterable[Any], *, shown: PathLike | None = None, above: bool = True) -> None:
    """Raise `OutputError` where a folder to write is one of the inputs, lies inside one, or (`above`) contains one.

    Paths are compared as the file system does it: through links, relative parts and upper or lower case.
    """
    real = Path(os.path.realpath(Path(folder).expanduser()))
    shown = folder if shown is None else shown
    for given in inputs:
        source = existing(given)
        if source is None:
            continue
        relation = (
            "is" if _same(real, source)
            else "lies inside" if source.is_dir() and any(_same(parent, source) for parent in real.parents)
            else "contains" if above and any(_same(parent, real) for parent in source.parents)
            else None
        )  # fmt: skip
        if relation is not None:
            raise OutputError(
                f"{shown} {relation} {given}, which is read here. An input is never written to: give another folder."
            )


def existing(given: Any) -> Path | None:
    """Return the real path of an input, or None for a name on the hub or what is no path at all."""
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        return None
    path = Path(os.fspath(given)).expanduser()
    try:
        return Path(os.path.realpath(path)) if path.exists() else None
    except OSError:  # too long, or with characters that no file name has
        return None


def foreign_content(folder: Path, kind: Kind) -> str:
    """Name what a folder holds that a command of this kind has not written; an empty string if there is nothing."""
    if not folder.is_dir():
        return ""
    names = sorted(name for name in os.listdir(folder) if not _matches(name, HARMLESS) and not _empty(folder / name))
    if not names:
        return ""
    if not kind.wrote(folder):
        other = next((one.name for one in KINDS if one.wrote(folder)), None)
        return other or _few(names)
    if kind is EXPORT:
        return _few([name for name in names if name not in {EXPORT_RECORD, *exported_files(folder)}])
    others = [one for one in KINDS if one is not kind and one.name not in kind.includes and one.wrote(folder)]
    if others:
        return others[0].name
    models = [name for name in names if _matches(name, WEIGHTS)]
    if _has(folder, "config.json:model_type") or _has(folder, "config.json:architectures"):
        models.insert(0, "config.json of a model")
    return _few(models)


def exported_files(folder: Path) -> list[str]:
    """Return the names of the files that an earlier export wrote to a folder, as its record lists them."""
    listed = _json(folder / EXPORT_RECORD).get("files", [])
    return [name for name in listed if isinstance(name, str) and name == os.path.basename(name)]


@contextmanager
def replaced_content(folder: PathLike, *, stale: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder to write to; when the block ends, its files take their place in `folder`.

    If the block or the move fails or is interrupted, `folder` is as it was before, and nothing new is left beside it.
    Files of the same name are replaced, as are those in `folder` that match one of the patterns in `stale`. Others
    stay. `config.json` is moved last, so that no half of a model can be loaded.
    """
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    missing = [parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder if folder.is_dir() and _only_inside(folder) else folder.parent
    temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{folder.name}-"))
    try:
        content = temporary / "new"
        content.mkdir()
        yield content
        if folder.exists():
            _move(content, folder, temporary / "old", stale)
        else:
            os.replace(content, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def _only_inside(folder: Path) -> bool:
    """Return whether new files cannot be prepared beside an existing folder: another disk, or no right to write."""
    return folder.stat().st_dev != folder.parent.stat().st_dev or not os.access(folder.parent, os.W_OK)


def _move(content: Path, folder: Path, old: Path, stale: Collection[str]) -> None:
    """Move every entry of `content` into `folder`; on any failure put back what was there."""
    old.mkdir()
    new = sorted(os.listdir(content), key=lambda name: (name == "config.json", name))
    away = [name for name in os.listdir(folder) if name in new or _matches(name, stale)]
    try:
        for name in away:
            os.replace(folder / name, old / name)
        for name in new:
            os.replace(content / name, folder / name)
    except BaseException:
        for name in new:
            if not os.path.lexists(content / name) and os.path.lexists(folder / name):
                os.replace(folder / name, content / name)
        for name in away:
            if os.path.lexists(old / name):
                os.replace(old / name, folder / name)
        raise


def _empty(file: Path) -> bool:
    """Return whether this is a file without content, such as one that a shell has just opened for what is printed."""
    return file.is_file() and not file.is_symlink() and file.stat().st_size == 0


def _same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and os.path.samefile(one, other))


def _has(folder: Path, sign: str) -> bool:
    name, _, key = sign.partition(":")
    return key in _json(folder / name) if key else (folder / name).exists()


def _json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
