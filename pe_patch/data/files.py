"""Find the text files of a folder, open them whatever their compression and encoding, and read their rows.

`datasets` reads Parquet and Arrow files. Text, JSON and CSV are read here because `datasets` 5.2 changes them: its JSON
reader returns "2020-01-01" as a datetime and fails on a whole file with one lone surrogate, its CSV reader returns "NA"
as null and needs the delimiter, and neither detects an encoding or names the line of a bad byte.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..errors import PePatchError, quoted

Record = tuple[str, Callable[[], "str | None"]]
"""A name that is equal on all machines, and a function that reads the text; it returns None for a skipped document."""

NAMES_KEPT = 10
"""Number of names that a `Skipped` record keeps."""
BLOCK = 1 << 20
"""Bytes that are read together."""
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that `datasets` writes beside the data."""
ALLOWED = (
    "'stdlib', a folder, a .txt, .md, .rst, .py, .jsonl, .json, .csv, .tsv, .parquet or .arrow file (text files also "
    "with .gz, .bz2, .xz or .zst), or the name of a hub data set"
)


class TextSourceError(PePatchError, FileNotFoundError):
    """Raised if the source cannot be read as text."""


class UnreadableError(TextSourceError):
    """Raised for a file or row that `skip_unreadable` skips. `reason` is the reason for the list of skipped files."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Skipped:
    """Files or rows that were skipped for one reason."""

    reason: str
    count: int = 0
    names: list[str] = field(default_factory=list)
    """The first names, at most `NAMES_KEPT`."""

    def __str__(self) -> str:
        rest = self.count - len(self.names)
        return f"{self.count:,} skipped, {self.reason}: {', '.join(self.names)}" + (f", {rest:,} more" if rest else "")


@dataclass(frozen=True)
class Reading:
    """How files become text, and the list that collects what is skipped."""

    text_column: str = "text"
    encoding: str | None = None
    skip_unreadable: bool = False
    skipped: list[Skipped] = field(default_factory=list)

    def skip(self, name: str, reason: str) -> None:
        """Add a name to the record of its reason."""
        record = next((record for record in self.skipped if record.reason == reason), None)
        if record is None:
            record = Skipped(reason)
            self.skipped.append(record)
        record.count += 1
        if len(record.names) < NAMES_KEPT:
            record.names.append(name)

    def read(self, name: str, load: Callable[[], Any], where: Callable[[], str]) -> str | None:
        """Return the text that `load` returns, or None if it is skipped: empty, or unreadable with `skip_unreadable`.

        Args:
            name: the name for the list of skipped documents.
            load: returns the value of the text column.
            where: returns the words that locate the value in an error.
        """
        try:
            text = self._checked(load(), where)
        except UnreadableError as error:
            if not self.skip_unreadable:
                raise
            self.skip(name, error.reason)
            return None
        if not text.strip():
            self.skip(name, "empty")
            return None
        return text

    def _checked(self, value: Any, where: Callable[[], str]) -> str:
        column = self.text_column
        if value is None:
            raise _bad_row(f"{column} is null in {where()}.", f"{column} is null")
        if not isinstance(value, str):
            raise TextSourceError(
                f"{where()}: the column {column!r} holds {_kind(value)}, not text. Give the name of a column of "
                f"strings. {SET_COLUMN}"
            )
        if not value.isascii() and (lone := SURROGATE.search(value)) is not None:
            raise _bad_row(
                f"{where()}: {column} has the lone surrogate {lone[0].encode('unicode_escape').decode()} at character "
                f"{lone.start():,}, which is half of a character and cannot be encoded.",
                "lone surrogate",
            )
        return value


SURROGATE = re.compile("[\ud800-\udfff]")
SET_COLUMN = "Set text_column (in a recipe data.text_column), or append @text_column=NAME to the source."
SKIP = "Correct it, or set skip_unreadable=true (in a recipe data.skip_unreadable) to skip such files and rows."


def _bad_row(message: str, reason: str) -> UnreadableError:
    return UnreadableError(f"{message} {SKIP}", reason)


def _kind(value: Any) -> str:
    return "lists" if isinstance(value, list) else f"{type(value).__name__} values ({quoted(value)})"


# The files of a folder


def file_type(path: Path) -> tuple[str, str]:
    """Return a file's format and compression by its name in lower case, such as (".jsonl", ".gz"), or empty strings."""
    name = path.name.lower()
    compression = next((ending for ending in OPENERS if name.endswith(ending)), "")
    suffix = Path(name.removesuffix(compression)).suffix
    known = suffix in PLAIN or suffix in TABLES
    return (suffix, compression) if known and not (compression and suffix in COLUMNAR) else ("", "")


