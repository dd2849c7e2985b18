"""Build the sequences of a source: packed documents, contiguous text, text in chunks, or text with hidden facts."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...evaluation.retrieval import make_sample, wording_for
from ..recipe import Phase, RecipeError, Source
from .corpus import Corpus
from .packing import pack
from .pose import check, draw_chunks

IGNORED = -100
"""Label of a token that is not a target, as in PyTorch and Transformers."""

LEARN_FROM = ("both", "text", "teacher")
"""The values of a source's `learn_from`, in the order of their numbers in a batch."""

STRETCH = 5
"""With PoSE, a document is split into stretches of this many sequence lengths; the authors use one at its start."""

Item = dict[str, np.ndarray]
"""`input_ids`, `labels` and `position_ids`, each [length], int64."""


class Text:
    """Sequences from the documents of one source that are long enough. Each row appears once per epoch.

    `documents` holds their numbers in the corpus, and `tokens` is their total length. A piece that continues a document
    begins with `start`, the tokens with which the tokenizer begins a text. Its first document token is no target: the
    row does not show the token before it.
    """

    def __init__(self, name: str, source: Source, phase: Phase, corpus: Corpus, tokenizer: Any) -> None:
        self.name, self.phase, self.corpus = name, phase, corpus
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.start = np.array(corpus.start, dtype=np.int64)
        if phase.length < len(self.start) + 2:
            raise RecipeError(
                f"length is {phase.length}; a row needs {len(self.start)} start tokens and two tokens of text."
            )
        self.documents = self._long_enough(self.least(source))
        self.tokens = int(self.lengths.sum())
        if not self.tokens:
            raise RecipeError(f"mixture.{name}: {corpus.name} has no tokens.")

    def least(self, source: Source) -> int:
        """Return the minimum length in tokens of a usable document."""
        return source.min_length or 0

    @property
    def lengths(self) -> np.ndarray:
        return self.corpus.lengths[self.documents]

    @property
    def trained_tokens(self) -> float:
        """Mean number of document tokens in a sequence."""
        return self.phase.length

    def __len__(self) -> int:
        """Return the number of sequences in an epoch."""
        raise NotImplementedError

    def size(self, row: int) -> int:
        """Return the number of tokens in a sequence, without its padding."""
        return self.phase.length

    def item(self, row: int, rng: np.random.Generator) -> Item:
        raise NotImplementedError

    def _long_enough(self, least: int) -> np.ndarray:
        lengths = self.corpus.lengths
        chosen = np.flatnonzero(lengths >= least)
        if len(chosen):
            return chosen
        key = f"mixture.{self.name}.min_length" if least > self.phase.length or not self.phase.pose else "length"
        raise RecipeError(
            f"mixture.{self.name}: no document of {self.corpus.name} has {least:,} tokens. The longest has "
            f"{lengths.max():,}; there are {len(lengths):,} documents with {lengths.sum():,} tokens. Lower {key}, or "
            f"give longer documents with mixture.{self.name}.source."
        )


class Packed(Text):
    """Whole documents, packed best-fit. Positions restart at each document."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rows = pack(self.lengths, self.phase.length, len(self.start))
        if self.lengths.max() < 2:
            raise RecipeError(
                f"mixture.{self.name}: no document of {self.corpus.name} has two tokens, so no token can be predicted. "
                "Give longer documents, or data.boundaries=false."
            )

    @property
    def trained_tokens(self) -> float:
        return self.tokens / len(self)

    def __len__(self) -> int:
        return len(self.rows)

    def size(self, row: int) -> int:
        return sum(int(stop - begin) + len(self.start) * bool(begin) for _, begin, stop in self.rows[row])

    def item(self, row: int, rng: np.random.Generator) -> Item:
        length, offsets, stream = self.phase.length, self.corpus.offsets, self.corpus.stream
        ids, positions = np.full(length, self.pad, dtype=np.int64), np.zeros(length, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        at = 0
        for document, begin, stop in self.rows[row]:
            first = offsets[self.documents[document]]
            start = self.start if begin else self.start[:0]
            piece = np.concatenate([start, stream[first + begin : first + stop]])
            place = slice(at, at + len(piece))
            ids[place], positions[place] = piece, np.arange(len(piece))
            labels[place] = piece
            labels[at : at + len(start) + 1] = IGNORED
            at += len(piece)
        positions[at:] = np.arange(length - at)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


class Contiguous(Text):
    """Documents end to end, cut into sequences; an incomplete last sequence is dropped.

    With start tokens, sequences begin `length - len(start)` tokens apart. One that begins inside a document gets the
    start tokens in front; one that begins with a document has its own, and shares its last tokens with the next one.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ends = np.cumsum(self.lengths)
        self.stride = self.phase.length - len(self.start)
        if not len(self):
            raise RecipeError(
                f"mixture.{self.name}: {self.corpus.name} has {self.tokens:,} tokens, fewer than one sequence of "
                f"{self.phase.length:,}."
            )

    def __len__(self) -> int:
        return max(0, self.tokens - len(self.start)) // self.stride

    def item(self, row: int, rng: np.random.Generator) -> Item:
        begin, length, count = row * self.stride, self.phase.length, len(self.start)
        index = int(np.searchsorted(self.ends, begin, side="right"))
        at_document = begin == self.ends[index] - self.lengths[index]
        if at_document or not count:
            ids = self._tokens(begin, length)
            labels = ids.copy()
            labels[0] = IGNORED
            labels[length - count + 1 :] = IGNORED  # targets of the next sequence
        else:
            ids = np.concatenate([self.start, self._tokens(begin, self.stride)])
            labels = ids.copy()
            labels[: count + 1] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": np.arange(length)}

    def _tokens(self, begin: int, count: int) -> np.ndarray:
        """Return `count` tokens from a place in the joined documents."""
        texts, at = [], begin
        while at < begin + count:
            index = int(np.searchsorted(self.ends, at, side="right"))
            stop = min(int(self.ends[index]), begin + count)
            end = int(self.corpus.offsets[self.documents[index] + 1])
            texts.append(self.corpus.stream[end - int(self.ends[index]) + at :][: stop - at])
            at = stop
        return np.concatenate(texts).astype(np.int64)


