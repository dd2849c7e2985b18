# ruff: noqa: RUF001 - Chinese marks
"""List LongBench's 21 data sets with wording, metric and budget (Bai et al. 2023, arXiv 2308.14508)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import scoring


@dataclass(frozen=True)
class Metric:
    """A metric with its name."""

    name: str
    function: Callable[..., float]
    """Takes the answer and a right answer."""
    classes: bool = False
    """True if the function also takes the names of all classes."""


F1 = Metric("F1 of the words", scoring.answer_f1)
F1_CHINESE = Metric("F1 of the words", scoring.answer_f1_chinese)
ROUGE = Metric("ROUGE-L", scoring.rouge)
ROUGE_CHINESE = Metric("ROUGE-L", scoring.rouge_chinese)
CLASS = Metric("share of classes named right", scoring.class_right, classes=True)
COUNT = Metric("share of numbers right", scoring.numbers_right)
PARAGRAPH = Metric("share of numbers right", scoring.paragraph_right)
PARAGRAPH_CHINESE = Metric("share of numbers right", scoring.paragraph_right_chinese)
SIMILARITY = Metric("similarity of the next line", scoring.line_similarity)


@dataclass(frozen=True)
class DataSet:
    """One data set. `prompt` and `lead` are our wording."""

    metric: Metric
    budget: int
    """The largest number of tokens in an answer."""
    prompt: str
    lead: str = "Answer:"
    """The beginning of the answer."""
    chat: bool = True
    """True if the prompt belongs in a chat template."""
    one_line: bool = False
    """True if only the first line of the answer counts."""
    by_length: bool = False
    """True if LongBench-E has this data set too."""
    needs_context: bool = True
    """True if a good answer requires the distant text."""
    repair: Callable[[str], str] = str
    """Restores white space that lm-eval's copy of the official wording has lost."""


def _blank_line(template: str) -> str:
    return template.replace("}}\n{{", "}}\n\n{{")


def _line_end(template: str) -> str:
    return template + "\n"


def _space_end(template: str) -> str:
    return template + " "


STORY = (
    "Here is a story, a novel or the script of a film. Read it; a question about it comes after.\n\n{context}\n\n"
    "That was the story. Say in as few words as possible what answers this question about it, and nothing more.\n\n"
    "Question: {question}\n"
)
ARTICLE = (
    "A scientific article:\n\n{context}\n\nA question about the article follows. Give the shortest answer that is "
    'complete. A question of yes or no is answered "yes" or "no"; what the article does not tell is "unanswerable".\n\n'
    "Question: {question}\n"
)
TEXT = (
    "Read this text.\n\n{context}\n\nWhat does it say to the following question? Give the answer alone, in a few "
    "words.\n\nQuestion: {question}\n"
)
PASSAGES = (
    "Some of the passages below hold what is needed for a question that comes after them.\n\n{context}\n\nWhat answers "
    "the question? A name or a few words will do; write no sentence.\n\nQuestion: {question}\n"
)
REPORT = "The report of a public office:\n\n{context}\n\nSum the report up on one page.\n"
MEETING = (
    "What was said in a meeting:\n\n{context}\n\nReply to the following about the meeting in a few sentences.\n\n"
    "{question}\n"
)
NEWS = "Several articles about one event:\n\n{context}\n\nSum all of them up together on one page.\n"
TYPES = "Questions, each with its type. Give the type of the last one.\n\n{context}\n{question}"
QUIZ = "Passages with a question each, and the answer in a few words. Answer the last one.\n\n{context}\n\n{question}"
DIALOGUES = "Dialogues, each with a short summary. Sum the last one up.\n\n{context}\n\n{question}"
COUNTED = (
    "The following paragraphs are numbered. Some of them stand there more than once.\n\n{context}\n\n"
    "How many different paragraphs are there? A paragraph and its repetitions count as one. Write the number alone.\n"
)
ABSTRACT = (
    "Thirty numbered paragraphs:\n\n{context}\n\nOne of them was summarised as follows.\n\n{question}\n\n"
    'Which one was it? Write "Paragraph" and its number.\n'
)
LINE = "Write the line of code that comes next.\n{context}"
LINE_IN_FILE = LINE + "{question}"
TEXT_CHINESE = "先读这段文字。\n\n{context}\n\n根据上文用尽可能少的字回答问题，不必解释。\n\n问题：{question}\n"
SEVERAL_CHINESE = "下面有若干篇文章。\n\n{context}\n\n请依据这些文章作答。\n\n问题：{question}\n"
MEETING_CHINESE = "一次会议的记录：\n\n{context}\n\n请概括这次会议谈了什么。\n"
NEWS_CHINESE = "每条新闻属于一个类别。看过例子之后，写出最后一条的类别。\n\n{context}\n{question}"
ABSTRACT_CHINESE = (
    "这些段落都有编号：\n\n{context}\n\n有人为其中一段写了摘要：\n\n{question}\n\n"
    "这是哪一段的摘要？只写“段落”和编号。\n"
)

FEW_SHOT: dict[str, Any] = {"lead": "", "chat": False, "one_line": True}
CODE: dict[str, Any] = {"lead": "", "chat": False, "by_length": True, "repair": _line_end}

DATA_SETS: dict[str, DataSet] = {
    "narrativeqa": DataSet(F1, 128, STORY),
    "qasper": DataSet(F1, 128, ARTICLE, by_length=True),
    "multifieldqa_en": DataSet(F1, 64, TEXT, by_length=True),
    "multifieldqa_zh": DataSet(F1_CHINESE, 64, TEXT_CHINESE, "答案："),
    "hotpotqa": DataSet(F1, 32, PASSAGES, by_length=True),
    "2wikimqa": DataSet(F1, 32, PASSAGES, by_length=True),
    "musique": DataSet(F1, 32, PASSAGES),
    "dureader": DataSet(ROUGE_CHINESE, 128, SEVERAL_CHINESE, "答案："),
    "gov_report": DataSet(ROUGE, 512, REPORT, "Summary:", by_length=True),
    "qmsum": DataSet(ROUGE, 512, MEETING),
    "multi_news": DataSet(ROUGE, 512, NEWS, "Summary:", by_length=True),
    "vcsum": DataSet(ROUGE_CHINESE, 512, MEETING_CHINESE, "总结："),
    "trec": DataSet(CLASS, 64, TYPES, by_length=True, **FEW_SHOT),
    "triviaqa": DataSet(F1, 32, QUIZ, by_length=True, repair=_blank_line, **FEW_SHOT),
    "samsum": DataSet(ROUGE, 128, DIALOGUES, by_length=True, repair=_blank_line, **FEW_SHOT),
    "lsht": DataSet(CLASS, 64, NEWS_CHINESE, **FEW_SHOT),
    "passage_count": DataSet(COUNT, 32, COUNTED, by_length=True, repair=_space_end),
    "passage_retrieval_en": DataSet(PARAGRAPH, 32, ABSTRACT, by_length=True, repair=_space_end),
    "passage_retrieval_zh": DataSet(PARAGRAPH_CHINESE, 32, ABSTRACT_CHINESE, "答案："),
    "lcc": DataSet(SIMILARITY, 64, LINE, needs_context=False, **CODE),
    "repobench-p": DataSet(SIMILARITY, 64, LINE_IN_FILE, **CODE),
}
