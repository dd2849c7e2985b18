"""The tokens of a set of documents, end to end in one array."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..recipe import RecipeError

BATCH = (256, 1 << 20)
"""The most documents and characters that are tokenised at once."""

TOKENS, OFFSETS, FACTS = "tokens.bin", "offsets.bin", "facts.json"
"""The files of a corpus on disk: int32 ids, int64 offsets of the documents in them, and what it was made of."""


class Corpus:
    """Documents in memory: `stream` [tokens], int32, and in it their bounds, `offsets` [documents + 1].

    `name` is what messages call the text by.
    """

    stream: np.ndarray
    offsets: np.ndarray

    def __init__(self, texts: Iterable[str], tokenizer: Any, name: str = "the text") -> None:
        documents = [ids for batch in tokenised(texts, tokenizer) for ids in batch]
        self.name = name
        self.stream = np.concatenate(documents)
        self.offsets = np.cumsum([0, *map(len, documents)])

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each document [documents], int64."""
        return np.diff(self.offsets)

    @property
    def documents(self) -> Sequence[np.ndarray]:
        """The tokens of each document, read when it is asked for."""
        return _Documents(self)


class StoredCorpus(Corpus):
    """Documents on disk: the arrays are maps of the files, and nothing is read before it is used."""

    def __init__(self, folder: Path, name: str) -> None:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.folder, self.name = folder, name
        self.stream = _mapped(folder / TOKENS, np.int32, facts["tokens"])
        self.offsets = _mapped(folder / OFFSETS, np.int64, facts["documents"] + 1)

    def __reduce__(self) -> tuple[Any, ...]:
        # A map would be pickled as the numbers in it, and go to every worker whole.
        return StoredCorpus, (self.folder, self.name)


class _Documents(Sequence[np.ndarray]):
    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def __len__(self) -> int:
        return len(self.corpus.offsets) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        start, stop = self.corpus.offsets[range(len(self))[number] :][:2]
        return self.corpus.stream[start:stop]


def _mapped(path: Path, kind: Any, count: int) -> np.ndarray:
    there = path.stat().st_size if path.exists() else 0
    if there != count * np.dtype(kind).itemsize:
        raise RecipeError(
            f"The tokenised text in {path.parent} is damaged: {path.name} has {there:,} bytes, "
            f"{count * np.dtype(kind).itemsize:,} were written. Delete the folder; it is made again."
        )
    return np.memmap(path, dtype=kind, mode="r", shape=(count,))


def tokenised(texts: Iterable[str], tokenizer: Any) -> Iterator[list[np.ndarray]]:
    """The ids of each text [n], int32, in batches, with the start token the tokenizer sets and an end token."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for batch in _batches(texts):
        # verbose=False: a document is meant to be longer than the tokenizer's own limit
        rows = tokenizer(batch, verbose=False, return_attention_mask=False)["input_ids"]
        yield [np.array(ids if end and ids[-1:] == end else ids + end, dtype=np.int32) for ids in rows]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters, (most, room) = 0, BATCH
    for text in texts:
        if batch and (len(batch) == most or characters + len(text) > room):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch
