"""Which tokens are trained on at which step: packed text, and text with facts hidden in it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count as count_up
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pe_patch.evaluation.retrieval import make_sample, wording_for

from .recipe import Phase, RecipeError, Source

IGNORED = -100
"""The label of a token that is no target, as PyTorch and Transformers have it."""

Piece = tuple[int, int, int]
"""A document's number, and where in it a stretch of tokens starts and stops."""


class Corpus:
    """The tokens of a set of documents: `documents`, one array each, and `stream`, all of them end to end."""

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        self.documents = list(tokenised(texts, tokenizer))
        self.stream = np.concatenate(self.documents)


def tokenised(texts: Sequence[str], tokenizer: Any, chunk: int = 256) -> Iterator[np.ndarray]:
    """The ids of each text [n], int32, with the start token the tokenizer sets and an end token."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for first in range(0, len(texts), chunk):
        # verbose=False: a document is meant to be longer than the tokenizer's own limit
        for ids in tokenizer(list(texts[first : first + chunk]), verbose=False)["input_ids"]:
            yield np.array(ids if end and ids[-1:] == end else ids + end, dtype=np.int32)


def pack(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Rows of at most `capacity` tokens; best-fit decreasing, so that a document is cut only where it must be.

    A document of more than `capacity` tokens fills whole rows, and its rest is packed as a document of its own.
    """
    rows: list[list[Piece]] = []
    rests: list[Piece] = []
    for document, length in enumerate(lengths):
        whole = length - length % capacity
        rows += [[(document, start, start + capacity)] for start in range(0, whole, capacity)]
        if length > whole:
            rests.append((document, whole, length))
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for piece in sorted(rests, key=lambda piece: piece[1] - piece[2]):
        size = piece[2] - piece[1]
        at = bisect_left(free, (size, -1))
        if at < len(free):
            room, row = free.pop(at)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        insort(free, (room - size, row))
    return rows


class PhaseData(Dataset[dict[str, np.ndarray]]):
    """The sequences of one phase; number `i` is the same whenever and wherever it is asked for.

    An item has `input_ids`, `labels` and `position_ids`, each [length]. Positions start again at every document, and a
    label is `IGNORED` at a document's first token, where it cannot be predicted, and in the padding.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, phase: Phase, *, seed: Sequence[int], boundaries: bool) -> None:
        self.corpus, self.tokenizer, self.phase, self.seed = corpus, tokenizer, phase, tuple(seed)
        self.boundaries, self.wording = boundaries, wording_for(tokenizer)
        sources = list(phase.mixture.values())
        self.sources = sources
        self.shares = np.array([source.share for source in sources]) / sum(source.share for source in sources)
        self.rows = self._rows() if any(source.kind == "text" for source in sources) else []
        self.order = lru_cache(maxsize=2)(self._order)
        self.make = {"text": self._text, "needles": self._needles}

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([*self.seed, number])
        source = self.sources[rng.choice(len(self.sources), p=self.shares)]
        return self.make[source.kind](number, source, rng)

    def _rows(self) -> list[list[Piece]]:
        length = self.phase.length
        if self.boundaries:
            rows = pack([len(document) for document in self.corpus.documents], length)
        else:
            rows = [[(-1, start, start + length)] for start in range(0, len(self.corpus.stream) - length + 1, length)]
        if not rows:
            raise RecipeError(f"The text has {len(self.corpus.stream)} tokens, less than one sequence of {length}.")
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([*self.seed, len(self.rows), epoch]).permutation(len(self.rows))

    def _text(self, number: int, source: Source, rng: np.random.Generator) -> dict[str, np.ndarray]:
        epoch, place = divmod(number, len(self.rows))
        row = self.rows[self.order(epoch)[place]]
        parts = [self._piece(*piece) for piece in row]
        padding = self.phase.length - sum(map(len, parts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = np.concatenate([*parts, np.full(padding, pad)]).astype(np.int64)
        sizes = [len(part) for part in parts] + [padding] * (padding > 0)
        labels = ids.copy()
        labels[np.cumsum([0, *sizes[:-1]])] = IGNORED
        labels[len(ids) - padding :] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": np.concatenate([np.arange(size) for size in sizes])}

    def _piece(self, document: int, start: int, stop: int) -> np.ndarray:
        return (self.corpus.stream if document < 0 else self.corpus.documents[document])[start:stop]

    def _needles(self, number: int, source: Source, rng: np.random.Generator) -> dict[str, np.ndarray]:
        count = int(rng.integers(source.needles[0], source.needles[1] + 1))
        length = self.phase.length
        sample = make_sample(
            self.tokenizer,
            self.corpus.stream,
            self.wording,
            length=length,
            needles=count,
            queries=count,
            rng=rng,
            answer_in_sequence=True,
        )
        order = _shuffled_pairs(length, count if self.wording.name == "tokens" else 0, rng)
        ids, is_answer = sample.input_ids[order], sample.is_answer[order]
        is_target = is_answer if source.targets == "answers" else ~sample.is_needle[order]
        labels = np.where(is_target, ids, IGNORED)
        labels[0] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": np.arange(len(ids))}


def _shuffled_pairs(length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """The order [length] that shuffles the last `count` pairs of tokens: in the `tokens` wording, question and answer.

    `make_sample` asks in the order in which it drew the facts, which is also the order they stand in where there is
    no text between them: a model would learn to copy from a fixed distance instead of looking for the key.
    """
    pairs = np.arange(length - 2 * count, length).reshape(count, 2)
    return np.concatenate([np.arange(length - 2 * count), pairs[rng.permutation(count)].ravel()])


def first_tokens(data: PhaseData, count: int) -> list[list[int]]:
    """The first `count` token ids of a phase's sequences, in rows of at most its length and without padding."""
    rows: list[list[int]] = []
    for number in count_up():
        item = data[number]
        stop = 1 + int(np.flatnonzero(item["labels"] != IGNORED)[-1])  # padding comes last and is no target
        rows.append(item["input_ids"][: min(stop, count)].tolist())
        count -= len(rows[-1])
        if count == 0:
            break
    return rows


def micro_batches(
    data: PhaseData, *, first_step: int, rank: int, world: int, workers: int = 0
) -> Iterator[list[dict[str, Tensor]]]:
    """For each step from `first_step` on, this process's share of the step's sequences, as micro-batches.

    Sequence `i` of step `s` has the number `s * batch + i`, however many processes there are.
    """
    phase = data.phase
    micro_batch = phase.micro_batch or max(1, phase.batch // world)
    accumulation, left = divmod(phase.batch, micro_batch * world)
    if left:
        raise RecipeError(
            f"A batch of {phase.batch} sequences cannot be shared by {world} processes in micro-batches of "
            f"{micro_batch}: {phase.batch} is no multiple of {micro_batch * world}."
        )
    numbers = [
        list(range(start + rank * micro_batch, start + (rank + 1) * micro_batch))
        for start in range(first_step * phase.batch, phase.steps * phase.batch, micro_batch * world)
    ]
    # A generator of its own: the loader would take its seed from the global one, and a resumed run would differ.
    loader = DataLoader(
        data,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(0),
    )
    batches = iter(loader)
    for _ in range(first_step, phase.steps):
        yield [next(batches) for _ in range(accumulation)]


def _collate(items: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}