def list_files(folder: Path, reading: Reading) -> list[tuple[str, Path]]:
    """Return the names and paths of a folder's text files in order, and record the skipped ones.

    Links are followed once. A link into the folder is skipped, because it would repeat a document under another name.
    """
    root = folder.resolve()
    found: list[tuple[str, Path]] = []
    targets: set[Path] = set()
    pending = [folder]
    while pending:
        path = pending.pop()
        name = path.relative_to(folder).as_posix()
        if path != folder:
            reason = _reason_to_skip(path, root, targets)
            if reason:
                reading.skip(name, reason)
                continue
        if path.is_dir():
            try:
                pending += sorted(path.iterdir(), reverse=True)
            except OSError as error:
                raise TextSourceError(f"Cannot list the folder {path}: {error.strerror}.") from error
        else:
            found.append((name, path))
    return _without_descriptions(found, reading)


def _reason_to_skip(path: Path, root: Path, targets: set[Path]) -> str:
    """Return the reason to skip an entry of a folder, or an empty string. `targets` collects the links' targets."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink():
        target = path.resolve()
        if not path.exists():
            return "broken link"
        if target in targets or target.is_relative_to(root) or root.is_relative_to(target):
            return "link to a file or folder that is read already"
        targets.add(target)
    if path.is_dir():
        return ""
    if not path.is_file():
        return "not a regular file"
    if path.name in METADATA:
        return "metadata of a data set"
    if file_type(path)[0]:
        return ""
    return f"{path.suffix} is not a supported text format" if path.suffix else "no file ending"


def _without_descriptions(files: list[tuple[str, Path]], reading: Reading) -> list[tuple[str, Path]]:
    """Drop a data set's README: a folder of tables has its text in the tables."""
    prose = [(name, path) for name, path in files if file_type(path)[0] in PROSE]
    tables = [(name, path) for name, path in files if file_type(path)[0] in TABLES]
    top_level = all("/" not in name and path.stem.lower() in DESCRIPTIONS for name, path in prose)
    if not tables or not prose or len(tables) + len(prose) < len(files) or not top_level:
        return files
    for name, _ in prose:
        reading.skip(name, "description of a data set")
    return tables


DESCRIPTIONS = {"readme", "license", "licence", "notice", "changelog", "citation"}
PROSE = {".txt", ".text", ".md", ".markdown", ".rst"}
PLAIN = {*PROSE, ".py"}
COLUMNAR = {".parquet": "parquet", ".arrow": "arrow"}
"""Formats that `datasets` reads, with the names of its readers."""


# Bytes and encodings


def _open_zst(path: Path) -> Any:
    # Python has no Zstandard before 3.14. PyArrow, which `datasets` requires, reads it.
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


def _open(path: Path) -> BinaryIO:
    return OPENERS.get(file_type(path)[1], lambda plain: plain.open("rb"))(path)


