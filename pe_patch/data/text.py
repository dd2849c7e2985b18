"""Read documents from Python's standard library, a folder, a file, or a Hugging Face hub data set."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import PePatchError, nearest, quoted
from .files import (
    ALLOWED,
    BLOCK,
    TABLES,
    Reading,
    Record,
    Skipped,
    TextSourceError,
    check_encoding,
    column_of,
    file_type,
    list_files,
    read_file,
)

__all__ = ["Skipped", "TextSourceError", "fingerprint", "iter_documents", "load_documents", "manifest"]

logger = logging.getLogger("pe_patch")

Split = Literal["train", "test"]

TEST_PERCENT = 10
"""Share of the documents in the test split, in percent."""
STDLIB_SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
STDLIB_SKIPPED |= {"site-packages", "dist-packages", "ensurepip", "__pycache__", "_distutils_hack"}
STDLIB_CHARACTERS = (2_000, 400_000)
"""Minimum and maximum length of the standard library's files, in characters."""
SPLIT_WORD = re.compile(r"(?<![a-z])(test|testing|eval|evaluation|valid|validation|val|dev)(?![a-z])", re.IGNORECASE)
"""Words that name a held-out split in the path of a file."""
SOURCE_OPTIONS = ("split", "text_column", "encoding")
"""Options that a source may carry, as in `folder@split=test,text_column=body`."""
CARRIED = re.compile(r"(.+)@(\w+=[^,]*(?:,\w+=[^,]*)*)")


def load_documents(
    source: str | Path,
    *,
    split: Split | None = None,
    text_column: str = "text",
    limit: int | None = None,
    encoding: str | None = None,
    skip_unreadable: bool = False,
    skipped: list[Skipped] | None = None,
) -> list[str]:
    """Return the documents of a source, in an order that is equal on all machines.

    Args:
        source: `stdlib`, a folder, a file or the name of a hub data set. It may carry options that replace the
            arguments: `folder@split=test,text_column=body,encoding=cp1252`.
        split: "test" is about a tenth of the documents, chosen by a hash of their names, and "train" is the rest. A
            single document is cut at nine tenths instead. A data set on the hub, a copy of it, or a folder that
            `save_to_disk` wrote uses the splits that it names; without "test", "validation" serves as "test". None
            reads everything.
        text_column: the text column of a table.
        limit: maximum number of documents; None reads all.
        encoding: the encoding of files that are not UTF-8 and have no byte order mark; None refuses them.
        skip_unreadable: skip files that cannot be read and rows without text instead of raising an error.
        skipped: a list that receives what was skipped and why; None logs a warning instead.

    Raises:
        TextSourceError: the source does not exist, has no text, or cannot be read.
    """
    documents = iter_documents(
        source, split=split, text_column=text_column, limit=limit, encoding=encoding, skip_unreadable=skip_unreadable,
        skipped=skipped,
    )  # fmt: skip
    return list(documents)


def iter_documents(
    source: str | Path,
    *,
    split: Split | None = None,
    text_column: str = "text",
    limit: int | None = None,
    streaming: bool = False,
    encoding: str | None = None,
    skip_unreadable: bool = False,
    skipped: list[Skipped] | None = None,
) -> Iterator[str]:
    """Yield the documents of `load_documents` one by one, reading each on demand.

    At most one document and one batch of Parquet rows are in memory (a .json file is read whole). Text files of the
    other split are not read. An unreadable document raises when it is reached.

    Args:
        source: see `load_documents`, also for the other arguments.
        streaming: stream a hub data set over the network instead of downloading it. A `limit` always streams.

    Raises:
        TextSourceError: the source does not exist, has no text, or cannot be read.
    """
    place, split, options = _parse(source, split, {"text_column": text_column, "encoding": encoding})
    if limit is not None and limit < 1:
        raise PePatchError(f"limit must be at least 1 document, got {limit}.")
    reading = Reading(skip_unreadable=skip_unreadable, skipped=[] if skipped is None else skipped, **options)
    texts = (text for _, text in _records(place, split, reading, streaming or limit is not None))
    return _some(islice(texts, limit), str(source), split, reading, warn=skipped is None)


