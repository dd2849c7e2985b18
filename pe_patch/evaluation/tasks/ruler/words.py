"""RULER's two counting tasks: the most common words of a list, and the most frequent code words of a text."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ....errors import PePatchError
from .generator import Generator, Prompt, Sample, Tokens
from .material import invented, wonderwords
from .niah import SHORT
from .wording import Wording

COMMON = 10
CODE_LETTERS = 6
ZETA_2 = math.pi**2 / 6
"""The Riemann zeta function at 2, which normalizes the distribution k^-2."""


class CommonWords(Generator):
    """A generator whose unit is a different word of the list. The facts are the common words.

    `more_words` are the words for samples that need more than wonderwords has; None invents words.
    """

    budget = 120
    step = 10

    def __init__(
        self, tokens: Tokens, length: int, seed: int, wording: Wording, more_words: Sequence[str] | None = None
    ) -> None:
        super().__init__(tokens, length, seed)
        self.wording, self._more_words = wording, more_words
        self.words = list(wonderwords())
        random.Random(seed).shuffle(self.words)
        self.needed_more_words = False
        """True after a sample needed more words than wonderwords has."""

    def min_size(self, index: int) -> int:
        return COMMON

    def bounds(self) -> tuple[int, int]:
        tokens_per_word = self.trial(SHORT) / SHORT
        return self.step, max(int(self.length // tokens_per_word) * 2, 2 * self.step)

    def draw(self, size: int, index: int, facts: Any = None) -> Sample:
        short = self.length < SHORT
        example, solution = self._list(20, 3, 1) if short else self._list(40, 10, 3)
        context, common = self._list(size, 6, 1, facts) if short else self._list(size, 30, 3, facts)
        template, fields = self.wording.common_words, {"num_cw": COMMON, "query": ""}
        head = "".join(template.fill(context=example, **fields)) + " " + _numbered(solution) + "\n"
        text, prefix = template.fill(context=context, **fields)
        bare, _ = template.fill(context="", **fields)
        return Sample((Prompt(head + text, prefix, head + bare, tuple(common)),), size, common)

    def samples(self, count: int, exact_fit: bool = False) -> Iterator[Sample]:
        for sample in super().samples(count, exact_fit):
            self.needed_more_words |= sample.size > len(self.words)
            yield sample

    def _list(
        self, size: int, common_count: int, other_count: int, common: Sequence[str] | None = None
    ) -> tuple[str, list[str]]:
        """Return a numbered list and its common words.

        Args:
            size: the number of different words.
            common_count: the occurrences of each common word.
            other_count: the occurrences of each other word.
            common: the common words; None draws them.
        """
        source = self.words if size <= len(self.words) else self._more_words or invented()
        if size > len(source):
            raise PePatchError(
                f"The list needs {size} different words, but there are {len(source)}. Ask for a smaller length."
            )
        if common is None:
            drawn = self.draws.random.sample(source, size)
        else:
            drawn = [*common, *_without(common, self.draws.random.sample(source, size))][:size]
        words = drawn[:COMMON] * common_count + drawn[COMMON:] * other_count
        random.Random(self.seed).shuffle(words)
        return _numbered(words), drawn[:COMMON]


class FrequentWords(Generator):
    """A generator whose size n is the number of code words: word k occurs int(n k^-2 / zeta(2)) times.

    The facts are the vocabulary. The most frequent word is "...", which the question excludes; the next three are the
    answer.
    """

    budget = 50

    def __init__(self, tokens: Tokens, length: int, seed: int, wording: Wording) -> None:
        super().__init__(tokens, length, seed)
        self.wording, self.room = wording, length - self.budget
        self.step, self.kinds = self.room // 32, self.room // 50
        if self.kinds < 4:
            raise PePatchError(f"{length} tokens are too few for four different code words. Ask for at least 250.")

    def min_size(self, index: int) -> int:
        return math.ceil(16 * ZETA_2)  # the smallest size at which the fourth word occurs

    def search(self) -> int:
        """Increase the size in steps with one vocabulary until the text is too long, as RULER does."""
        size, vocabulary = self.room // CODE_LETTERS, self._new_vocabulary()
        while self.measure(self.draw(size, 0, vocabulary)) < self.room:
            size += self.step
            self.check_plausible(size)
        return size - self.step

    def sized(self, index: int, size: int) -> Sample:
        """Decrease the size in steps with one vocabulary until the text fits, as RULER does."""
        vocabulary = self._new_vocabulary()
        while size >= self.min_size(index):
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
        drawn: set[str] = set()
        while len(drawn) < self.kinds:
            drawn.add("".join(self.draws.random.choices(string.ascii_lowercase, k=CODE_LETTERS)))
        words = sorted(drawn)
        random.Random(self.seed).shuffle(words)
        return ["...", *words[1:]]


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _without(common: Sequence[str], drawn: Sequence[str]) -> list[str]:
    """Return the drawn words that are not common words."""
    return [word for word in drawn if word not in set(common)]