@contextmanager
def _errors_of(path: Path, encoding: str | None) -> Iterator[None]:
    """Raise what opening, decompressing or decoding a file raises as `UnreadableError` that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise _bad_byte(path, encoding) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        if isinstance(error, TextSourceError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise _bad_row(f"Cannot read {path}: {reason}.", "unreadable file") from error


def _check_pointer(path: Path) -> None:
    """Raise `UnreadableError` for a Git LFS pointer, the placeholder of a file that was not downloaded."""
    with path.open("rb") as file:
        pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    if pointer:
        raise UnreadableError(
            f"{path} is a Git LFS pointer: the file itself was not downloaded. Run `git lfs pull` in its repository.",
            "Git LFS pointer",
        )


def find_codec(head: bytes, blocks: Callable[[], Iterable[bytes]], encoding: str | None) -> str:
    """Return the codec of a file: by its byte order mark, UTF-16 by its zero bytes, UTF-8, or else `encoding`.

    Args:
        head: the first bytes.
        blocks: returns all bytes in blocks.
        encoding: the encoding of files that are not UTF-8, or None.
    """
    for mark, codec in BOMS:
        if head.startswith(mark):
            return codec
    if encoding is not None and not _extends_ascii(encoding):
        return encoding  # such a file can be valid UTF-8 and mean something else
    zeros = [head[parity::2].count(0) for parity in (0, 1)]
    for parity, codec in ((1, "utf-16-le"), (0, "utf-16-be")):
        if zeros[1 - parity] == 0 and zeros[parity] > len(head) // 8:
            return codec
    if encoding is None:
        return "utf-8"
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in blocks():
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return encoding
    return "utf-8"


def check_encoding(encoding: str | None) -> None:
    """Raise `PePatchError` if Python does not know the encoding."""
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError as error:
        raise PePatchError(
            f"encoding {encoding!r} is unknown. Examples: cp1252, latin-1, utf-16, shift_jis."
        ) from error


def _extends_ascii(encoding: str) -> bool:
    """Return whether all ASCII bytes mean themselves, and other characters have other bytes."""
    ascii_bytes = bytes(range(128))
    others = "é世я".encode(encoding, "ignore")  # ISO 2022, UTF-7 and HZ write them in ASCII bytes
    same = ascii_bytes.decode(encoding, "replace") == ascii_bytes.decode("ascii")
    return same and (not others or max(others) > 127)


def _blocks(path: Path) -> Iterator[bytes]:
    with _open(path) as stream:
        while block := stream.read(BLOCK):
            yield bytes(block)


def _text(path: Path, encoding: str | None) -> str:
    """Return the whole text of a file, with line ends as line feeds."""
    with _errors_of(path, encoding):
        _check_pointer(path)
        data = b"".join(_blocks(path))
        codec = find_codec(data[:4096], lambda: [data], encoding)
        return io.TextIOWrapper(io.BytesIO(data), encoding=codec).read()


def _codec(path: Path, encoding: str | None) -> str:
    with _open(path) as stream:
        head = bytes(stream.read(4096))
    return find_codec(head, lambda: _blocks(path), encoding)


def _open_text(path: Path, encoding: str | None, newline: str | None = None) -> TextIO:
    """Open a file as text, decoding on demand."""
    _check_pointer(path)
    return io.TextIOWrapper(_open(path), encoding=_codec(path, encoding), newline=newline)


def _bad_byte(path: Path, encoding: str | None) -> UnreadableError:
    """Return the error that names the line and the offset of the first byte that a file's codec cannot decode."""
    codec = _codec(path, encoding)
    decoder, line, read, where = codecs.getincrementaldecoder(codec)(), 1, 0, ""
    for block in chain(_blocks(path), [b""]):
        pending = len(decoder.getstate()[0])
        try:
            line += decoder.decode(block, final=not block).count("\n")
        except UnicodeDecodeError as error:
            line += error.object[: error.start].decode(codec, "ignore").count("\n")
            byte, offset = error.object[error.start], read - pending + error.start
            where = f", line {line:,}: byte 0x{byte:02x} at offset {offset:,}"
            break
        read += len(block)
    return UnreadableError(
        f"{path}{where} is not {codec.upper()}. Set encoding to the encoding of such files (in a recipe data.encoding, "
        "or append @encoding=NAME to the source), for example encoding=cp1252 for Western European text, or convert "
        "the file to UTF-8.",
        f"not {codec.upper()}",
    )


# Rows


def read_file(path: Path, name: str, reading: Reading) -> Iterator[Record]:
    """Yield the records of a file. A document is read when its record is called."""
    suffix, _ = file_type(path)
    if not suffix:
        raise TextSourceError(f"{path} is not a supported text file. Give {ALLOWED}.")
    if suffix in PLAIN:
        yield name, lambda: reading.read(name, lambda: _text(path, reading.encoding), lambda: str(path))
        return
    try:
        with _errors_of(path, reading.encoding):
            for row, (value, where) in enumerate(TABLES[suffix](path, reading)):
                label = f"{name}:{row}" if row else name
                yield (
                    label,
                    lambda value=value, where=where, label=label: reading.read(label, lambda: value, lambda: where),
                )
    except UnreadableError as error:
        if not reading.skip_unreadable:
            raise
        reading.skip(name, f"{error.reason} (the rest of the file)")