def fingerprint(
    source: str | Path,
    *,
    split: Split | None = None,
    text_column: str = "text",
    limit: int | None = None,
    encoding: str | None = None,
    skip_unreadable: bool = False,
) -> str:
    """Hash what `iter_documents` would yield with these arguments, without decoding the text.

    The hash covers the names and bytes of the files, or the name and revision of a hub data set.
    """
    options = {"split": split, "text_column": text_column, "limit": limit, "encoding": encoding}
    return fingerprint_of(manifest(source), source, {**options, "skip_unreadable": skip_unreadable})


def fingerprint_of(files: Mapping[str, str], source: str | Path, options: Mapping[str, Any]) -> str:
    """Return the hash of a manifest and of the options of `iter_documents`."""
    _, split, carried = _parse(
        source, options.get("split"), {key: options.get(key) for key in ("text_column", "encoding")}
    )
    parts = [repr(sorted({**options, **carried, "split": split}.items(), key=lambda item: item[0]))]
    parts += [f"{name}\0{digest}" for name, digest in files.items()]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def manifest(source: str | Path) -> dict[str, str]:
    """Return the hash of each text file of a source by its name, or the revision of a hub data set by the name."""
    place, _, _ = _parse(source, None, {})
    if place == "stdlib":
        return {name: _digest(path) for name, path in _stdlib_paths()}
    path = _local(place)
    if path is None:
        return {place: _hub(place, "load_dataset_builder").hash}
    return {name: _digest(each) for name, each in _files_of(path, Reading())}


def held_out_split(source: str | Path) -> Split | None:
    """Return "test" if the source names its held-out documents itself, else None.

    This is so for `stdlib`, on part of which the demo model was trained, for hub data sets, and for folders with a test
    or validation split.
    """
    place, split, _ = _parse(source, None, {})
    if split is not None or place == "stdlib":
        return split or "test"
    path = _local(place)
    if path is None:
        return "test"
    if not path.is_dir():
        return None
    names = _saved_splits(path) if _is_saved(path) else _named_splits(path, _files_of(path, Reading()))
    return "test" if names and len(names) > 1 else None


def source_path(source: str) -> str:
    """Return a source without the options that it carries."""
    return _parse(source, None, {})[0]


def with_options(source: str, **options: str | None) -> str:
    """Return a source that carries options, such as `folder@split=test`. Those that it has already stay."""
    place, split, carried = _parse(source, None, {})
    given = {**{key: value for key, value in options.items() if value is not None}, **carried}
    given.update({} if split is None else {"split": split})
    return f"{place}@{','.join(f'{key}={value}' for key, value in given.items())}" if given else place


def _parse(source: str | Path, split: Any, options: Mapping[str, Any]) -> tuple[str, Split | None, dict[str, Any]]:
    """Return a source without its options, the split, and the options."""
    place, carried = str(source), {}
    if (found := CARRIED.fullmatch(place)) is not None and not Path(place).expanduser().exists():
        place = found[1]
        carried = dict(option.split("=", 1) for option in found[2].split(","))
        for key in carried:
            if key not in SOURCE_OPTIONS:
                raise PePatchError(
                    f"{source!s}: a source has no option {quoted(key)}.{nearest(key, SOURCE_OPTIONS)} It takes "
                    f"{', '.join(SOURCE_OPTIONS)}, as in folder@split=test,text_column=body."
                )
    split = carried.pop("split", split)
    if split not in (None, *get_args(Split)):
        raise PePatchError(f"split must be 'train', 'test' or None, got {split!r}.")
    options = {**options, **carried}
    check_encoding(options.get("encoding"))
    return place, split, options


def _some(texts: Iterator[str], source: str, split: Split | None, reading: Reading, *, warn: bool) -> Iterator[str]:
    """Yield the texts, raise `TextSourceError` if there are none, and warn of what was skipped."""
    first = next(texts, None)
    if first is None:
        reasons = "; ".join(map(str, reading.skipped))
        raise TextSourceError(
            f"{source} has no text{_in_words(split)}{': ' + reasons if reasons else ''}. Give {ALLOWED}."
        )
    try:
        yield from chain([first], texts)
    finally:  # also if the reader has enough before the end
        unexpected = [str(record) for record in reading.skipped if record.reason != "hidden"]
        if warn and unexpected:
            logger.warning("%s: %s.", source, "; ".join(unexpected))


