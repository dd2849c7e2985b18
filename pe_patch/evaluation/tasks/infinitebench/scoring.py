"""Score answers as InfiniteBench does, with one function for each type of task.

Each function takes an answer and the row's right answers and returns 0 to 1. The functions give exactly the numbers of
the authors' code, including its quirks; comments mark surprising ones.

Source: Zhang et al. 2024, arXiv 2402.13718, and the authors' code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...question import scores_references
from ..longbench.scoring import answer_f1, import_optional, normalised_chinese, token_f1

CHOICE_LEADS = ("answer is:", "answer:", "answer is", "option is")
ERROR_LEADS = ("answer is:", "is:", "answer:", "correct option is:")


@scores_references
def first_integer(given: str, right: Sequence[str]) -> float:
    """Return 1 if the first run of digits is the right one, else 0."""
    match = re.search("[0-9]+", given)
    return float(match is not None and match.group() == right[0])


@scores_references
def word_given(given: str, right: Sequence[str]) -> float:
    """Return 1 if the right answer is one of the words, ignoring punctuation marks, else 0."""
    return float(right[0] in _spaced(given, "\n:\"'.,?!{}").split())


@scores_references
def name_given(given: str, right: Sequence[str]) -> float:
    """Return 1 if the first right name, which is in capitals, is one of the answer's words, else 0.

    A name of two words never matches, because the authors compare it with single words.
    """
    return float(right[0] in _spaced(given, "\n:\"'.,?!{}").upper().split())


@scores_references
def last_integer(given: str, right: Sequence[str]) -> float:
    """Return 1 if the answer's last word is the right integer, else 0."""
    words = _spaced(given, "\n.`'\":").split()
    try:
        return float(bool(words) and int(words[-1]) == int(right[0]))
    except ValueError:
        return 0.0


@scores_references
def first_number(given: str, right: Sequence[str]) -> float:
    """Return 1 if the first number, integer or decimal, has the right value, else 0."""
    match = re.search(r"\d+\.\d+|\d+", given)
    return float(match is not None and float(match.group()) == float(right[0]))


@scores_references
def leading_numbers(given: str, right: Sequence[str]) -> float:
    """Return the share of the right integers that the answer matches before its first mismatch."""
    matches = 0
    for number, expected in zip(re.findall("[0-9]+", given), right, strict=False):
        if _digits(number) != _digits(expected):
            break
        matches += 1
    return matches / len(right)


@scores_references
def choice(given: str, right: Sequence[str]) -> float:
    """Return 1 if the answer names the right choice, else 0; `right` has its text and its letter."""
    given = given.strip()
    if not given:
        return 0.0
    if given[0] in "ABCD":  # the authors also take "An" or "But" at the start for a letter
        return float(given[0] in right)
    if given in right:
        return 1.0
    text = _single_spaced(_spaced(given, "\n\"'.,?!{}"))
    after = _after_lead(text, CHOICE_LEADS)
    if after is not None:
        return float(after.startswith(tuple(right)))
    return next((float(word in right) for word in text.split() if word in "ABCD"), 0.0)


@scores_references
def wrong_function(given: str, right: Sequence[str]) -> float:
    """Return 1 if the answer names the function with the error, else 0; `right` has its name and its letter."""
    given, (name, letter) = given.strip(), right
    if given[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = _spaced(given, "\n`'\"-*").replace("Option", " ").replace("option", " ")
    after = _after_lead(_single_spaced(text), ERROR_LEADS)
    return float(after is not None and after.startswith((letter, name)))


@scores_references
def best_f1(given: str, right: Sequence[str]) -> float:
    """Return the F1 of the normalized words with the best matching right answer."""
    return max(answer_f1(given, reference) for reference in right)


@scores_references
def best_f1_chinese(given: str, right: Sequence[str]) -> float:
    """Return the F1 of the characters with the best matching right answer."""
    return max(token_f1(normalised_chinese(given), normalised_chinese(reference)) for reference in right)


@scores_references
def rouge_lines(given: str, right: Sequence[str]) -> float:
    """Return ROUGE-Lsum F of the package `rouge_score`, without stemming, with the best matching right answer."""
    scorer = import_optional("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"], use_stemmer=False)
    return scorer.score_multi(list(right), given)["rougeLsum"].fmeasure


def _spaced(text: str, marks: str) -> str:
    return text.translate(dict.fromkeys(map(ord, marks), " "))


def _single_spaced(text: str) -> str:
    return re.sub(" +", " ", text)


def _after_lead(text: str, leads: Sequence[str]) -> str | None:
    """Return the text after the first lead that occurs and one more character, or None without a lead."""
    lead = next((lead for lead in leads if lead in text), None)
    return None if lead is None else text[text.index(lead) + len(lead) + 1 :]


@scores_references
def first_signed(given: str, right: Sequence[str]) -> float:
    """Return 1 if the first integer, with its sign, is the right one, else 0 (our rule, not the authors')."""
    match = re.search(r"-?[0-9]+", given)
    return float(match is not None and _digits(match.group()) == _digits(right[0]))


def _digits(integer: str) -> str:
    """Return an integer without leading zeros. Python refuses to convert one of more than 4,300 digits."""
    sign, digits = ("-", integer[1:]) if integer.startswith("-") else ("", integer)
    digits = digits.strip().lstrip("0")
    return sign + digits if digits else "0"
