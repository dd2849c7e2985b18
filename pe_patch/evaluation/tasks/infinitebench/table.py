# ruff: noqa: RUF001 - Chinese marks
"""List InfiniteBench's 12 data sets with wording, metric and budget (Zhang et al. 2024, arXiv 2402.13718)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import PePatchError
from . import scoring

Row = Mapping[str, Any]


@dataclass(frozen=True)
class DataSet:
    """One data set. `prompt` and `lead` are our wording."""

    metric: Callable[[str, Sequence[str]], float]
    measure: str
    """The metric, in words."""
    budget: int
    """The largest number of tokens in an answer."""
    prompt: str
    lead: str = ""
    """The beginning of the answer."""
    fields: Callable[[Row], dict[str, str]] = lambda row: {}
    """Returns the fields of the prompt besides `{context}` and `{question}`."""
    choices: bool = False
    """True if the right answer is the text of an option."""
    official: str | None = None
    """The file of lm-eval with the official wording; None if lm-eval has none."""
    lead_counts: bool = False
    """True if the metric searches for the text of `lead`."""


def _options(row: Row) -> dict[str, str]:
    return dict(zip("ABCD", row["options"], strict=True))


def _call(row: Row) -> dict[str, str]:
    """Return the call in the question, for example `func_7(-3)`."""
    return {"call": _search(r"func_[0-9]+\(-?[0-9]+\)", row)}


def _wanted(row: Row) -> dict[str, str]:
    """Return the number that the question asks for, for example "the second largest number"."""
    return {"wanted": _search(r"The .+ of", row).removesuffix(" of").lower()}


def _search(pattern: str, row: Row) -> str:
    match = re.search(pattern, row["input"])
    if match is None:
        raise PePatchError(f"The question {row['input']!r} is not from InfiniteBench: it does not match {pattern!r}.")
    return match.group()


HIDDEN = "Almost all of this text is noise. One thing in it will be asked for.\n\n{context}\n\n{question}\n"
PAIRS = "{context}\n\nThat was a JSON object. One of its values is asked for.\n{question}"
BOOK = "A book:\n\n{context}\n\nThe book ends here. Answer in a few words.\n\nQuestion: {question}\n"
CHOICES = (
    "A book:\n\n{context}\n\nThe book ends here. One of four answers to a question about it is right.\n\n"
    "Question: {question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nWrite the letter of the right one, and nothing else.\n"
)
SUMMARY = "A book:\n\n{context}\n\nThe book ends here. Tell what happens in it.\n"
BOOK_CHINESE = "先读这本书。\n\n{context}\n\n书到此为止。请用几个字回答。\n\n问题：{question}\n"
DIALOGUE = (
    "The script of a film. In one place the name of the speaker was replaced by $$MASK$$.\n\n{context}\n\nThe script "
    "ends here. Whose name stood in the place of $$MASK$$? Write the name as the script does, and nothing else.\n"
)
LIST = "A list of numbers:\n\n{context}\n\nFind {wanted} in it, and write that number alone.\n"
STEPS = (
    "Work an expression out from left to right and write each intermediate result down.\n\n"
    "Expression: 6 + 5 - 2\nResults: [11, 9]\n\nExpression: {context}\n"
)
CALL = "Functions in Python:\n\n{context}\n\nWhat does {call} return? Write the number alone.\n"
ERROR = (
    "The source of a program. In exactly one of its functions a mistake was put in that makes it fail.\n\n{context}\n\n"
    "Which function is it?\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nWrite the letter, a full stop and the name.\n"
)

EXACT = "share of exact answers"
F1 = "F1 of the words"

DATA_SETS: dict[str, DataSet] = {
    "passkey": DataSet(scoring.first_integer, EXACT, 6, HIDDEN, "The pass key is", official="passkey"),
    "number_string": DataSet(
        scoring.first_integer, EXACT, 12, HIDDEN, "The sequence of digits is", official="number_string"
    ),
    "kv_retrieval": DataSet(scoring.word_given, EXACT, 50, PAIRS, official="kv_retrieval"),
    "longbook_sum_eng": DataSet(
        scoring.rouge_lines, "ROUGE-L of the lines", 1200, SUMMARY, "Summary:", official="longbook_sum_en"
    ),
    "longbook_qa_eng": DataSet(scoring.best_f1, F1, 40, BOOK, "Answer:", official="longbook_qa_en"),
    "longbook_choice_eng": DataSet(
        scoring.choice, EXACT, 40, CHOICES, "The letter of the right answer is", _options, choices=True,
        official="longbook_choice_en",
    ),
    "longbook_qa_chn": DataSet(
        scoring.best_f1_chinese, "F1 of the characters", 40, BOOK_CHINESE, "答案：", official="longbook_qa_chn"
    ),
    "longdialogue_qa_eng": DataSet(
        scoring.name_given, EXACT, 40, DIALOGUE, "The name is", official="longdialogue_qa_en"
    ),
    "math_find": DataSet(scoring.first_number, EXACT, 3, LIST, "The number is", _wanted, official="math_find"),
    "math_calc": DataSet(scoring.leading_numbers, "share of results right from the start", 30000, STEPS, "Results:"),
    "code_run": DataSet(scoring.last_integer, EXACT, 5, CALL, "The value is", _call, official="code_run"),
    "code_debug": DataSet(
        scoring.wrong_function, EXACT, 5, ERROR, "The answer is:", _options, choices=True, official="code_debug",
        lead_counts=True,
    ),
}  # fmt: skip