def _in_words(split: Split | None) -> str:
    """Return where text is missing, and why a split of a small source may have none."""
    if split is None:
        return ""
    percent = TEST_PERCENT if split == "test" else 100 - TEST_PERCENT
    return (
        f" in its {split} split (without named splits, a hash of each document's name puts about {percent} % of the "
        f"documents there, which may be none of a few)"
    )


def _records(source: str, split: Split | None, reading: Reading, streaming: bool) -> Iterator[tuple[str, str]]:
    """Yield names and texts."""
    if source == "stdlib":
        return _split(((name, lambda text=text: text) for name, text in stdlib_files()), split)
    path = _local(source)
    if path is None:
        return _from_hub(source, split, reading, streaming=streaming)
    if _is_saved(path):
        return _from_disk(path, split, reading)
    files = _files_of(path, reading)
    if path.is_dir() and (names := _named_splits(path, files)):
        files = _of_named_split(files, names, split, reading)
        split = split if len(names) == 1 else None
    return _split((record for name, each in files for record in read_file(each, name, reading)), split)


def _local(source: str) -> Path | None:
    """Return the path of a source; return None if it can only be a hub data set."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if any(file_type(path)) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source):
        raise TextSourceError(f"There is no file or folder {path.absolute()}. Give {ALLOWED}.")
    return None


def _files_of(path: Path, reading: Reading) -> list[tuple[str, Path]]:
    """Return the names and paths of a folder's or file's text files."""
    if not path.is_dir():
        return [(path.name, path)]
    if _is_saved(path):
        return [(each.relative_to(path).as_posix(), each) for each in sorted(path.rglob("*.arrow"))]
    return list_files(path, reading)


def _digest(path: Path) -> str:
    """Return the hash of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise TextSourceError(f"Cannot read {path}: {error.strerror}.") from error
    return digest.hexdigest()


def _split(records: Iterable[Record], split: Split | None) -> Iterator[tuple[str, str]]:
    """Yield the names and texts of a split. Documents of the other split are not read, except the first two."""
    records = iter(records)
    first = list(islice(_loaded(records), 2))
    if split is not None and len(first) == 1:
        name, text = first[0]
        cut = len(text) * (100 - TEST_PERCENT) // 100
        yield name, text[cut:] if split == "test" else text[:cut]
        return
    yield from ((name, text) for name, text in first if _in_split(name, split))
    yield from _loaded((name, load) for name, load in records if _in_split(name, split))


def _loaded(records: Iterable[Record]) -> Iterator[tuple[str, str]]:
    return ((name, text) for name, load in records if (text := load()) is not None)


def _in_split(name: str, split: Split | None) -> bool:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    held_out = int.from_bytes(digest[:4], "big") % 100 < TEST_PERCENT
    return split is None or held_out == (split == "test")


def stdlib_files() -> Iterator[tuple[str, str]]:
    """Yield the names and texts of the standard library's source files of moderate length."""
    shortest, longest = STDLIB_CHARACTERS
    for name, path in _stdlib_paths():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # some files are examples of other encodings
            continue
        if shortest <= len(text) <= longest:
            yield name, text


def _stdlib_paths() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if STDLIB_SKIPPED.isdisjoint(name.parts):
            yield name.as_posix(), path


# Splits that a folder names


def _named_splits(folder: Path, files: list[tuple[str, Path]]) -> dict[str, set[str]] | None:
    """Return the paths of the files of each named split, found as `datasets` finds them; None if none is held out.

    Text and code have words such as "test" in their paths for other reasons. Their folders count as a data set only if
    every file belongs to a split.
    """
    card = folder / "README.md"
    declared = card.is_file() and b"data_files" in card.read_bytes()[:BLOCK]
    if not declared and not any(SPLIT_WORD.search(name) for name, _ in files):
        return None
    splits = _declared_splits(folder) if declared else _splits_by_name(folder)
    paths = {key: {os.path.abspath(path) for path in paths} for key, paths in splits.items()}
    if "train" not in paths or not ("test" in paths or "validation" in paths):
        return None
    everything = set().union(*paths.values())
    tables = all(file_type(path)[0] in TABLES for _, path in files)
    return paths if declared or tables or all(os.path.abspath(path) in everything for _, path in files) else None


def _splits_by_name(folder: Path) -> Mapping[str, Iterable[str]]:
    from datasets.data_files import DataFilesDict, get_data_patterns

    try:
        return DataFilesDict.from_patterns(get_data_patterns(str(folder.absolute())), str(folder.absolute()))
    except FileNotFoundError:  # no file that `datasets` considers data
        return {}


