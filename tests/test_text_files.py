"""Files are read whatever their encoding, compression and ending, or refused by name; nothing is skipped silently."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import logging
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pe_patch.data import files as files_module
from pe_patch.data.files import Skipped
from pe_patch.data.text import (
    TextSourceError,
    fingerprint,
    held_out_split,
    iter_documents,
    load_documents,
    manifest,
    with_options,
)
from pe_patch.errors import PePatchError

FRENCH = "Déjà vu: l'été à Besançon coûte 5 €.\nLigne deux, très brève.\n"
ROWS = [f"document number {number}" for number in range(60)]


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))


def collect(source: Path | str, **options: Any) -> tuple[list[str], dict[str, list[str]]]:
    skipped: list[Skipped] = []
    documents = load_documents(source, skipped=skipped, **options)
    return documents, {record.reason: record.names for record in skipped}


def write_parquet(path: Path, **columns: list[Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


# Encodings


MARKED = {
    "utf-8-sig": FRENCH.encode("utf-8-sig"),
    "utf-16": FRENCH.encode("utf-16"),
    "utf-16-be": codecs.BOM_UTF16_BE + FRENCH.encode("utf-16-be"),
    "utf-32": FRENCH.encode("utf-32"),
    "utf-16-le without mark": FRENCH.encode("utf-16-le"),
    "utf-16-be without mark": FRENCH.encode("utf-16-be"),
}


@pytest.mark.parametrize("name", MARKED)
def test_unicode_is_detected_and_its_mark_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_bytes(MARKED[name])
    assert load_documents(tmp_path) == [FRENCH]
    row = json.dumps({"text": FRENCH}, ensure_ascii=False) + "\n"
    codec = name.split()[0]
    mark = "" if codec in ("utf-8-sig", "utf-16", "utf-32") or "without" in name else "\ufeff"
    (tmp_path / "a.jsonl").write_bytes((mark + row).encode(codec))
    assert load_documents(tmp_path / "a.jsonl") == [FRENCH]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "json", "csv"])
def test_a_byte_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path, ending: str) -> None:
    body = {
        "txt": "first\n" + FRENCH,
        "jsonl": '{"text": "first"}\n' + json.dumps({"text": FRENCH}, ensure_ascii=False),
        "json": '["first",\n' + json.dumps(FRENCH, ensure_ascii=False) + "]",
        "csv": 'text\n"' + FRENCH + '"\n',
    }[ending]
    path = tmp_path / f"latin.{ending}"
    data = body.encode("cp1252")
    path.write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as expected:  # Python's own decoder finds the same byte
        data.decode("utf-8")
    with pytest.raises(TextSourceError) as caught:
        load_documents(path)
    said = str(caught.value)
    assert f"{path}, line 2: byte 0x{data[expected.value.start]:02x} at offset {expected.value.start:,}" in said
    assert "UTF-8" in said and "encoding=cp1252" in said and "data.encoding" in said
    assert any("Besançon coûte 5 €" in text for text in load_documents(path, encoding="cp1252"))


def test_a_bad_byte_far_into_a_compressed_file_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "BLOCK", 7)  # characters are cut by the ends of blocks
    data = ("é" * 5 + "\n").encode() * 40 + b"caf\xe9\n"
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(data)
    with pytest.raises(TextSourceError, match=rf"a\.txt\.gz, line 41: byte 0xe9 at offset {len(data) - 2}"):
        load_documents(tmp_path)


def test_half_a_folder_in_latin_1_is_refused_or_read_never_dropped(tmp_path: Path) -> None:
    texts = [f"{number}: {FRENCH}" for number in range(40)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02d}.txt").write_bytes(text.encode("cp1252" if number % 2 else "utf-8"))
    with pytest.raises(TextSourceError, match=r"01\.txt, line 1: byte 0xe9"):
        load_documents(tmp_path)
    assert load_documents(tmp_path, encoding="cp1252") == texts
    documents, reasons = collect(tmp_path, skip_unreadable=True)
    assert documents == texts[::2] and list(reasons) == ["not UTF-8"]
    assert fingerprint(tmp_path) != fingerprint(tmp_path, encoding="cp1252")
    with pytest.raises(PePatchError, match="cp1252"):
        load_documents(tmp_path, encoding="cp-1252x")


def test_an_encoding_that_is_not_ascii_is_used_though_the_bytes_are_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("こんにちは、世界".encode("iso2022_jp"))
    assert load_documents(tmp_path, encoding="iso2022_jp") == ["こんにちは、世界"]


# Compression, endings, links


def write_zst(path: Path, data: bytes) -> None:
    import pyarrow

    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(data)


PACKERS: dict[str, Callable[[Path, bytes], Any]] = {
    ".gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    ".bz2": lambda path, data: path.write_bytes(bz2.compress(data)),
    ".xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    ".zst": write_zst,
}


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_files_are_read_and_cut_ones_are_refused(tmp_path: Path, ending: str) -> None:
    rows = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()
    PACKERS[ending](tmp_path / f"rows.jsonl{ending}", rows)
    PACKERS[ending](tmp_path / f"TEXT.TXT{ending.upper()}", FRENCH.encode())
    assert load_documents(tmp_path) == [FRENCH, *ROWS]
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(TextSourceError, match=rf"rows\.jsonl\{ending}"):
        load_documents(path)


def test_what_is_no_text_is_listed_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = {"a.TXT": "one", "B.JSONL": '{"text": "two"}', "c.Md": "three"}
    left = {
        "page.html": ".html is not a supported text format", "LICENSE": "no file ending", "e.txt": "empty",
        "spaces.txt": "empty", "t.parquet.gz": ".gz is not a supported text format", ".hidden": "hidden",
    }  # fmt: skip
    for name, text in {**kept, **dict.fromkeys(left, "x"), "e.txt": "", "spaces.txt": " \n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("x")
    documents, reasons = collect(tmp_path)
    assert documents == ["two", "one", "three"]  # in the order of their names
    expected: dict[str, set[str]] = {"hidden": {".git"}}
    for name, reason in left.items():
        expected.setdefault(reason, set()).add(name)
    assert {reason: set(names) for reason, names in reasons.items()} == expected
    with caplog.at_level(logging.WARNING, logger="pe_patch"):
        load_documents(tmp_path)
    assert "page.html" in caplog.text and "LICENSE" in caplog.text


def test_linked_folders_and_files_are_read_once(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    (outside / "deep").mkdir(parents=True)
    folder.mkdir()
    (outside / "deep" / "b.txt").write_text("linked")
    (outside / "single.txt").write_text("single")
    (folder / "a.txt").write_text("plain")
    os.symlink(outside / "deep", folder / "books")
    os.symlink(outside / "single.txt", folder / "one.txt")
    os.symlink(outside / "deep", folder / "zagain")
    os.symlink(folder, outside / "deep" / "loop")
    os.symlink(folder / "a.txt", folder / "same.txt")
    os.symlink(folder / "nothing.txt", folder / "broken.txt")
    documents, reasons = collect(folder)
    assert documents == ["plain", "linked", "single"]
    assert sorted(reasons["link to a file or folder that is read already"]) == ["books/loop", "same.txt", "zagain"]
    assert reasons["broken link"] == ["broken.txt"]
    link = tmp_path / "link"
    os.symlink(folder, link)
    assert load_documents(link) == documents


def test_lfs_pointers_are_refused_with_the_command_that_gets_the_file(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    for name in ("train.parquet", "rows.jsonl", "a.txt", "b.csv.gz", "c.json"):
        path = tmp_path / name
        path.write_text(pointer)
        with pytest.raises(TextSourceError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            load_documents(path)
    (tmp_path / "z.txt").write_text("fine")
    documents, reasons = collect(tmp_path, skip_unreadable=True)
    assert documents == ["fine"] and any("Git LFS pointer" in reason for reason in reasons)


# Rows


def write_rows(path: Path, values: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": value} for value in values]))
    else:
        write_parquet(path, text=values)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_null_names_its_row(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ["one", "two", None, "four"])
    with pytest.raises(TextSourceError, match=rf"text is null in row 3 of {path}.*skip_unreadable"):
        load_documents(path)
    documents, reasons = collect(path, skip_unreadable=True)
    assert documents == ["one", "two", "four"] and reasons == {"text is null": [f"{name}:2"]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_column_of_lists_is_not_text(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [["one", "two"], ["three"]])
    for skip in (False, True):  # another column is needed, so this is never skipped
        with pytest.raises(TextSourceError, match=r"row 1 of .* the column 'text' holds lists, not text.*text_column"):
            load_documents(path, skip_unreadable=skip)


def test_a_lone_surrogate_names_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(TextSourceError, match=r"row 2 of .*lone surrogate \\ud83d at character 5"):
        load_documents(path)
    documents, reasons = collect(path, skip_unreadable=True)
    assert documents == ["fine \U0001f600"] and reasons == {"lone surrogate": ["a.jsonl:1"]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "folder"])
def test_documents_that_are_all_empty_are_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for number in range(12):
            (path / f"{number}.txt").write_text("\n")
    else:
        write_rows(path, [""] * 12)
    with pytest.raises(TextSourceError, match="12 skipped, empty"):
        load_documents(path)


def test_empty_rows_are_listed(tmp_path: Path) -> None:
    documents, reasons = collect(write_rows(tmp_path / "a.jsonl", ["one", "", "three", " "]))
    assert documents == ["one", "three"] and reasons == {"empty": ["a.jsonl:1", "a.jsonl:3"]}


def test_text_that_looks_like_a_date_a_number_or_null_stays_text(tmp_path: Path) -> None:
    """The JSON reader of `datasets` makes datetimes of the first and its CSV reader makes null of the last."""
    values = ["2020-01-01", "12", "NA", "null", "1e5"]
    assert load_documents(write_rows(tmp_path / "a.jsonl", values)) == values
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([str(row), value] for row, value in enumerate(values))])
    assert load_documents(tmp_path / "a.csv") == values


@pytest.mark.parametrize("dialect", ["utf-8 with mark", "semicolons in cp1252", "unicode text", "sep line"])
def test_tables_from_excel(tmp_path: Path, dialect: str) -> None:
    delimiter, codec = {
        "utf-8 with mark": (",", "utf-8-sig"), "semicolons in cp1252": (";", "cp1252"),
        "unicode text": ("\t", "utf-16"), "sep line": (";", "utf-8"),
    }[dialect]  # fmt: skip
    path = tmp_path / "Book1.CSV"
    with path.open("w", encoding=codec, newline="") as file:
        if dialect == "sep line":
            file.write("sep=;\r\n")
        writer = csv.writer(file, dialect="excel", delimiter=delimiter)
        writer.writerows([["text", "other"], [FRENCH, "x"], ["a; b, c\td", "y"]])
    encoding = "cp1252" if codec == "cp1252" else None
    assert load_documents(path, encoding=encoding) == [FRENCH, "a; b, c\td"]
    with pytest.raises(TextSourceError, match=r"'body'; it has the columns text, other.*@text_column="):
        load_documents(path, text_column="body", encoding=encoding)


def test_json_lines_under_the_name_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert load_documents(path) == ["one", "two"]


def test_parquet_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "odd [name] *.parquet"
    write_parquet(path, id=list(range(60)), text=ROWS)
    theirs: Any = datasets.Dataset.from_parquet(str(shutil.copy(path, tmp_path / "b.parquet")))
    assert load_documents(path) == list(theirs["text"]) == ROWS
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(TextSourceError, match=r"odd \[name\]"):
        load_documents(path)


# Splits


def test_a_cloned_data_set_is_read_by_its_own_splits(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "data").mkdir()
    splits = {"train": ROWS[:30], "validation": ROWS[30:40], "test": ROWS[40:]}
    for name, rows in splits.items():
        write_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", text=rows)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (tmp_path / "extra.jsonl").write_text('{"text": "in no split"}\n')
    for split in ("train", "test"):
        theirs: Any = datasets.load_dataset("parquet", data_files=str(tmp_path / "data" / f"{split}-*"), split="train")
        assert load_documents(tmp_path, split=split) == list(theirs["text"])
    _, reasons = collect(tmp_path, split="train")
    assert reasons["description of a data set"] == ["README.md"]
    assert [names for reason, names in reasons.items() if "no split" in reason] == [["extra.jsonl"]]
    assert held_out_split(tmp_path) == "test"
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    assert load_documents(tmp_path, split="test") == splits["validation"]


def test_the_splits_that_a_readme_declares(tmp_path: Path) -> None:
    for name, rows in {"first": ROWS[:50], "second": ROWS[50:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: first.jsonl\n"
        "  - split: test\n    path: second.jsonl\n---\n"
    )
    assert load_documents(tmp_path, split="train") == ROWS[:50] and load_documents(tmp_path, split="test") == ROWS[50:]


def test_words_in_the_names_of_code_and_prose_are_no_splits(tmp_path: Path) -> None:
    for name in ("train.py", "test_train.py", "core.py", "docs/testing/a.md", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    everything = load_documents(tmp_path)
    parts = [load_documents(tmp_path, split="train"), []]
    assert len(everything) == 5 and set(parts[0]) <= set(everything) and len(parts[0]) > 2
    assert held_out_split(tmp_path) is None


@pytest.mark.parametrize("splits", [["train"], ["train", "test"], ["train", "validation"]])
def test_folders_of_save_to_disk(tmp_path: Path, splits: list[str]) -> None:
    import datasets

    parts = {name: ROWS[20 * number : 20 * number + 20] for number, name in enumerate(splits)}
    tables = {name: datasets.Dataset.from_dict({"id": list(range(20)), "text": rows}) for name, rows in parts.items()}
    folder = tmp_path / "saved"
    (tables["train"] if len(splits) == 1 else datasets.DatasetDict(tables)).save_to_disk(str(folder))
    train, test = load_documents(folder, split="train"), load_documents(folder, split="test")
    if len(splits) == 1:
        assert sorted(train + test) == sorted(ROWS[:20]) and test
    else:
        assert train == parts["train"] and test == parts[splits[1]]
    assert held_out_split(folder) == (None if len(splits) == 1 else "test")
    moved = tmp_path / "elsewhere" / "saved"
    shutil.copytree(folder, moved)
    assert load_documents(moved, split="test") == test, "a folder that moves keeps its split"
    before = fingerprint(folder)
    assert manifest(folder) and all(name.endswith(".arrow") for name in manifest(folder))
    shutil.rmtree(folder)
    tables["train"].select(range(19)).save_to_disk(str(folder))
    assert fingerprint(folder) != before
    with pytest.raises(TextSourceError, match=r"'body'.*id, text"):
        load_documents(folder, text_column="body")


def test_a_source_carries_options_where_there_is_no_other_place_for_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": row}) + "\n" for row in ROWS))
    plain = load_documents(path, split="test", text_column="body")
    assert load_documents(f"{path}@split=test,text_column=body") == plain
    assert load_documents(with_options(str(path), split="test", text_column="body", encoding=None)) == plain
    assert with_options(f"{path}@split=train", split="test") == f"{path}@split=train"
    assert held_out_split(f"{path}@split=test") == held_out_split("stdlib") == held_out_split("owner/name") == "test"
    assert held_out_split(path) is None
    with pytest.raises(PePatchError, match=r"'colum'.*text_column"):
        load_documents(f"{path}@colum=body")
    strange = tmp_path / "what@split=test.txt"
    strange.write_text("a file of that name")
    assert load_documents(strange) == ["a file of that name"]


def test_what_evaluation_and_search_read_of_a_data_set_with_splits(tmp_path: Path) -> None:
    from pe_patch.evaluation.corpus import Corpus
    from pe_patch.search import objective

    from .evaluation_doubles import make_tokenizer

    for name in ("train", "test"):
        rows = [{"text": f"{name} the a for while return import class"}] * 5
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    assert all(text.startswith("test") for text in Corpus.load(tokenizer, str(tmp_path), 4).texts)
    assert all(text.startswith("train") for text in objective.load_corpus(tokenizer, str(tmp_path), 4).texts)


# How much is read


def test_text_files_of_the_other_split_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text(f"document {number}")
    test = load_documents(tmp_path, split="test")
    opened: list[str] = []
    inner = files_module._text
    monkeypatch.setattr(
        files_module, "_text", lambda path, encoding: (opened.append(path.name), inner(path, encoding))[1]
    )
    assert load_documents(tmp_path, split="test") == test
    assert len(opened) <= len(test) + 2 and len(set(opened)) == len(opened)
    opened.clear()
    stream = iter_documents(tmp_path, split="train")
    next(stream)
    assert len(opened) <= 2
