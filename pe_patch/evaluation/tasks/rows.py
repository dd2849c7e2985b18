"""Load the rows of a benchmark's data set from a folder, a file or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import PePatchError

Row = dict[str, Any]


@dataclass(frozen=True)
class DataFiles:
    """The repository and the file names of a benchmark's data sets."""

    hub: str
    """The repository on the hub."""
    files: tuple[str, ...]
    """The names to look for in a folder, in this order; the last one is downloaded from the hub. `{name}` is the data
    set, and `a.zip!b` is the file b in the archive a."""
    by_config: bool = False
    """True if each data set is a configuration of the repository."""


def load_rows(files: DataFiles, name: str, source: str | None, split: str | None, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a data set in their order.

    Args:
        files: the repository and file names of the benchmark.
        name: the data set.
        source: a folder, a .jsonl, .json or .zip file, or a hub repository; None takes the benchmark's repository.
        split: the split to read with `datasets`, which supports any layout; None reads the benchmark's files.
        columns: the columns that the rows must have.

    Raises:
        PePatchError: if the source does not exist, or its rows lack one of the columns.
    """
    where = source or files.hub
    if split is not None:
        rows = _by_datasets(files, name, where, split)
    else:
        path, member = _find_file(files, name, where)
        rows = _read(path, member, path.stat().st_mtime_ns)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise PePatchError(f"Row {number} of {name!r} in {where} is not an object with columns: {str(row)[:60]!r}.")
        if missing := [column for column in columns if column not in row]:
            raise PePatchError(
                f"Row {number} of {name!r} in {where} has no {', '.join(missing)}; it has {', '.join(row)}. "
                f"Give the rows of {files.hub}."
            )
    return rows


def fingerprint(rows: Iterable[Row]) -> str:
    """Return twelve hexadecimal digits that identify the rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:12]


def _find_file(files: DataFiles, name: str, where: str) -> tuple[Path, str]:
    """Return the file with the rows and its member if it is an archive, else an empty string."""
    candidates = [tuple(file.format(name=name).partition("!")[::2]) for file in files.files]
    path = Path(where).expanduser()
    if path.is_file():
        return path, next((member for _, member in candidates if member), "") if path.suffix == ".zip" else ""
    if path.is_dir():
        existing = next(((path / file, member) for file, member in candidates if (path / file).is_file()), None)
        if existing is None:
            names = " or ".join(file for file, _ in candidates)
            raise PePatchError(f"The folder {path.absolute()} has no {names} with the rows of {name!r}.")
        return existing
    return _from_hub(where, *candidates[-1])


def _from_hub(where: str, file: str, member: str) -> tuple[Path, str]:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(where, file, repo_type="dataset")), member
    except Exception as error:  # the hub client raises many types: offline, no such name, no such file
        raise PePatchError(
            f"There is no folder {Path(where).absolute()}, and {file!r} of the data set {where!r} cannot be downloaded "
            f"from the hub ({type(error).__name__}: {error}). Give source= a folder with the benchmark's files, or "
            "split= to read a repository with another layout by `datasets`."
        ) from error


def _by_datasets(files: DataFiles, name: str, where: str, split: str) -> list[Row]:
    import datasets

    try:
        rows = list(datasets.load_dataset(where, name if files.by_config else None, split=split))
    except Exception as error:  # `datasets` raises many types too
        raise PePatchError(
            f"`datasets` cannot read the split {split!r} of {name!r} in {where} ({type(error).__name__}: {error})."
        ) from error
    return _require_rows(rows, f"The split {split!r} of {where}")


@lru_cache(maxsize=2)
def _read(path: Path, member: str, modified: int) -> list[Row]:
    """Read the rows of a JSON list or of JSON lines; `modified` makes the cache read a changed file again."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                text = archive.read(member).decode("utf-8")
        else:
            text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise PePatchError(f"{path}{f', file {member}' if member else ''} cannot be read: {error}") from error
    return _require_rows(rows, str(path))


def _lines(text: str) -> list[Row]:
    # Not splitlines(): JSON strings may contain other line separators such as U+2028.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _require_rows(rows: list[Any], where: str) -> list[Row]:
    if not rows:
        raise PePatchError(f"{where} has no rows.")
    return rows