def _declared_splits(folder: Path) -> Mapping[str, Iterable[str]]:
    """Return the files of each split that the README of a data set declares."""
    try:
        return _hub(str(folder), "load_dataset_builder").config.data_files or {}
    except TextSourceError as error:
        raise TextSourceError(
            f"{folder}: cannot read the splits that README.md declares ({error.__cause__}). Give one folder or file of "
            "the data set as the source."
        ) from error


def _of_named_split(
    files: list[tuple[str, Path]], names: Mapping[str, set[str]], split: Split | None, reading: Reading
) -> list[tuple[str, Path]]:
    """Return the files of a named split, or of all splits if `split` is None."""
    wanted = names[_held_out(names) if split == "test" else split] if split else set().union(*names.values())
    for name, path in files:
        if not any(os.path.abspath(path) in paths for paths in names.values()):
            reading.skip(name, f"belongs to no split of the data set ({', '.join(names)})")
    return [(name, path) for name, path in files if os.path.abspath(path) in wanted]


def _held_out(names: Iterable[str]) -> str:
    return "test" if "test" in names else "validation"


# What `datasets` reads


def _is_saved(path: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json")) and (
        (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()
    )


def _from_disk(folder: Path, split: Split | None, reading: Reading) -> Iterator[tuple[str, str]]:
    """Yield the rows of a folder that `save_to_disk` wrote."""
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets raise many kinds of errors
        raise TextSourceError(f"Cannot read {folder}, which save_to_disk wrote: {error}.") from error
    tables = {"train": table} if isinstance(table, datasets.Dataset) else table
    splits = {str(name): rows for name, rows in tables.items()}
    return _from_splits(splits, str(folder), split, reading, label=folder.resolve().name)


def _saved_splits(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if (path / "state.json").is_file()]


def _from_hub(name: str, split: Split | None, reading: Reading, *, streaming: bool) -> Iterator[tuple[str, str]]:
    """Yield the rows of a hub data set. `streaming` reads only the requested rows."""
    return _from_splits(_hub(name, "load_dataset", streaming=streaming), name, split, reading)


def _from_splits(
    splits: Mapping[str, Any], name: str, split: Split | None, reading: Reading, label: str | None = None
) -> Iterator[tuple[str, str]]:
    """Yield rows from the split of that name or, without a held-out one, by a hash of labels and row numbers.

    "validation" serves as "test". `label` names the rows, by default `name`. A folder's label is not its whole path,
    so that a data set keeps its split when it moves.
    """
    label = label or name
    named = "train" in splits and ("test" in splits or "validation" in splits)
    native = _held_out(splits) if split == "test" and named else "train" if "train" in splits else next(iter(splits))
    if split == "test" and not named and ("test" in splits or "validation" in splits):
        native, named = _held_out(splits), True
    values = enumerate(column_of(splits[native], reading.text_column, name))
    records = (
        (f"{label}:{row}", lambda value=value, where=where, row=row: reading.read(f"{label}:{row}", lambda: value,
                                                                                  lambda: where))
        for row, (value, where) in values
    )  # fmt: skip
    return _split(records, None if named else split)


SCRIPTS = "Dataset scripts are no longer supported"
"""The error message of `datasets` for a data set that needs a loading script."""


def _hub(name: str, function: str, **options: Any) -> Any:
    import datasets

    try:
        return getattr(datasets, function)(name, **options)
    except Exception as error:  # the hub client raises many kinds of errors
        if SCRIPTS in str(error) or "trust_remote_code" in str(error):
            raise TextSourceError(
                f"The data set {name!r} is made by a loading script, which pe_patch and `datasets` 4 and later do not "
                f"run ({type(error).__name__}: {error}). Convert it to Parquet and give the folder or the new name. "
                "Many data sets have a copy in Parquet in the revision refs/convert/parquet: hf download --repo-type "
                f"dataset {name} --revision refs/convert/parquet --local-dir FOLDER."
            ) from error
        raise TextSourceError(
            f"There is no file or folder {Path(name).absolute()}, and no data set {name!r} could be loaded from the "
            f"hub ({type(error).__name__}: {error}). Give {ALLOWED}."
        ) from error
