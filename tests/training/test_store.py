"""Text is tokenised once, found again by its content, cached completely or not at all, and never fully in memory."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pe_patch.data import files as files_module
from pe_patch.data.text import TextSourceError, fingerprint, iter_documents, load_documents
from pe_patch.training.data import Corpus, PhaseData, load_corpora, open_store, store
from pe_patch.training.data.corpus import BATCH, Tokeniser
from pe_patch.training.recipe import Data, RecipeError, Source

from .cases import phase

DOCUMENTS = [f"for {number} in " + "this that " * (number % 40) for number in range(300)]


@pytest.fixture
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "tokens").iterdir() if path.suffix != ".lock")


def expected(documents: list[str], tokenizer: Any) -> list[list[int]]:
    """The tokenizer's own ids, one text at a time, and its end token."""
    return [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in documents]


def check(found: Corpus, documents: list[str], tokenizer: Any) -> None:
    assert [ids.tolist() for ids in found.documents] == expected(documents, tokenizer)
    assert found.stream.tolist() == [token for ids in expected(documents, tokenizer) for token in ids]
    assert found.lengths.tolist() == list(map(len, expected(documents, tokenizer)))


def write(path: Path) -> Path:
    rows = [json.dumps({"body": text}) for text in DOCUMENTS]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(rows))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"body": DOCUMENTS}), path)
    else:
        path.mkdir()
        for number, text in enumerate(DOCUMENTS):
            (path / f"{number:03d}.txt").write_text(text)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "folder"])
def test_every_source_becomes_the_tokenizers_ids(tmp_path: Path, cache: Path, tokenizer: Any, name: str) -> None:
    source = str(write(tmp_path / name))
    check(open_store(source, tokenizer, split=None, text_column="body", cache=cache), DOCUMENTS, tokenizer)
    for split in ("train", "test"):
        documents = load_documents(source, split=split, text_column="body")
        check(open_store(source, tokenizer, split=split, text_column="body", cache=cache), documents, tokenizer)
    some = open_store(source, tokenizer, split=None, text_column="body", limit=7, cache=cache)
    check(some, DOCUMENTS[:7], tokenizer)
    assert isinstance(some.stream, np.memmap) and not some.stream.flags.writeable
    with pytest.raises(TextSourceError, match="no/such"):
        open_store("./no/such/folder", tokenizer, cache=cache)


