"""Documents are read from the given source, and a missing source raises a clear error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pe_patch.data.files import Reading
from pe_patch.data.text import TextSourceError, load_documents
from pe_patch.errors import PePatchError

ROWS = [f"document number {number}" for number in range(60)]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS))


def write_csv(path: Path) -> None:
    path.write_text("id,text\n" + "".join(f'{number},"{row}"\n' for number, row in enumerate(ROWS)))


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(60)), "text": ROWS}), path)


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_tables(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    assert load_documents(path) == ROWS
    assert load_documents(path, limit=7) == ROWS[:7]
    train, test = load_documents(path, split="train"), load_documents(path, split="test")
    assert sorted(train + test) == sorted(ROWS) and 0 < len(test) < 20
    if suffix != ".json":  # its rows are bare strings
        with pytest.raises(TextSourceError, match=r"'body'.*text"):
            load_documents(path, text_column="body")


def test_a_table_is_read_as_it_was_written_however_long_its_documents(tmp_path: Path) -> None:
    long = 'a "quoted" line,\n' * 20_000
    path = tmp_path / "long.csv"
    path.write_text('text\n"' + long.replace('"', '""') + '"\nshort\n')
    assert load_documents(path) == [long, "short"]


def test_folder_is_read_in_order_without_hidden_binary_or_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    files = {"b/two.md": b"two", "a.txt": b"one", "z.py": b"three", ".git/x.txt": b"no", "c.bin": b"no"}
    for name, content in {**files, "empty.txt": b""}.items():
        (tmp_path / name).write_bytes(content)
    assert load_documents(tmp_path) == ["one", "two", "three"]


def test_a_documents_split_does_not_depend_on_the_others(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    test = set(load_documents(tmp_path, split="test"))
    for number in range(0, 100, 3):
        (tmp_path / f"{number}.txt").unlink()
    assert set(load_documents(tmp_path, split="test")) == {text for text in test if int(text.split()[1]) % 3}


def test_a_single_document_is_cut_for_its_split(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("0123456789" * 10)
    assert load_documents(path, split="train") == ["0123456789" * 9]
    assert load_documents(path, split="test") == ["0123456789"]


def test_stdlib() -> None:
    train, test = load_documents("stdlib", split="train"), load_documents("stdlib", split="test")
    assert len(train) > 200 and 0.03 < len(test) / len(train) < 0.3
    assert not set(train) & set(test)
    assert any("class JSONDecoder" in text for text in train + test)
    assert not any("class Test_" in text and "unittest.main()" in text for text in train + test)


def test_hub_rows_keep_the_splits_of_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `datasets` reads a local folder by the same call as a hub name; text.py would read a folder itself.
    from pe_patch.data import text

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for split, rows in {"train": ROWS[:40], "validation": ROWS[40:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

    def read(split: Any) -> list[str]:
        return [value for _, value in text._from_hub(str(folder), split, Reading(), streaming=True)]

    assert read("train") == ROWS[:40]
    assert read("test") == ROWS[40:]


@pytest.mark.parametrize("source", ["./no/such/folder", "/no/such/place", "missing.txt", "a b c"])
def test_missing_sources_say_what_was_looked_for(source: str) -> None:
    with pytest.raises(TextSourceError) as caught:
        load_documents(source)
    assert str(Path(source).absolute()) in str(caught.value) and "'stdlib'" in str(caught.value)
    assert isinstance(caught.value, PePatchError) and isinstance(caught.value, FileNotFoundError)


def test_a_name_that_is_neither_here_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(TextSourceError, match=r"no data set 'someone/books'.*no network"):
        load_documents("someone/books")


def test_a_data_set_made_by_a_script_says_how_to_read_it(tmp_path: Path) -> None:
    from pe_patch.data import text

    # `datasets` itself refuses the script, as it does that of a repository on the hub.
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "books.py").write_text("raise SystemExit('ran')")
    (tmp_path / "books" / "a.txt").write_text("text")
    with pytest.raises(TextSourceError, match=r"made by a loading script.*Convert it to Parquet.*refs/convert/parquet"):
        text._from_hub(str(tmp_path / "books"), None, Reading(), streaming=True)


def test_wrong_arguments(tmp_path: Path) -> None:
    no_split: Any = "dev"
    with pytest.raises(PePatchError, match="split"):
        load_documents("stdlib", split=no_split)
    with pytest.raises(PePatchError, match="limit"):
        load_documents("stdlib", limit=0)
    with pytest.raises(TextSourceError, match="has no text"):
        load_documents(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(TextSourceError, match=r"not a supported text file"):
        load_documents(tmp_path / "model.bin")


def test_datasets_is_not_imported_with_the_package() -> None:
    code = "import sys, pe_patch, pe_patch.data.text; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