class Skipping(Text):
    """Chunks of one document, with gaps in text and positions between them (PoSE).

    The label of a chunk's first token is ignored if text was skipped before it, because the sequence does not predict
    that token. The authors' code trains it.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        assert self.phase.pose is not None
        length = self.phase.length
        check(length - len(self.start), self.phase.pose.target, self.phase.pose.chunks)
        whole, rest = np.divmod(self.lengths, STRETCH * length)
        # A rest that is too short for a sequence belongs to the previous stretch.
        counts = np.where((rest >= length) | (whole == 0), whole + 1, whole)
        self.document = np.repeat(np.arange(len(counts)), counts)
        self.begin = (np.arange(len(self.document)) - np.repeat(np.cumsum(counts) - counts, counts)) * STRETCH * length
        last = np.append(self.document[1:] != self.document[:-1], True)
        self.stop = np.where(last, self.lengths[self.document], self.begin + STRETCH * length)

    def least(self, source: Source) -> int:
        return max(super().least(source), self.phase.length)

    def __len__(self) -> int:
        return len(self.document)

    def item(self, row: int, rng: np.random.Generator) -> Item:
        begin, room = int(self.begin[row]), int(self.stop[row] - self.begin[row])
        start = self.start if begin else self.start[:0]
        drawn = _chunks(self.phase, room, rng, len(start))
        at = int(self.corpus.offsets[self.documents[self.document[row]]]) + begin
        text = self.corpus.stream[at : at + room][drawn.tokens].astype(np.int64)
        ids, torn = np.concatenate([start, text]), np.concatenate([start >= 0, drawn.torn])
        labels = np.where(torn, IGNORED, ids)
        labels[len(start)] = IGNORED
        positions = np.concatenate([np.arange(len(start)), drawn.positions + len(start)])
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


class Needles(Text):
    """Text with hidden facts, and questions about them at its end. With PoSE, positions skip."""

    def __init__(self, name: str, source: Source, phase: Phase, corpus: Corpus, tokenizer: Any) -> None:
        super().__init__(name, source, phase, corpus, tokenizer)
        self.source, self.tokenizer, self.wording = source, tokenizer, wording_for(tokenizer)

    def least(self, source: Source) -> int:
        if source.min_length is not None:
            raise RecipeError(
                f"mixture.{self.name}.min_length has no effect on needles, which are hidden anywhere in the text. "
                "Remove it."
            )
        return 0

    def __len__(self) -> int:
        return 1  # each sequence is drawn independently

    def item(self, row: int, rng: np.random.Generator) -> Item:
        source, length = self.source, self.phase.length
        count = int(rng.integers(source.needles[0], source.needles[1] + 1))
        sample = make_sample(
            self.tokenizer,
            self.corpus.stream,
            self.wording,
            length=length,
            needles=count,
            queries=count,
            rng=rng,
            answer_in_sequence=True,
            head=self.start,
        )
        order = _shuffled_pairs(length, count if self.wording.name == "tokens" else 0, rng)
        ids, is_answer = sample.input_ids[order], sample.is_answer[order]
        is_target = is_answer if source.targets == "answers" else ~sample.is_needle[order]
        labels = np.where(is_target, ids, IGNORED)
        labels[0] = IGNORED
        positions = np.arange(length) if self.phase.pose is None else _chunks(self.phase, length, rng).positions
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def _chunks(phase: Phase, room: int, rng: np.random.Generator, start: int = 0) -> Any:
    """Draw the chunks of a sequence of which `start` tokens and positions are taken."""
    assert phase.pose is not None

    def draw(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    return draw_chunks(phase.length - start, room, phase.pose.target - start, phase.pose.chunks, draw)


def _shuffled_pairs(length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the order `[length]` that shuffles the last `count` pairs of tokens: question and answer, for `tokens`.

    `make_sample` asks in the order in which it drew the facts. If there is no text between them, this is also their
    order in the sequence, and a model would learn to copy from a fixed distance instead of finding the key.
    """
    pairs = np.arange(length - 2 * count, length).reshape(count, 2)
    return np.concatenate([np.arange(length - 2 * count), pairs[rng.permutation(count)].ravel()])


def kind_of(source: Source, phase: Phase, boundaries: bool) -> type[Text]:
    """Return the class that builds the sequences of a source."""
    text = Skipping if phase.pose is not None else Packed if boundaries else Contiguous
    return {"text": text, "needles": Needles}[source.kind]
