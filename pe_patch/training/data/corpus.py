"""Hold the tokens of a set of documents, end to end in one array."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..recipe import RecipeError

BATCH = (256, 1 << 20)
"""Maximum number of documents and of characters per tokeniser call."""

TOKENS, OFFSETS, FACTS = "tokens.bin", "offsets.bin", "facts.json"
"""Files of a corpus on disk: int32 ids, int64 document offsets, and a description."""


class Corpus:
    """Documents in memory.

    `stream` holds the tokens end to end, int32 `[tokens]`, and `offsets` the bounds of the documents in it,
    `[documents + 1]`. `name` is the name of the text in messages.
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
        """Tokens in each document, int64 `[documents]`."""
        return np.diff(self.offsets)

    @property
    def documents(self) -> Sequence[np.ndarray]:
        """The token ids of each document, read on access."""
        return _Documents(self)


class StoredCorpus(Corpus):
    """Documents on disk. The arrays are memory-mapped files."""

    def __init__(self, folder: Path, name: str) -> None:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.folder, self.name = folder, name
        self.stream = _mapped(folder / TOKENS, np.int32, facts["tokens"])
        self.offsets = _mapped(folder / OFFSETS, np.int64, facts["documents"] + 1)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling a memory map would copy all its data to every worker.
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
    size = path.stat().st_size if path.exists() else 0
    if size != count * np.dtype(kind).itemsize:
        raise RecipeError(
            f"The tokenised text in {path.parent} is damaged: {path.name} has {size:,} bytes instead of "
            f"{count * np.dtype(kind).itemsize:,}. Delete the folder, and rerun to build it again."
        )
    return np.memmap(path, dtype=kind, mode="r", shape=(count,))


def tokenised(texts: Iterable[str], tokenizer: Any) -> Iterator[list[np.ndarray]]:
    """Yield batches of each text's token ids, int32 `[n]`, with the tokenizer's start token and an end token."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for batch in _batches(texts):
        # verbose=False: documents may exceed the tokenizer's length limit
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
