"""Hold the tokens of a set of documents, end to end in one array."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.text import Skipped
from ...data.tokens import PIECE, control_pattern, special_ids, text_ids
from ..recipe import RecipeError

BATCH = (256, 1 << 20)
"""Maximum number of documents and of characters per tokeniser call."""

TOKENS, OFFSETS, FACTS = "tokens.bin", "offsets.bin", "facts.json"
"""Files of a corpus on disk: int32 ids, int64 document offsets, and a description."""


class Corpus:
    """Documents in memory.

    Args:
        texts: the documents.
        tokenizer: the tokenizer of the model.
        name: the name of the text in messages.
        bos: begin each document as the tokenizer begins a text.
        split_special_tokens: read control tokens in the text as text.
    """

    stream: np.ndarray
    """The tokens end to end, int32 `[tokens]`."""
    offsets: np.ndarray
    """The bounds of the documents in `stream`, `[documents + 1]`."""
    start: Sequence[int]
    """The ids that every document begins with, and every training row has to; empty without `bos`."""
    largest_id: int
    files: dict[str, str]
    """The hash of each file of the source by its name; see `pe_patch.data.text.manifest`."""
    skipped: list[Skipped]
    control_tokens: dict[str, int]
    """Number of documents that have a control token in their text, by token."""

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Any,
        name: str = "the text",
        *,
        bos: bool = True,
        split_special_tokens: bool = True,
    ) -> None:
        reader = Tokeniser(tokenizer, bos=bos, split_special_tokens=split_special_tokens)
        documents = [ids for batch in reader(texts) for ids in batch]
        self.name, self.start = name, reader.start
        self.stream = np.concatenate(documents)
        self.offsets = np.cumsum([0, *map(len, documents)])
        self.largest_id, self.control_tokens = int(self.stream.max(initial=0)), dict(reader.control_tokens)
        self.split_special_tokens, self.files, self.skipped = split_special_tokens, {}, []

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each document, int64 `[documents]`."""
        return np.diff(self.offsets)

    @property
    def documents(self) -> Sequence[np.ndarray]:
        """The token ids of each document, read on access."""
        return _Documents(self)

    def notes(self) -> list[str]:
        """Return sentences on what was skipped and on control tokens in the text."""
        notes = [f"{self.name}: {record}." for record in self.skipped]
        if self.control_tokens:
            found = ", ".join(f"{token} in {count:,}" for token, count in self.control_tokens.items())
            read, other, value = ("plain text", "control tokens", "false")
            if not self.split_special_tokens:
                read, other, value = other, read, "true"
            notes.append(
                f"{self.name}: documents with the names of control tokens ({found}) are read as {read}; "
                f"data.split_special_tokens={value} reads them as {other}."
            )
        return notes


class StoredCorpus(Corpus):
    """Documents on disk. The arrays are memory-mapped files."""

    def __init__(self, folder: Path, name: str) -> None:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.folder, self.name, self.start = folder, name, facts["start"]
        self.stream = _mapped(folder / TOKENS, np.int32, facts["tokens"])
        self.offsets = _mapped(folder / OFFSETS, np.int64, facts["documents"] + 1)
        self.largest_id, self.control_tokens = facts["largest_id"], facts["control_tokens"]
        self.split_special_tokens, self.files = facts["split_special_tokens"], facts["files"]
        self.skipped = [Skipped(**record) for record in facts["skipped"]]

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


class Tokeniser:
    """Turns texts into batches of token ids, with the tokenizer's start tokens and an end token.

    Args:
        tokenizer: the tokenizer of the model.
        bos: begin each document as the tokenizer begins a text.
        split_special_tokens: read control tokens in the text as text.
    """

    def __init__(self, tokenizer: Any, *, bos: bool = True, split_special_tokens: bool = True) -> None:
        self.tokenizer, self.split = tokenizer, split_special_tokens
        before, after = special_ids(tokenizer)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.start: list[int] = before if bos else []
        self.end: list[int] = after if after[-1:] == end else after + end
        self.control = control_pattern(tokenizer)
        self.control_tokens: Counter[str] = Counter()

    def __call__(self, texts: Iterable[str]) -> Iterator[list[np.ndarray]]:
        """Yield batches of each text's token ids, int32 `[n]`."""
        for batch in _batches(texts):
            if self.control is not None:
                for text in batch:
                    self.control_tokens.update(set(self.control.findall(text)))
            yield [self._document(ids) for ids in self._ids(batch)]

    def _document(self, ids: Any) -> np.ndarray:
        ends = len(self.end) and list(ids[-len(self.end) :]) == self.end
        return np.concatenate([self.start, ids, [] if ends else self.end], dtype=np.int32, casting="unsafe")

    def _ids(self, batch: list[str]) -> list[Any]:
        if len(batch) == 1:  # a long text has a separate batch
            return [text_ids(self.tokenizer, batch[0], split_special_tokens=self.split)]
        # verbose=False: documents may exceed the tokenizer's length limit
        return self.tokenizer(
            batch, add_special_tokens=False, verbose=False, return_attention_mask=False, split_special_tokens=self.split
        )["input_ids"]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters, (most, room) = 0, BATCH
    for text in texts:
        if batch and (len(batch) == most or characters + len(text) > room or len(text) > PIECE):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
        if len(text) > PIECE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
