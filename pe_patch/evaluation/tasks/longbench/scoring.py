"""Score answers as LongBench does, with one function for each metric.

Each function takes an answer and one right answer and returns 0 to 1. The functions give exactly the numbers of the
authors' code, including its quirks; comments mark surprising ones.

Source: Bai et al. 2023, arXiv 2308.14508, and the authors' code.
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
    # The punctuation marks that the authors strip, as ranges of code points. They omit two full-width marks.
    (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011),
    (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
)  # fmt: skip
_MARKS = str.maketrans("", "", string.punctuation)
_CHINESE_MARKS = _MARKS | {point: None for first, last in _FULL_WIDTH for point in range(first, last + 1)}


def import_optional(module: str) -> Any:
    """Import a module of the optional extra `eval`.

    Raises:
        PePatchError: if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PePatchError(
            f"This metric needs the package {module!r}, which is not installed. Run: pip install 'pe_patch[eval]'"
        ) from error


def normalised(text: str) -> str:
    """Return the text in lower case without punctuation, English articles and extra spaces, as in SQuAD."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_MARKS)).split())


def normalised_chinese(text: str) -> str:
    """Return the text in lower case without punctuation and white space."""
    return "".join(text.lower().translate(_CHINESE_MARKS).split())


def token_f1(given: Sequence[str], right: Sequence[str]) -> float:
    """Return the F1 of two bags of tokens: the harmonic mean of precision and recall."""
    common = sum((Counter(given) & Counter(right)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(right)
    return 2 * precision * recall / (precision + recall)


def answer_f1(given: str, right: str) -> float:
    """Return the F1 of the normalized words."""
    return token_f1(normalised(given).split(), normalised(right).split())


def answer_f1_chinese(given: str, right: str) -> float:
    """Return the F1 of the words that jieba finds, each normalized."""
    return token_f1(_chinese_words(given), _chinese_words(right))


def rouge(given: str, right: str) -> float:
    """Return ROUGE-L F of the package `rouge`; 0 if it refuses a pair, for example an answer of only full stops."""
    try:
        return float(
            import_optional("rouge").Rouge(metrics=["rouge-l"]).get_scores([given], [right])[0]["rouge-l"]["f"]
        )
    except (ValueError, RecursionError):
        # The package recurses over the common words and fails on very long sentences. The authors count 0 too.
        return 0.0


def rouge_chinese(given: str, right: str) -> float:
    """Return ROUGE-L F of the words that jieba finds."""
    return rouge(" ".join(_cut(given)), " ".join(_cut(right)))


def numbers_right(given: str, right: str) -> float:
    """Return the share of the numbers in the answer that are the right one; 0 without a number."""
    numbers = re.findall(r"\d+", given)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def paragraph_right(given: str, right: str) -> float:
    """Return `numbers_right` for a right answer such as "Paragraph 7"."""
    return numbers_right(given, _number_after("Paragraph ", right))


def paragraph_right_chinese(given: str, right: str) -> float:
    """Return `numbers_right` for a right answer such as "段落7"."""
    return numbers_right(given, _number_after("段落", right))


def line_similarity(given: str, right: str) -> float:
    """Return the similarity of the first line of code: twice the matching characters over the sum of both lengths.

    The first line is the first one without a back-quote, `#` or `//`; empty lines count, except at the start. The
    result is rounded to whole percents. `difflib` finds the matches, as `fuzzywuzzy` does with the authors'
    requirements; `fuzzywuzzy` gives slightly higher numbers if `python-Levenshtein` is also installed.
    """
    lines = given.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, right).ratio()) / 100


def class_right(given: str, right: str, classes: Sequence[str]) -> float:
    """Return 1 / the number of class names in the answer if the right one is among them, else 0.

    Names that are substrings of the right one do not count.
    """
    named = [name for name in classes if name in given]
    index = 0
    while index < len(named):
        if named[index] in right and named[index] != right:
            del named[index]
        index += 1  # also after a removal: the authors remove while they iterate, which skips the next name
    return 1 / len(named) if right in named else 0.0


def first_line(text: str) -> str:
    """Return the first line of an answer after any empty lines."""
    return text.lstrip("\n").split("\n")[0]


def _number_after(word: str, right: str) -> str:
    match = re.search(re.escape(word) + r"(\d+)", right)
    if match is None:
        raise PePatchError(f"The right answer {right!r} has no number after {word!r}. Give LongBench's rows.")
    return match.group(1)


def _cut(text: str) -> list[str]:
    jieba = import_optional("jieba")
    jieba.setLogLevel(logging.WARNING)  # jieba logs the path of its dictionary otherwise
    return list(jieba.cut(text, cut_all=False))


def _chinese_words(text: str) -> list[str]:
    return [word for word in map(normalised_chinese, _cut(text)) if word]
