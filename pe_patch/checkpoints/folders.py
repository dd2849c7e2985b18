"""Check a folder before writing to it, and replace its content atomically."""

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

from filelock import FileLock, Timeout

from ..errors import OutputError

PathLike = str | os.PathLike[str]

HARMLESS = (".*", "*.log", "*.out", "*.err")
"""Files that do not count as content: hidden files and logs of the command."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json", "*.gguf")
"""Model files that loaders find by name."""
WRITING = ".writing"
"""File in the temporary folder of `replaced_content`, locked by the process that writes there."""
EXPORT_RECORD = "pe_patch_export.json"
"""File in which an export lists its files, so that a later export knows what it may replace."""


@dataclass(frozen=True)
class FolderKind:
    """Kind of output folder: its name in messages, and the files that identify it."""

    name: str
    signs: tuple[str, ...] = ()
    """Files of which a folder of this kind has at least one. `name.json:key` is a JSON object with this key."""
    includes: frozenset[str] = field(default_factory=frozenset)
    """Names of kinds whose files a folder of this kind may also hold."""

    def wrote(self, folder: Path) -> bool:
        """Return whether this command wrote to the folder before."""
        return any(_has(folder, sign) for sign in self.signs)


EVALUATION = FolderKind("an evaluation", ("journal.jsonl", "results.jsonl"))
COMPARISON = FolderKind(
    "a comparison", ("settings.json:contenders", "start/model.safetensors"), frozenset({EVALUATION.name})
)
SEARCH = FolderKind("a search", ("settings.json:iterations", "search.jsonl", "best.json:long_factor"))
SWEEP = FolderKind("a sweep of conversions", ("sweep.jsonl",))
TRAINING = FolderKind("a training run", ("recipe.yaml", "log.jsonl", "checkpoints"))
DEMO = FolderKind(
    "a demonstration", ("yarn/recipe.yaml", "base/recipe.yaml", "config.json:factor"), frozenset({EVALUATION.name})
)
EXPORT = FolderKind("an export", (EXPORT_RECORD,))
EXTENSION = FolderKind("an extension", ("extension.json",), frozenset({EVALUATION.name, TRAINING.name}))
MODEL = FolderKind("a converted model")
"""A conversion writes only to a new or empty folder."""

KINDS = (EVALUATION, COMPARISON, SEARCH, SWEEP, TRAINING, DEMO, EXPORT, EXTENSION)


def check_output(folder: PathLike, kind: FolderKind, *, inputs: Iterable[Any] = (), overwrite: bool = False) -> Path:
    """Raise `OutputError` unless a command may write to a folder. Creates nothing.

    The folder may be missing, empty, or one that the same command wrote to before.

    Args:
        folder: the output folder.
        kind: what the command writes.
        inputs: paths and hub names that the command reads; only existing paths count. The folder must not be an input,
            lie inside one or contain one, whatever `overwrite` says.
        overwrite: also accept a folder with other content.

    Returns:
        The absolute path of the folder, with links resolved.

    Raises:
        OutputError: the command may not write to the folder.
    """
    path = Path(folder).expanduser()
    try:
        real = Path(os.path.realpath(path))
        os.lstat(real)
    except (FileNotFoundError, NotADirectoryError):  # the first is fine; the second is reported below
        pass
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be a folder ({error}); give another one.") from error
    if real.exists() and not real.is_dir():
        raise OutputError(f"{path} is a file; give a folder.")
    if path.is_symlink() and not real.exists():
        raise OutputError(
            f"{path} is a link to {real}, which does not exist; give another folder, or create the target."
        )
    blocked = next((parent for parent in real.parents if parent.exists() and not parent.is_dir()), None)
    if blocked is not None:
        raise OutputError(f"{path} cannot be created: {blocked} is a file. Give another folder.")
    refuse_input(real, inputs, shown=path)
    if not overwrite and (content := foreign_content(real, kind)):
        raise OutputError(
            f"{path} is not an empty folder: it holds {content}, and {kind.name} would be written into it. Give "
            "another folder, or --overwrite (overwrite=True in Python) to write there; other files stay."
        )
    return real


def refuse_input(folder: PathLike, inputs: Iterable[Any], *, shown: PathLike | None = None, above: bool = True) -> None:
    """Raise `OutputError` if an output folder is an input, lies inside one, or (with `above`) contains one.

    Paths are compared as the file system does: through links, relative parts and letter case.

    Args:
        folder: the output folder.
        inputs: paths and hub names; only existing paths count.
        shown: the path to show in the message; None shows `folder`.
        above: also refuse a folder that contains an input.
    """
    real = Path(os.path.realpath(Path(folder).expanduser()))
    for name in _with_bases(inputs):
        source = existing_path(name)
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
                f"{folder if shown is None else shown} {relation} {name}, which is an input. Inputs are never "
                "overwritten; give another folder."
            )


def _with_bases(inputs: Iterable[Any]) -> list[Any]:
    """Return the inputs, and the base models of those that are adapters."""
    everything = list(inputs)
    for name in everything:  # it grows: a base may be an adapter, too
        source = existing_path(name)
        base = None if source is None else _json(source / "adapter_config.json").get("base_model_name_or_path")
        if base is not None and base not in everything:
            everything.append(base)
    return everything


def existing_path(name: Any) -> Path | None:
    """Return the real path of an input, or None for a hub name or anything else that is not an existing path."""
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        return None
    path = Path(os.fspath(name)).expanduser()
    try:
        return Path(os.path.realpath(path)) if path.exists() else None
    except OSError:  # too long, or with characters that file names cannot have
        return None


def foreign_content(folder: Path, kind: FolderKind) -> str:
    """Describe the content of a folder that this kind of command did not write, or return an empty string."""
    if not folder.is_dir():
        return ""
    names = sorted(name for name in os.listdir(folder) if not _matches(name, HARMLESS) and not _empty(folder / name))
    if not names:
        return ""
    if not kind.wrote(folder):
        other = next((known.name for known in KINDS if known.wrote(folder)), None)
        return other or _few(names)
    if kind is EXPORT:
        return _few([name for name in names if name not in {EXPORT_RECORD, *exported_files(folder)}])
    others = [known for known in KINDS if known is not kind and known.name not in kind.includes and known.wrote(folder)]
    if others:
        return others[0].name
    models = [name for name in names if _matches(name, WEIGHTS)]
    if _has(folder, "config.json:model_type") or _has(folder, "config.json:architectures"):
        models.insert(0, "config.json of a model")
    return _few(models)


def exported_files(folder: Path) -> list[str]:
    """Return the names of the files that an earlier export wrote, from its record."""
    listed = _json(folder / EXPORT_RECORD).get("files", [])
    return [name for name in listed if isinstance(name, str) and name == os.path.basename(name)]


@contextmanager
def sole_writer(folder: PathLike | None) -> Iterator[None]:
    """Keep other runs out of an output folder, which is created if needed. None locks nothing.

    Raises:
        OutputError: another run is writing to the folder.
    """
    if folder is None:
        yield
        return
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"Another run is writing to {path}. Give another folder, or wait and give the same command again."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replaced_content(folder: PathLike, *, stale: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder to write to, and move its files into `folder` at the end of the block.

    If the block or the move fails or is interrupted, `folder` is unchanged, and no new files stay beside it. New files
    replace files with the same name and files that match a pattern in `stale`. Other files stay. `config.json` moves
    last, so that an incomplete model cannot be loaded. What a killed process left beside `folder` is deleted first.

    Args:
        folder: the output folder.
        stale: name patterns of files to remove.
    """
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    missing = [parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    parent_folder = folder if folder.is_dir() and _only_inside(folder) else folder.parent
    prefix = f".{folder.name}-"
    _delete_abandoned(parent_folder, prefix)
    temporary = Path(tempfile.mkdtemp(dir=parent_folder, prefix=prefix))
    try:
        with FileLock(temporary / WRITING):
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


def _delete_abandoned(parent: Path, prefix: str) -> None:
    """Delete temporary folders whose process is gone. If it was killed while moving files, the old ones stay."""
    for file in parent.glob(f"{prefix}*/{WRITING}"):
        if any((file.parent / "old").glob("*")):
            continue
        try:
            with FileLock(file, timeout=0):
                pass
        except Timeout:  # another process is writing there
            continue
        shutil.rmtree(file.parent)


def _only_inside(folder: Path) -> bool:
    """Return whether new files must be prepared inside the folder: it is a mount point, or its parent is read-only."""
    return folder.stat().st_dev != folder.parent.stat().st_dev or not os.access(folder.parent, os.W_OK)


def _move(content: Path, folder: Path, old: Path, stale: Collection[str]) -> None:
    """Move all entries of `content` into `folder`; on failure restore the previous content."""
    old.mkdir()
    new = sorted(os.listdir(content), key=lambda name: (name == "config.json", name))
    replaced = [name for name in os.listdir(folder) if name in new or _matches(name, stale)]
    try:
        for name in replaced:
            os.replace(folder / name, old / name)
        for name in new:
            os.replace(content / name, folder / name)
    except BaseException:
        for name in new:
            if not os.path.lexists(content / name) and os.path.lexists(folder / name):
                os.replace(folder / name, content / name)
        for name in replaced:
            if os.path.lexists(old / name):
                os.replace(old / name, folder / name)
        raise


def _empty(file: Path) -> bool:
    """Return whether this is an empty file, such as one that a shell has just opened for redirected output."""
    return file.is_file() and not file.is_symlink() and file.stat().st_size == 0


def _same(path: Path, other: Path) -> bool:
    return path == other or (path.exists() and other.exists() and os.path.samefile(path, other))


def _has(folder: Path, sign: str) -> bool:
    name, _, key = sign.partition(":")
    return key in _json(folder / name) if key else (folder / name).exists()


def _json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty dict."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _few(names: list[str]) -> str:
    """List up to three names and count the others."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
