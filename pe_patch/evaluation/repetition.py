"""Measure how much a text repeats itself, and which rare words of its prompt it keeps in use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORD = re.compile(r"\w+|[^\w\s]")
LEAST_LETTERS = 4
"""Letters of a rare word."""
RARE_TEXTS = 0.02
"""Share of the texts that may have a rare word; one text always may."""
RARE_WORDS = 5e-4
"""Share of all words that a rare word may be."""


def words_of(text: str) -> list[str]:
    """Return the words and punctuation marks of a text in lower case."""
    return WORD.findall(text.casefold())


def distinct_share(words: Sequence[str], size: int) -> float:
    """Return the number of different n-grams over that of all n-grams; 0 for a text without any.

    Args:
        words: The words of a text.
        size: Words of an n-gram.

    Source: distinct-n of Li et al. 2016, arXiv 1510.03055, section 5.2.
    """
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def longest_repeat(words: Sequence[str]) -> int:
    """Return the number of words of the longest span that occurs twice without overlap."""
    low, high = 0, len(words) // 2
    while low < high:  # a repeated span of n words contains one of n - 1
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _repeats(words, middle) else (low, middle - 1)
    return low


def _repeats(words: Sequence[str], size: int) -> bool:
    first: dict[tuple[str, ...], int] = {}
    for place in range(len(words) - size + 1):
        if first.setdefault(tuple(words[place : place + size]), place) + size <= place:
            return True
    return False


@dataclass(frozen=True)
class WordCounts:
    """How often each word occurs in some texts, and in how many of them."""

    words: Counter[str]
    texts: Counter[str]
    size: int
    """Number of texts."""
    total: int
    """Number of words."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> WordCounts:
        """Count the words of texts."""
        words, holding, size = Counter[str](), Counter[str](), 0
        for text in texts:
            found = words_of(text)
            words.update(found)
            holding.update(set(found))
            size += 1
        return cls(words, holding, size, words.total())

    def is_rare(self, word: str) -> bool:
        """Return whether few texts have a word of letters, and few of all words are this one."""
        return (
            len(word) >= LEAST_LETTERS
            and word.isalpha()
            and self.texts[word] <= max(1, RARE_TEXTS * self.size)
            and self.words[word] <= max(1, RARE_WORDS * self.total)
        )


def rare_words(prompt: Sequence[str], counts: WordCounts) -> set[str]:
    """Return the rare words that a prompt uses at least twice.

    Args:
        prompt: The words of the prompt.
        counts: The counts of all texts, the prompt included.
    """
    return {word for word, count in Counter(prompt).items() if count > 1 and counts.is_rare(word)}
