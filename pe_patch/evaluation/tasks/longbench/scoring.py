"""How LongBench judges answers (Bai et al. 2023, arXiv 2308.14508): one function for each of its metrics.

Each takes an answer and one right answer and gives 0 to 1. They follow the authors' own code to the number, its
oddities included; where one would surprise, a comment says so.
"""

from __future__ import annotations

import importlib
import logging
import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from ....errors import PePatchError

_FULL_WIDTH = (
    # The marks that the authors strip, as ranges of code points; two of their full-width set are left out by them.
    (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011),
    (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
)  # fmt: skip
_MARKS = str.maketrans("", "", string.punctuation)
_CHINESE_MARKS = _MARKS | {point: None for first, last in _FULL_WIDTH for point in range(first, last + 1)}


def needed(module: str) -> Any:
    """A module of the optional extra `longbench`, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PePatchError(
            f"This metric is computed by the package {module!r}, which is not installed. "
            "Run: pip install 'pe_patch[longbench]'"
        ) from error


def normalised(text: str) -> str:
    """Lower case, without punctuation, then without English articles, single spaces (as SQuAD does it)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_MARKS)).split())


def normalised_chinese(text: str) -> str:
    """Lower case, without punctuation and without any white space."""
    return "".join(text.lower().translate(_CHINESE_MARKS).split())


def overlap(given: Sequence[str], right: Sequence[str]) -> float:
    """F1 of two bags of tokens: the harmonic mean of the shares of them that are common."""
    common = sum((Counter(given) & Counter(right)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(right)
    return 2 * precision * recall / (precision + recall)


def answer_f1(given: str, right: str) -> float:
    """F1 of the words, both normalised."""
    return overlap(normalised(given).split(), normalised(right).split())


def answer_f1_chinese(given: str, right: str) -> float:
    """F1 of the words that jieba finds, each normalised."""
    return overlap(_chinese_words(given), _chinese_words(right))


def rouge(given: str, right: str) -> float:
    """ROUGE-L F of the package `rouge`; 0 where it refuses a pair (an answer of nothing but full stops)."""
    try:
        return float(needed("rouge").Rouge(metrics=["rouge-l"]).get_scores([given], [right])[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):
        # The package walks the common words by recursion and gives up on very long sentences; the authors count 0 too.
        return 0.0


def rouge_chinese(given: str, right: str) -> float:
    """ROUGE-L F of the words that jieba finds."""
    return rouge(" ".join(_cut(given)), " ".join(_cut(right)))


def numbers_right(given: str, right: str) -> float:
    """The share of the numbers in the answer that are the right one; 0 where it names none."""
    numbers = re.findall(r"\d+", given)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def paragraph_right(given: str, right: str) -> float:
    """As `numbers_right`, for a right answer such as "Paragraph 7"."""
    return numbers_right(given, _number_after("Paragraph ", right))


def paragraph_right_chinese(given: str, right: str) -> float:
    """As `numbers_right`, for a right answer such as "段落7"."""
    return numbers_right(given, _number_after("段落", right))


def line_similarity(given: str, right: str) -> float:
    """Similarity of the first line of code, in whole per cents: twice what matches / both lengths.

    Lines with a back-quote, `#` or `//` are passed over, an empty line is not; empty lines at the start are. `difflib`
    finds what matches, as it does in `fuzzywuzzy` with nothing but the authors' requirements installed; with
    `python-Levenshtein` beside it that package gives a little more.
    """
    lines = given.lstrip("\n").split("\n")
    line = next((each for each in lines if not any(mark in each for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, right).ratio()) / 100


def class_right(given: str, right: str, classes: Sequence[str]) -> float:
    """1 / the number of class names in the answer, if the right one is among them, else 0.

    Names that are part of the right one do not count, being named with it.
    """
    named = [name for name in classes if name in given]
    place = 0
    while place < len(named):
        if named[place] in right and named[place] != right:
            del named[place]
        place += 1  # after a removal too: the authors remove while they iterate, so that the next name is not looked at
    return 1 / len(named) if right in named else 0.0


def first_line(text: str) -> str:
    """The first line of an answer that is not empty."""
    return text.lstrip("\n").split("\n")[0]


def _number_after(word: str, right: str) -> str:
    found = re.search(re.escape(word) + r"(\d+)", right)
    if found is None:
        raise PePatchError(f"The right answer {right!r} has no number after {word!r}: these are not LongBench's rows.")
    return found.group(1)


def _cut(text: str) -> list[str]:
    jieba = needed("jieba")
    jieba.setLogLevel(logging.WARNING)  # it prints where it keeps its dictionary
    return list(jieba.cut(text, cut_all=False))


def _chinese_words(text: str) -> list[str]:
    return [word for word in map(normalised_chinese, _cut(text)) if word]
