"""RULER's two tasks of counting: the words that a list, and the code words that a text, holds most often."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ....errors import PePatchError
from .generator import Generator, Prompt, Sample, Tokens
from .material import invented, single
from .niah import SHORT
from .wording import Wording

COMMON = 10
CODE_LETTERS = 6
ZETA_2 = math.pi**2 / 6
"""Riemann's zeta function of 2, which normalises the distribution k^-2."""


class CommonWords(Generator):
    """The unit is a word of the list that comes up a few times. Facts are the common words.

    `many` is where words come from when wonderwords has too few.
    """

    budget = 120
    step = 10

    def __init__(
        self, tokens: Tokens, length: int, seed: int, wording: Wording, many: Sequence[str] | None = None
    ) -> None:
        super().__init__(tokens, length, seed)
        self.wording, self._many = wording, many
        self.words = list(single())
        random.Random(seed).shuffle(self.words)
        self.beyond = False
        """Whether a sample has needed more words than wonderwords has."""

    def least(self, index: int) -> int:
        return COMMON

    def bounds(self) -> tuple[int, int]:
        first = self.trial(SHORT) / SHORT
        return self.step, max(int(self.length // first) * 2, 2 * self.step)

    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        short = self.length < SHORT
        example, solution = self._list(20, 3, 1) if short else self._list(40, 10, 3)
        context, common = self._list(size, 6, 1, facts) if short else self._list(size, 30, 3, facts)
        asking, fields = self.wording.common_words, {"num_cw": COMMON, "query": ""}
        head = "".join(asking.fill(context=example, **fields)) + " " + _numbered(solution) + "\n"
        text, prefix = asking.fill(context=context, **fields)
        bare, _ = asking.fill(context="", **fields)
        return Sample((Prompt(head + text, prefix, head + bare, tuple(common)),), size, common)

    def samples(self, count: int, exact_fit: bool = False) -> Iterator[Sample]:
        for sample in super().samples(count, exact_fit):
            self.beyond |= sample.size > len(self.words)
            yield sample

    def _list(self, size: int, often: int, seldom: int, common: Sequence[str] | None = None) -> tuple[str, list[str]]:
        source = self.words if size <= len(self.words) else self._many or invented()
        if size > len(source):
            raise PePatchError(
                f"{size} different words are needed and there are {len(source)}. Ask for a lesser length."
            )
        if common is None:
            drawn = self.draws.random.sample(source, size)
        else:
            drawn = [*common, *_without(source, common, self.draws.random.sample(source, size))][:size]
        words = drawn[:COMMON] * often + drawn[COMMON:] * seldom
        random.Random(self.seed).shuffle(words)
        return _numbered(words), drawn[:COMMON]


class FrequentWords(Generator):
    """The unit is a code word before rounding: word k comes up int(n k^-2 / zeta(2)) times. Facts are the vocabulary.

    The most frequent one is "...", which the question says to leave out; the next three are the answer.
    """

    budget = 50

    def __init__(self, tokens: Tokens, length: int, seed: int, wording: Wording) -> None:
        super().__init__(tokens, length, seed)
        self.wording, self.room = wording, length - self.budget
        self.step, self.kinds = self.room // 32, self.room // 50
        if self.kinds < 4:
            raise PePatchError(f"{length} tokens are too few for four different code words. Ask for at least 250.")

    def least(self, index: int) -> int:
        return math.ceil(16 * ZETA_2)  # so that the fourth word comes up at all

    def search(self) -> int:
        """RULER's: upwards in steps with one vocabulary, until it is too long."""
        size, vocabulary = self.room // CODE_LETTERS, self._new_vocabulary()
        while self.measure(self.draw(size, 0, vocabulary)) < self.room:
            size += self.step
            self.plausible(size)
        return size - self.step

    def sized(self, index: int, size: int) -> Sample:
        """RULER's: downwards in steps, and the vocabulary stays."""
        vocabulary = self._new_vocabulary()
        while size >= self.least(index):
            sample = self.draw(size, index, vocabulary)
            if self.measure(sample) <= self.room:
                return sample
            size -= self.step
        self.endless += 1
        return self.fit(index, vocabulary)

    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        vocabulary = facts or self._new_vocabulary()
        counts = (size * np.arange(1.0, self.kinds + 1) ** -2.0 / ZETA_2).astype(int)
        words = [word for word, count in zip(vocabulary, counts, strict=False) for _ in range(count)]
        random.Random(self.seed).shuffle(words)
        text, prefix = self.wording.frequent_words.fill(context=" ".join(words), query="")
        bare, _ = self.wording.frequent_words.fill(context="", query="")
        return Sample((Prompt(text, prefix, bare, tuple(vocabulary[1:4])),), size, vocabulary)

    def _new_vocabulary(self) -> list[str]:
        found: set[str] = set()
        while len(found) < self.kinds:
            found.add("".join(self.draws.random.choices(string.ascii_lowercase, k=CODE_LETTERS)))
        words = sorted(found)
        random.Random(self.seed).shuffle(words)
        return ["...", *words[1:]]


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _without(source: Sequence[str], common: Sequence[str], drawn: Sequence[str]) -> list[str]:
    """The drawn words that are not among the common ones."""
    return [word for word in drawn if word not in set(common)]