def test_a_hub_data_set_is_known_by_its_revision(
    tmp_path: Path, cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    folder, load, seen = tmp_path / "data", datasets.load_dataset, []
    folder.mkdir()
    write(folder / "train.jsonl")

    class Builder:
        hash = "5f0c"

    def load_dataset(name: str, streaming: bool) -> Any:
        seen.append((name, streaming))
        return load(str(folder), streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: Builder)
    told: dict[str, Any] = {"split": None, "text_column": "body", "cache": cache}
    for streaming in (True, False):
        Builder.hash = f"{streaming}"
        found = open_store("someone/books", tokenizer, streaming=streaming, **told)
        check(found, DOCUMENTS, tokenizer)
        open_store("someone/books", tokenizer, streaming=streaming, **told)
    open_store("someone/books", tokenizer, limit=3, **told)
    assert seen == [("someone/books", True), ("someone/books", False), ("someone/books", True)]
    assert len(entries(cache)) == 3

    def offline(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    with pytest.raises(TextSourceError, match=r"'someone/books'.*no network"):
        open_store("someone/books", tokenizer, **told)


def test_an_entry_is_found_by_content_and_by_nothing_else(
    tmp_path: Path, cache: Path, tokenizer: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    build = store._build
    monkeypatch.setattr(store, "_build", lambda folder, *rest: (built.append(folder), build(folder, *rest))[1])
    first, second = write(tmp_path / "first"), write(tmp_path / "second")

    def made(source: Path = first, by: Any = tokenizer, **told: Any) -> bool:
        before = len(built)
        assert len(open_store(str(source), by, cache=cache, **told).stream)
        return len(built) > before

    assert made()
    assert not made() and not made(second)  # the same files in another folder
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=9)  # leaves its mark in the tokenizer
    assert not made() and not made(by=AutoTokenizer.from_pretrained(model))
    assert made(split="test") and made(limit=4) and made(text_column="other")
    larger = AutoTokenizer.from_pretrained(model)
    larger.add_tokens(["this that"])
    assert made(by=larger)
    ending = AutoTokenizer.from_pretrained(model)
    ending.eos_token = "<k0>"
    assert made(by=ending)
    starting = AutoTokenizer.from_pretrained(model)
    starting.bos_token = "<k1>"
    starting.add_bos_token = True
    assert starting("a")["input_ids"][0] == starting.bos_token_id
    assert made(by=starting)
    (first / "003.txt").write_text(DOCUMENTS[3] + ".")
    assert made()
    (first / "003.txt").write_text(DOCUMENTS[3])
    assert not made()
    (first / "003.txt").rename(first / "003b.txt")  # the split goes by names
    assert made()
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    assert made(second)
    assert len(entries(cache)) == len(built)


class Interrupted(Exception):
    pass


class Breaking:
    """A tokenizer that stops at its third batch."""

    def __init__(self, tokenizer: Any, error: BaseException) -> None:
        self.tokenizer, self.error, self.calls = tokenizer, error, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.calls += isinstance(texts, list)
        if self.calls > 2:
            raise self.error
        return self.tokenizer(texts, **options)


@pytest.mark.parametrize("error", [Interrupted(), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_breaks_leaves_nothing_and_what_was_killed_is_cleared(
    tmp_path: Path, cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr("pe_patch.training.data.corpus.BATCH", (64, 1 << 20))
    source = str(write(tmp_path / "folder"))
    kinds = (Interrupted, KeyboardInterrupt, RecipeError)
    with pytest.raises(kinds) as caught:
        open_store(source, Breaking(tokenizer, error), split=None, cache=cache)
    assert entries(cache) == []
    if isinstance(error, OSError):
        assert isinstance(caught.value, RecipeError) and "data.cache" in str(caught.value)
    folder = open_store(source, tokenizer, split=None, cache=cache).folder
    partial = folder.with_name(f"{folder.name}.partial")
    folder.rename(partial)  # as a process leaves it that was killed before the end
    with (partial / "tokens.bin").open("r+b") as tokens:
        tokens.truncate(1000)
    check(open_store(source, tokenizer, split=None, cache=cache), DOCUMENTS, tokenizer)
    assert entries(cache) == [folder.name]


def _open(source: str, model: Path, cache: Path, start: Any, results: Any) -> None:
    tokenizer, built = AutoTokenizer.from_pretrained(model), []
    build = store._build
    store._build = lambda *given: (built.append(1), build(*given))[1]
    start.wait()
    found = open_store(source, tokenizer, split=None, cache=cache)
    results.put((len(built), int(found.stream.sum()), len(found.documents)))


def test_of_two_processes_one_tokenises(
    tmp_path: Path, cache: Path, tokenizer: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()
    source = str(write(tmp_path / "folder"))
    processes = [context.Process(target=_open, args=(source, model, cache, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(built for built, _, _ in found) == [0, 0, 1]
    ids = expected(DOCUMENTS, tokenizer)
    assert {(tokens, documents) for _, tokens, documents in found} == {(sum(map(sum, ids)), len(ids))}


def test_damaged_entries_and_unusable_folders_are_reported(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    source = str(write(tmp_path / "folder"))
    folder = open_store(source, tokenizer, cache=cache).folder
    with (folder / "tokens.bin").open("r+b") as tokens:
        tokens.truncate(1000)
    with pytest.raises(RecipeError, match=rf"{folder}.*damaged.*1,000 bytes"):
        open_store(source, tokenizer, cache=cache)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"data\.cache"):
        open_store(source, tokenizer, cache=tmp_path / "file")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "cut')
    with pytest.raises(TextSourceError, match="line 2"):
        open_store(str(tmp_path / "bad.jsonl"), tokenizer, split=None, cache=cache)
    assert entries(cache) == [folder.name]


def test_progress_is_shown_while_tokenising_and_not_for_a_cached_entry(
    tmp_path: Path, cache: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write(tmp_path / "f"))
    tokens = sum(map(len, expected(DOCUMENTS, tokenizer)))
    open_store(source, tokenizer, split=None, cache=cache, progress=True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"300 documents, {tokens:,} tokens" in said and "tokens/s" in said
    open_store(source, tokenizer, split=None, cache=cache, progress=True)
    assert capsys.readouterr().err == ""


def test_where_it_is_kept(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write(tmp_path / "folder"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_store(source, tokenizer).folder.parent == tmp_path / "xdg" / "pe_patch" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store(source, tokenizer).folder.parent == tmp_path / ".cache" / "pe_patch" / "tokens"


class OneEach:
    """A tokenizer that makes one token of every text."""

    eos_token_id = None

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        return {"input_ids": [7] if isinstance(texts, str) else [[7]] * len(texts)}


def test_documents_are_read_on_demand(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read, given = 0, 0

    def rows(path: Path, reading: Any) -> Iterator[tuple[str, str]]:
        nonlocal read
        for number in range(4 * BATCH[0]):
            read += 1
            yield f"for {number}", f"row {number}"

    monkeypatch.setitem(files_module.TABLES, ".jsonl", rows)
    (tmp_path / "rows.jsonl").write_text("")
    for batch in Tokeniser(tokenizer)(iter_documents(tmp_path)):
        given += len(batch)
        assert len(batch) <= BATCH[0] and read <= given + 2
    assert read == given == 4 * BATCH[0]
    monkeypatch.setattr("pe_patch.training.data.corpus.PIECE", BATCH[1])
    long = ["x" * (BATCH[1] // 2)] * 5
    assert [len(batch) for batch in Tokeniser(OneEach())(iter(long))] == [2, 2, 1]


def test_a_fingerprint_does_not_read_what_it_names_as_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("no JSON")
    (tmp_path / "picture.png").write_bytes(b"1")
    before = fingerprint(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"2")  # no text, so it does not count
    assert fingerprint(tmp_path) == before != fingerprint(tmp_path, limit=3)
    (tmp_path / "rows.jsonl").write_text("no JSON.")
    assert fingerprint(tmp_path) != before
    with pytest.raises(TextSourceError, match="no/such"):
        fingerprint("./no/such")


def test_the_sources_of_a_mixture_are_opened_once_each(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    folder, rows = str(write(tmp_path / "folder")), str(write(tmp_path / "rows.jsonl"))
    mixture = {
        "plain": Source(share=1),
        "same": Source(share=1, source=folder),
        "rows": Source(share=1, source=rows, text_column="body"),
        "needles": Source(share=1, kind="needles"),
    }
    data = Data(source=folder, cache=str(cache))
    corpora = load_corpora(data, [phase(mixture=mixture)], tokenizer, progress=False)
    assert corpora[None, None] is corpora[folder, None] and len(corpora) == 3
    assert corpora[rows, "body"].name == rows
    assert len(entries(cache)) == 2
    shown = PhaseData(corpora, tokenizer, phase(mixture=mixture), seed=(0,), boundaries=True)
    assert [source.corpus for source in shown.sources] == [
        corpora[None, None], corpora[None, None], corpora[rows, "body"], corpora[None, None]
    ]  # fmt: skip


def test_sequences_are_the_same_from_disk_and_from_memory_and_in_a_worker(
    tmp_path: Path, cache: Path, tokenizer: Any
) -> None:
    folder = str(write(tmp_path / "folder"))
    stored = open_store(folder, tokenizer, split=None, cache=cache)
    mixture = {"text": Source(share=0.5), "needles": Source(share=0.5, kind="needles", needles=(1, 3))}
    options: dict[str, Any] = {"seed": (0, 0), "boundaries": True}
    mapped = PhaseData(stored, tokenizer, phase(mixture=mixture), **options)
    memory = PhaseData(Corpus(DOCUMENTS, tokenizer), tokenizer, phase(mixture=mixture), **options)
    assert len(pickle.dumps(stored)) < 1000
    sent = pickle.loads(pickle.dumps(mapped))
    for number in (17, 0, 90, 3):
        item = memory[number]
        for other in (mapped[number], sent[number]):
            assert all(np.array_equal(item[key], other[key]) for key in item)
