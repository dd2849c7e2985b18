"""Build the sequences of a source: packed documents, contiguous text, text in chunks, or text with hidden facts."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...evaluation.retrieval import make_sample, wording_for
from ..recipe import Phase, RecipeError, Source
from .corpus import Corpus
from .packing import pack
from .pose import draw_chunks

IGNORED = -100
"""Label of a token that is not a target, as in PyTorch and Transformers."""

STRETCH = 5
"""With PoSE, a document is split into stretches of this many sequence lengths; the authors use one at its start."""

Item = dict[str, np.ndarray]
"""`input_ids`, `labels` and `position_ids`, each [length], int64."""


class Text:
    """Sequences from the documents of one source that are long enough. Each row appears once per epoch.

    `documents` holds their numbers in the corpus, and `tokens` is their total length.
    """

    def __init__(self, name: str, source: Source, phase: Phase, corpus: Corpus, tokenizer: Any) -> None:
        self.name, self.phase, self.corpus = name, phase, corpus
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
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
        self.rows = pack(self.lengths, self.phase.length)

    @property
    def trained_tokens(self) -> float:
        return self.tokens / len(self)

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, row: int, rng: np.random.Generator) -> Item:
        offsets, stream = self.corpus.offsets, self.corpus.stream
        pieces = [(offsets[self.documents[number]], start, stop) for number, start, stop in self.rows[row]]
        texts = [stream[at + start : at + stop] for at, start, stop in pieces]
        sizes = [len(text) for text in texts]
        padding = self.phase.length - sum(sizes)
        if padding:
            texts, sizes = [*texts, np.full(padding, self.pad)], [*sizes, padding]
        ids = np.concatenate(texts).astype(np.int64)
        labels = ids.copy()
        labels[np.cumsum([0, *sizes[:-1]])] = IGNORED
        labels[len(ids) - padding :] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": np.concatenate([np.arange(n) for n in sizes])}


class Contiguous(Text):
    """Documents end to end, cut every `length` tokens; an incomplete last sequence is dropped."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ends = np.cumsum(self.lengths)
        if not len(self):
            raise RecipeError(
                f"mixture.{self.name}: {self.corpus.name} has {self.tokens:,} tokens, fewer than one sequence of "
                f"{self.phase.length:,}."
            )

    def __len__(self) -> int:
        return self.tokens // self.phase.length

    def item(self, row: int, rng: np.random.Generator) -> Item:
        start, length = row * self.phase.length, self.phase.length
        texts, at = [], start
        while at < start + length:
            index = int(np.searchsorted(self.ends, at, side="right"))
            stop = min(int(self.ends[index]), start + length)
            end = int(self.corpus.offsets[self.documents[index] + 1])
            texts.append(self.corpus.stream[end - int(self.ends[index]) + at :][: stop - at])
            at = stop
        ids = np.concatenate(texts).astype(np.int64)
        labels = ids.copy()
        labels[0] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": np.arange(length)}


class Skipping(Text):
    """Chunks of one document, with gaps in text and positions between them (PoSE).

    The label of a chunk's first token is ignored if text was skipped before it, because the sequence does not predict
    that token. The authors' code trains it.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        length = self.phase.length
        whole, rest = np.divmod(self.lengths, STRETCH * length)
        # A rest that is too short for a sequence belongs to the previous stretch.
        counts = np.where((rest >= length) | (whole == 0), whole + 1, whole)
        self.document = np.repeat(np.arange(len(counts)), counts)
        self.start = (np.arange(len(self.document)) - np.repeat(np.cumsum(counts) - counts, counts)) * STRETCH * length
        last = np.append(self.document[1:] != self.document[:-1], True)
        self.stop = np.where(last, self.lengths[self.document], self.start + STRETCH * length)

    def least(self, source: Source) -> int:
        return max(super().least(source), self.phase.length)

    def __len__(self) -> int:
        return len(self.document)

    def item(self, row: int, rng: np.random.Generator) -> Item:
        assert self.phase.pose is not None
        start, room = int(self.start[row]), int(self.stop[row] - self.start[row])
        drawn = _chunks(self.phase, room, rng)
        at = int(self.corpus.offsets[self.documents[self.document[row]]]) + start
        ids = self.corpus.stream[at : at + room][drawn.tokens].astype(np.int64)
        labels = np.where(drawn.torn, IGNORED, ids)
        labels[0] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": drawn.positions}


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
        )
        order = _shuffled_pairs(length, count if self.wording.name == "tokens" else 0, rng)
        ids, is_answer = sample.input_ids[order], sample.is_answer[order]
        is_target = is_answer if source.targets == "answers" else ~sample.is_needle[order]
        labels = np.where(is_target, ids, IGNORED)
        labels[0] = IGNORED
        positions = np.arange(length) if self.phase.pose is None else _chunks(self.phase, length, rng).positions
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def _chunks(phase: Phase, room: int, rng: np.random.Generator) -> Any:
    assert phase.pose is not None
    return draw_chunks(
        phase.length, room, phase.pose.target, phase.pose.chunks, lambda low, high: int(rng.integers(low, high + 1))
    )


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
