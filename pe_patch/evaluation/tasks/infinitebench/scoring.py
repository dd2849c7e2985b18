"""How InfiniteBench judges answers (Zhang et al. 2024, arXiv 2402.13718): one function for each kind of task.

Each takes an answer and the row's right answers and gives 0 to 1. They follow the authors' own code to the number, its
oddities included; where one would surprise, a comment says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..longbench.scoring import answer_f1, needed, normalised_chinese, overlap

CHOICE_LEADS = ("answer is:", "answer:", "answer is", "option is")
ERROR_LEADS = ("answer is:", "is:", "answer:", "correct option is:")


def first_integer(given: str, right: Sequence[str]) -> float:
    """Whether the first run of digits is the right one."""
    found = re.search("[0-9]+", given)
    return float(found is not None and found.group() == right[0])


def word_given(given: str, right: Sequence[str]) -> float:
    """Whether the right answer is one of the answer's words, whatever marks stand around it."""
    return float(right[0] in _spaced(given, "\n:\"'.,?!{}").split())


def name_given(given: str, right: Sequence[str]) -> float:
    """Whether the first of the right names, which are in capitals, is one of the answer's words.

    A name of two words is never found: the authors compare it with single words.
    """
    return float(right[0] in _spaced(given, "\n:\"'.,?!{}").upper().split())


def last_integer(given: str, right: Sequence[str]) -> float:
    """Whether the answer's last word is the right integer."""
    words = _spaced(given, "\n.`'\":").split()
    try:
        return float(bool(words) and int(words[-1]) == int(right[0]))
    except ValueError:
        return 0.0


def first_number(given: str, right: Sequence[str]) -> float:
    """Whether the first number, whole or decimal, has the right value."""
    found = re.search(r"\d+\.\d+|\d+", given)
    return float(found is not None and float(found.group()) == float(right[0]))


def leading_numbers(given: str, right: Sequence[str]) -> float:
    """The share of the right integers that the answer's own match, counted until the first that does not."""
    numbers = [int(number) for number in re.findall("[0-9]+", given)]
    alike = 0
    for mine, theirs in zip(numbers, right, strict=False):
        if mine != int(theirs):
            break
        alike += 1
    return alike / len(right)


def choice(given: str, right: Sequence[str]) -> float:
    """Whether the answer names the right choice; `right` is its text and its letter."""
    given = given.strip()
    if not given:
        return 0.0
    if given[0] in "ABCD":  # an answer that begins with "An" or "But" is taken for a letter too
        return float(given[0] in right)
    if given in right:
        return 1.0
    text = _single_spaced(_spaced(given, "\n\"'.,?!{}"))
    after = _after_lead(text, CHOICE_LEADS)
    if after is not None:
        return float(after.startswith(tuple(right)))
    return next((float(word in right) for word in text.split() if word in "ABCD"), 0.0)


def wrong_function(given: str, right: Sequence[str]) -> float:
    """Whether the answer names the function with the error; `right` is its name and its letter."""
    given, (name, letter) = given.strip(), right
    if given[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = _spaced(given, "\n`'\"-*").replace("Option", " ").replace("option", " ")
    after = _after_lead(_single_spaced(text), ERROR_LEADS)
    return float(after is not None and after.startswith((letter, name)))


def best_f1(given: str, right: Sequence[str]) -> float:
    """F1 of the normalised words, with the right answer that fits best."""
    return max(answer_f1(given, each) for each in right)


def best_f1_chinese(given: str, right: Sequence[str]) -> float:
    """F1 of the characters, with the right answer that fits best."""
    return max(overlap(normalised_chinese(given), normalised_chinese(each)) for each in right)


def rouge_lines(given: str, right: Sequence[str]) -> float:
    """ROUGE-Lsum F of the package `rouge_score`, without stemming, with the right answer that fits best."""
    scorer = needed("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"], use_stemmer=False)
    return scorer.score_multi(list(right), given)["rougeLsum"].fmeasure


def _spaced(text: str, marks: str) -> str:
    return text.translate(dict.fromkeys(map(ord, marks), " "))


def _single_spaced(text: str) -> str:
    return re.sub(" +", " ", text)


def _after_lead(text: str, leads: Sequence[str]) -> str | None:
    """What comes after the first of the leads that occurs and the character that follows it; None where none does."""
    lead = next((lead for lead in leads if lead in text), None)
    return None if lead is None else text[text.index(lead) + len(lead) + 1 :]


def first_signed(given: str, right: Sequence[str]) -> float:
    """Whether the first whole number, its sign included, is the right one (not one of the authors' rules)."""
    found = re.search(r"-?[0-9]+", given)
    return float(found is not None and int(found.group()) == int(right[0]))
