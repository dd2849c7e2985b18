"""Where documents come from: Python's own source, a folder, a file, or a data set of the Hugging Face hub."""

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

from pe_patch.errors import PePatchError

Split = Literal["train", "test"]
Record = tuple[str, str]
"""A name that does not change from machine to machine, and the text."""

TEST_PERCENT = 10
STDLIB_SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
STDLIB_SKIPPED |= {"site-packages", "dist-packages", "ensurepip", "__pycache__", "_distutils_hack"}
STDLIB_CHARACTERS = (2_000, 400_000)
ALLOWED = "'stdlib', a folder, a .txt, .md, .py, .jsonl, .json, .parquet or .csv file, or the name of a hub data set"


class TextSourceError(PePatchError, FileNotFoundError):
    """No text could be read from the source that was named."""


def load_documents(
    source: str | Path, *, split: Split | None = None, text_column: str = "text", limit: int | None = None
) -> list[str]:
    """The documents of `source`, in an order that is the same on every machine.

    `split` keeps about a tenth of the documents for "test" by a hash of their names, the rest for "train"; a source of
    one document is cut at nine tenths instead, and a hub data set uses its own splits where it has them. `text_column`
    names the column of a table. `limit` is the greatest number of documents. A source that does not exist or holds no
    text raises `TextSourceError`.
    """
    if split not in (None, "train", "test"):
        raise PePatchError(f"split is 'train', 'test' or None, got {split!r}.")
    if limit is not None and limit < 1:
        raise PePatchError(f"limit is the greatest number of documents, at least 1; got {limit}.")
    records = _records(str(source), split, text_column, limit)
    documents = [text for _, text in islice(records, limit)]
    if not documents:
        raise TextSourceError(f"{source!s} holds no text (split {split!r}). A source of text is {ALLOWED}.")
    return documents


def _records(source: str, split: Split | None, text_column: str, limit: int | None) -> Iterator[Record]:
    path = Path(source).expanduser()
    if source == "stdlib":
        return _split(stdlib_files(), split)
    if path.is_dir():
        return _split(_folder(path, text_column), split)
    if path.is_file():
        return _split(_file(path, path.name, text_column), split)
    if path.suffix in READERS or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source):
        raise TextSourceError(f"There is no file or folder {path.absolute()}. A source of text is {ALLOWED}.")
    return _from_hub(source, split, text_column, streaming=limit is not None)


def _split(records: Iterable[Record], split: Split | None) -> Iterator[Record]:
    """Those of the records that belong to the split."""
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
    root = Path(sysconfig.get_paths()["stdlib"])
    shortest, longest = STDLIB_CHARACTERS
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if STDLIB_SKIPPED.isdisjoint(name.parts):
            text = _decode(path)
            if text is not None and shortest <= len(text) <= longest:
                yield name.as_posix(), text


def _decode(path: Path) -> str | None:
    """The text of a file, or None where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _folder(folder: Path, text_column: str) -> Iterator[Record]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and path.suffix in READERS and not hidden:
            yield from _file(path, name.as_posix(), text_column)


def _file(path: Path, name: str, text_column: str) -> Iterator[Record]:
    if path.suffix not in READERS:
        raise TextSourceError(f"{path} is no text that can be read here. A source of text is {ALLOWED}.")
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
    """A list of rows or of strings; or one row, whose column may be a list."""
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
    csv.field_size_limit(1 << 30)  # the default refuses a document of more than 128 kB
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
    raise TextSourceError(f"{where}: no text in the column {text_column!r}; it {columns}. Give text_column=.")


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
    """Rows of a hub data set: its own split of that name ("validation" serves as "test"), else a hash of row numbers.

    `streaming` reads only as many rows as are asked for.
    """
    import datasets

    try:
        splits: Any = datasets.load_dataset(name, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds: offline, no such name, no such config
        raise TextSourceError(
            f"There is no file or folder {Path(name).absolute()}, and no data set {name!r} could be loaded from the "
            f"hub ({type(error).__name__}: {error}). A source of text is {ALLOWED}."
        ) from error
    own = next((key for key in (split or "train", "validation" if split == "test" else None) if key in splits), None)
    has_test = "test" in splits or "validation" in splits
    rows = splits[own or next(iter(splits))]
    records = ((f"{name}:{index}", _column(row, text_column, name)) for index, row in enumerate(rows))
    return iter(records) if own and (split != "train" or has_test) else _split(records, split)
