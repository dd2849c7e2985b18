"""Read documents from Python's standard library, a folder, a file, or a Hugging Face hub data set."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..errors import PePatchError

Split = Literal["train", "test"]
Record = tuple[str, str]
"""A name that is equal on all machines, and the text."""

TEST_PERCENT = 10
"""Share of the documents in the test split, in percent."""
STDLIB_SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
STDLIB_SKIPPED |= {"site-packages", "dist-packages", "ensurepip", "__pycache__", "_distutils_hack"}
STDLIB_CHARACTERS = (2_000, 400_000)
"""Minimum and maximum length of the standard library's files, in characters."""
ALLOWED = "'stdlib', a folder, a .txt, .md, .py, .jsonl, .json, .parquet or .csv file, or the name of a hub data set"


class TextSourceError(PePatchError, FileNotFoundError):
    """Raised if the source cannot be read as text."""


def load_documents(
    source: str | Path, *, split: Split | None = None, text_column: str = "text", limit: int | None = None
) -> list[str]:
    """Return the documents of a source, in an order that is equal on all machines.

    Args:
        source: `stdlib`, a folder, a file or the name of a hub data set.
        split: "test" is about a tenth of the documents, chosen by a hash of their names, and "train" is the rest. A
            single document is cut at nine tenths instead. A hub data set uses its splits if it has them. None reads
            everything.
        text_column: the text column of a table.
        limit: maximum number of documents; None reads all.

    Raises:
        TextSourceError: the source does not exist or has no text.
    """
    return list(iter_documents(source, split=split, text_column=text_column, limit=limit))


def iter_documents(
    source: str | Path,
    *,
    split: Split | None = None,
    text_column: str = "text",
    limit: int | None = None,
    streaming: bool = False,
) -> Iterator[str]:
    """Yield the documents of `load_documents` one by one, reading each on demand.

    At most one document and one batch of Parquet rows are in memory (a .json file is read whole). An unreadable
    document raises when it is reached.

    Args:
        source: see `load_documents`, also for `split`, `text_column` and `limit`.
        streaming: stream a hub data set over the network instead of downloading it. A `limit` always streams.

    Raises:
        TextSourceError: the source does not exist or has no text.
    """
    _check(split, limit)
    records = _records(str(source), split, text_column, streaming or limit is not None)
    return _some(islice(records, limit), source, split)


def fingerprint(
    source: str | Path, *, split: Split | None = None, text_column: str = "text", limit: int | None = None
) -> str:
    """Hash what `iter_documents` would yield with these arguments, without decoding the text.

    The hash covers the names and bytes of the files, or the name and revision of a hub data set.
    """
    _check(split, limit)
    files = _files(str(source))
    parts = [repr((split, text_column, limit))]
    if files is None:
        parts.append(f"{source}@{_revision(str(source))}")
    else:
        parts += [f"{name}\0{_digest(path)}" for name, path in files]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _check(split: Any, limit: int | None) -> None:
    if split not in (None, "train", "test"):
        raise PePatchError(f"split must be 'train', 'test' or None, got {split!r}.")
    if limit is not None and limit < 1:
        raise PePatchError(f"limit must be at least 1 document, got {limit}.")


def _some(records: Iterator[Record], source: str | Path, split: Split | None) -> Iterator[str]:
    """Yield the texts of the records, and raise `TextSourceError` if there are none."""
    for _, text in records:
        yield text
        break
    else:
        raise TextSourceError(f"{source!s} has no text (split {split!r}). Give {ALLOWED}.")
    for _, text in records:
        yield text


def _records(source: str, split: Split | None, text_column: str, streaming: bool) -> Iterator[Record]:
    if source == "stdlib":
        return _split(stdlib_files(), split)
    files = _files(source)
    if files is None:
        return _from_hub(source, split, text_column, streaming=streaming)
    return _split((record for name, path in files for record in _file(path, name, text_column)), split)


def _files(source: str) -> Iterator[tuple[str, Path]] | None:
    """Yield the names and paths of a source's files in order; return None if it can only be a hub data set."""
    path = Path(source).expanduser()
    if source == "stdlib":
        return _stdlib_paths()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return iter([(path.name, path)])
    if path.suffix in READERS or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source):
        raise TextSourceError(f"There is no file or folder {path.absolute()}. Give {ALLOWED}.")
    return None