Rows = Iterator[tuple[Any, str]]
"""The values of the text column, and the words that locate each."""


def _json_lines(path: Path, reading: Reading) -> Rows:
    with _open_text(path, reading.encoding) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"row {number:,} of {path}"
                yield _column(_parse(line, f"{path}, line {number:,}"), reading.text_column, where), where


def _json(path: Path, reading: Reading) -> Rows:
    """Yield the texts of a list of rows or strings, of one row whose column may be a list, or of JSON lines."""
    text, column = _text(path, reading.encoding), reading.text_column
    try:
        value = _parse(text, str(path))
    except TextSourceError as error:
        if "Extra data" not in str(error):
            raise
        yield from _json_lines(path, reading)  # many data sets name such files .json
        return
    if isinstance(value, dict) and isinstance(value.get(column), list):
        value = value[column]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        where = f"row {number:,} of {path}"
        yield _column(row, column, where), where


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextSourceError(f"{where}: not JSON ({error}).") from error


def _csv(path: Path, reading: Reading) -> Rows:
    """Yield the texts of a table with a header. The delimiter is the one that makes the text column a column."""
    csv.field_size_limit(1 << 30)  # the default limit is 128 kB
    column = reading.text_column
    with _open_text(path, reading.encoding, newline="") as lines:
        header = lines.readline()
        preset = re.fullmatch(r"sep=(.)\s*", header)  # Excel reads and writes such a line
        if preset:
            header = lines.readline()
        while header.count('"') % 2 and (more := lines.readline()):
            header += more
        delimiters = [preset[1]] if preset else ["\t", ","] if file_type(path)[0] == ".tsv" else [",", ";", "\t"]
        headers = {each: next(csv.reader(io.StringIO(header, newline=""), delimiter=each), []) for each in delimiters}
        delimiter = next((each for each in delimiters if column in headers[each]), None)
        if delimiter is None:
            fields = max(headers.values(), key=len)
            raise _no_column(f"has the columns {', '.join(fields)}" if fields else "is empty", column, str(path))
        fields = headers[delimiter]
        rows = (cells for cells in csv.reader(lines, delimiter=delimiter) if cells)
        for number, cells in enumerate(rows, 1):
            yield dict(zip(fields, cells, strict=False)).get(column), f"row {number:,} of {path}"


def _columnar(path: Path, reading: Reading) -> Rows:
    """Yield a column of a Parquet or Arrow file, read by `datasets` in batches."""
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError

    _check_pointer(path)
    kind = COLUMNAR[file_type(path)[0]]
    try:
        # A name with [ or * is a pattern for `datasets`.
        table = datasets.load_dataset(kind, data_files=glob.escape(str(path.absolute())), split="train", streaming=True)
        yield from column_of(table, reading.text_column, str(path))
    except (pyarrow.ArrowException, DatasetsError) as error:
        raise _bad_row(f"Cannot read {path}: {error}.", "damaged file") from error


def column_of(table: Any, column: str, name: str) -> Rows:
    """Yield the values of a column of a `datasets` table."""
    names = table.column_names
    if names is not None and column not in names:
        raise _no_column(f"has the columns {', '.join(names)}", column, name)
    if names is not None:
        table = table.select_columns([column])
    for number, row in enumerate(table, 1):
        where = f"row {number:,} of {name}"
        yield _column(row, column, where), where


def _column(row: Any, column: str, where: str) -> Any:
    if isinstance(row, dict):
        if column not in row:
            raise _no_column(f"has the columns {', '.join(map(str, row))}", column, where)
        return row[column]
    if row is None or isinstance(row, str):
        return row
    raise _no_column(f"holds {_kind(row)}", column, where)


def _no_column(found: str, column: str, where: str) -> TextSourceError:
    return TextSourceError(f"{where}: no column {column!r}; it {found}. {SET_COLUMN}")


TABLES: dict[str, Callable[[Path, Reading], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _columnar,
    ".arrow": _columnar,
}
"""A reader for each format of tables."""
