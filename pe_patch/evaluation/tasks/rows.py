"""Rows of a benchmark's data set, from a folder with its own files or from the Hugging Face hub."""

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
class Home:
    """Where a benchmark keeps its rows.

    `files` are looked for in a folder, in this order, and the last of them on the hub; `{name}` stands for the data set
    and `a.zip!b` is the file b in the archive a. With `by_config` a data set is a configuration of the repository.
    """

    hub: str
    files: tuple[str, ...]
    by_config: bool = False


def load_rows(home: Home, name: str, source: str | None, split: str | None, columns: Sequence[str]) -> list[Row]:
    """The rows of the data set `name`, in their own order.

    `source` is a folder, a .jsonl, .json or .zip file, or a repository of the hub (default: the benchmark's own). A
    `split` has `datasets` read the source, whatever its layout. A source that is not there, or whose rows lack one of
    the `columns`, raises `PePatchError`.
    """
    where = source or home.hub
    if split is not None:
        rows = _by_datasets(home, name, where, split)
    else:
        path, member = _file(home, name, where)
        rows = _read(path, member, path.stat().st_mtime_ns)
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        raise PePatchError(
            f"The rows of {name!r} in {where} have no {', '.join(missing)}; they have {', '.join(rows[0])}. "
            f"They should be those of {home.hub}."
        )
    return rows


def fingerprint(rows: Iterable[Row]) -> str:
    """Twelve hexadecimal digits that change with the rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:12]


def _file(home: Home, name: str, where: str) -> tuple[Path, str]:
    """The file with the rows and, where it is an archive, its member."""
    wanted = [tuple(file.format(name=name).partition("!")[::2]) for file in home.files]
    path = Path(where).expanduser()
    if path.is_file():
        return path, next((member for _, member in wanted if member), "") if path.suffix == ".zip" else ""
    if path.is_dir():
        found = next(((path / file, member) for file, member in wanted if (path / file).is_file()), None)
        if found is None:
            names = " or ".join(file for file, _ in wanted)
            raise PePatchError(f"The folder {path.absolute()} has no {names}, where the rows of {name!r} would be.")
        return found
    return _from_hub(where, *wanted[-1])


def _from_hub(where: str, file: str, member: str) -> tuple[Path, str]:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(where, file, repo_type="dataset")), member
    except Exception as error:  # the hub client raises many kinds: offline, no such name, no such file
        raise PePatchError(
            f"There is no folder {Path(where).absolute()}, and {file!r} of the data set {where!r} could not be had "
            f"from the hub ({type(error).__name__}: {error}). Give source= a folder with the benchmark's own files, or "
            "split= to have `datasets` read a repository with another layout."
        ) from error


def _by_datasets(home: Home, name: str, where: str, split: str) -> list[Row]:
    import datasets

    try:
        rows = list(datasets.load_dataset(where, name if home.by_config else None, split=split))
    except Exception as error:  # as above
        raise PePatchError(
            f"`datasets` could not read the split {split!r} of {name!r} in {where} ({type(error).__name__}: {error})."
        ) from error
    return _some(rows, f"The split {split!r} of {where}")


@lru_cache(maxsize=2)
def _read(path: Path, member: str, modified: int) -> list[Row]:
    """Rows of a list or of lines of JSON; `modified` is in the cache's key, so that a changed file is read again."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                text = archive.read(member).decode("utf-8")
        else:
            text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise PePatchError(f"{path}{f', file {member}' if member else ''} cannot be read: {error}") from error
    return _some(rows, str(path))


def _lines(text: str) -> list[Row]:
    # Not splitlines(): JSON may hold other line separators, as U+2028, within its strings.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _some(rows: list[Any], where: str) -> list[Row]:
    if not rows:
        raise PePatchError(f"{where} has no rows.")
    return rows