def _digest(path: Path) -> str:
    """Return the hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _split(records: Iterable[Record], split: Split | None) -> Iterator[Record]:
    """Yield the records of a split."""
    if split is None:
        yield from records
        return
    records = iter(records)
    first = list(islice(records, 2))
    if len(first) == 1:
        name, text = first[0]
        cut = len(text) * (100 - TEST_PERCENT) // 100
        yield name, text[cut:] if split == "test" else text[:cut]
        return
    for name, text in (*first, *records):
        held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < TEST_PERCENT
        if held_out == (split == "test"):
            yield name, text


def stdlib_files() -> Iterator[Record]:
    """Yield the standard library's source files of moderate length."""
    shortest, longest = STDLIB_CHARACTERS
    for name, path in _stdlib_paths():
        text = _decode(path)
        if text is not None and shortest <= len(text) <= longest:
            yield name, text


def _stdlib_paths() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if STDLIB_SKIPPED.isdisjoint(name.parts):
            yield name.as_posix(), path


def _decode(path: Path) -> str | None:
    """Return the text of a file, or None if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _folder(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(component.startswith(".") for component in name.parts)
        if path.is_file() and path.suffix in READERS and not hidden:
            yield name.as_posix(), path


def _file(path: Path, name: str, text_column: str) -> Iterator[Record]:
    if path.suffix not in READERS:
        raise TextSourceError(f"{path} is not a supported text file. Give {ALLOWED}.")
    for row, value in enumerate(READERS[path.suffix](path, text_column)):
        yield f"{name}:{row}" if row else name, value


def _plain(path: Path, text_column: str) -> Iterator[str]:
    text = _decode(path)
    if text:
        yield text


def _json_lines(path: Path, text_column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _column(_parse(line, f"{path}, line {number}"), text_column, f"{path}, line {number}")


def _json(path: Path, text_column: str) -> Iterator[str]:
    """Yield the texts of a list of rows or strings, or of one row, whose column may be a list."""
    value = _parse(path.read_text(encoding="utf-8"), str(path))
    if isinstance(value, dict):
        value = value.get(text_column, value)
    for row in value if isinstance(value, list) else [value]:
        yield _column(row, text_column, str(path))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TextSourceError(f"{where}: not JSON ({error}).") from error


def _csv(path: Path, text_column: str) -> Iterator[str]:
    csv.field_size_limit(1 << 30)  # the default limit is 128 kB
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            yield _column(row, text_column, str(path))


def _parquet(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path)
    if text_column not in table.schema_arrow.names:
        _column(dict.fromkeys(table.schema_arrow.names), text_column, str(path))
    for batch in table.iter_batches(columns=[text_column]):
        yield from batch.column(0).to_pylist()


def _column(row: Any, text_column: str, where: str) -> str:
    value = row.get(text_column) if isinstance(row, dict) else row
    if isinstance(value, str):
        return value
    columns = f"has {', '.join(map(str, row))}" if isinstance(row, dict) else f"holds {type(row).__name__} values"
    raise TextSourceError(f"{where}: no text in the column {text_column!r}; it {columns}. Set text_column.")


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".rst": _plain,
    ".py": _plain,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _from_hub(name: str, split: Split | None, text_column: str, *, streaming: bool) -> Iterator[Record]:
    """Yield rows of a hub data set, from its split of that name or, without one, by a hash of row numbers.

    "validation" serves as "test". `streaming` reads only the requested rows.
    """
    splits = _hub(name, "load_dataset", streaming=streaming)
    native = next((key for key in (split or "train", "validation" if split == "test" else None) if key in splits), None)
    has_test = "test" in splits or "validation" in splits
    rows = splits[native or next(iter(splits))]
    records = ((f"{name}:{index}", _column(row, text_column, name)) for index, row in enumerate(rows))
    return iter(records) if native and (split != "train" or has_test) else _split(records, split)


def _revision(name: str) -> str:
    """Return the commit of a hub data set, or the fingerprint that `datasets` gives a local copy."""
    return _hub(name, "load_dataset_builder").hash


def _hub(name: str, function: str, **options: Any) -> Any:
    import datasets

    try:
        return getattr(datasets, function)(name, **options)
    except Exception as error:  # the hub client raises many kinds of errors
        raise TextSourceError(
            f"There is no file or folder {Path(name).absolute()}, and no data set {name!r} could be loaded from the "
            f"hub ({type(error).__name__}: {error}). Give {ALLOWED}."
        ) from error
