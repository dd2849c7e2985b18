"""Cousins of two of LongBench's data sets, at any length and without any data: the ideas, in other words."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ....errors import OptionError, PePatchError
from ...context import EvaluationContext
from ...question import Question
from ...question_task import QuestionTask
from ..code import GAP, SPARE, fill, least_loss
from ..code_blocks import Block, read_code, read_paragraphs
from ..filling import text_size
from ..generated import Drawn, Generated
from . import scoring

PAPER = "Bai et al. 2023, arXiv 2308.14508 (the idea; wording and generator are ours)"


@dataclass(frozen=True)
class ParagraphCount(Generated):
    """How many different paragraphs there are among numbered ones, some of which are repetitions.

    The paragraphs are the beginnings of docstrings of the evaluation's text.

    Args:
        repeated: share of the paragraphs that repeat an earlier one, from 0 to below 1.
    """

    repeated: float = 0.4

    name: ClassVar[str] = "paragraph_count"
    summary: ClassVar[str] = "how many different paragraphs of documentation there are is asked for"
    paper: ClassVar[str] = PAPER
    least: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not 0 <= self.repeated < 1:
            raise OptionError(f"repeated is a share of the paragraphs, from 0 to below 1; got {self.repeated}.")

    def drawn(self, context: EvaluationContext, rng: np.random.Generator, depth: float) -> Drawn:
        source = read_paragraphs(tuple(context.corpus.texts))
        order = rng.permutation(len(source))
        chosen: list[int] = []
        different = [0]

        def first(count: int) -> list[int]:
            """Of every length the same beginning, the numbers of paragraphs in `source`."""
            while len(chosen) < count:
                if chosen and rng.random() < self.repeated:
                    chosen.append(chosen[int(rng.integers(len(chosen)))])
                elif different[-1] < len(order):
                    chosen.append(int(order[different[-1]]))
                else:
                    raise PePatchError(
                        f"The text ({context.corpus.name}) has {len(source)} different docstrings, and more are "
                        "needed. Give more source code in Python."
                    )
                different.append(len(set(chosen)))
            return chosen[:count]

        question = (
            "Some of these paragraphs stand there more than once. How many different ones are there? A paragraph and "
            "its repetitions count as one. Write the number alone.\n"
        )

        def text(count: int) -> str:
            numbered = [f"Paragraph {number}: {source[index]}" for number, index in enumerate(first(count), 1)]
            return "\n\n".join([*numbered, question])

        return Drawn(text, question, "The number is", lambda count: str(len(set(first(count)))), "9999")

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """The share of the numbers in the answer that are right."""
        return scoring.numbers_right(prediction, references[0])

    def measure(self) -> str:
        return "share of numbers right"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return f"{len(questions)} questions about paragraphs of documentation in {context.corpus.name}; greedy answer"


@dataclass(frozen=True)
class NextLine(QuestionTask):
    """The next line of a function, after all of its file before it and of other files as fits: whole statements.

    The nearest lines say most about the next, so that a good score does not show that the far text was read.
    """

    name: ClassVar[str] = "next_line"
    summary: ClassVar[str] = "the next line of real code, by similarity"
    paper: ClassVar[str] = PAPER
    retrieves: ClassVar[bool] = False
    same_at_every_length: ClassVar[bool] = True
    shortest: ClassVar[int] = 16
    """Characters of a line that is asked for, white space around it apart."""
    longest: ClassVar[int] = 100

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        """The lines that are asked for do not depend on the length."""
        blocks = read_code(tuple(context.corpus.texts)).blocks
        asked = [(index, line) for index, block in enumerate(blocks) for line in self._lines(block)]
        if len(asked) < context.samples:
            raise PePatchError(
                f"The text ({context.corpus.name}) has {len(asked)} lines of Python that can be asked for, and "
                f"{context.samples} are needed. Give source code: text='stdlib', or a folder of .py files."
            )
        rng = np.random.default_rng([context.seed, zlib.crc32(self.name.encode())])
        drawn = [asked[place] for place in rng.choice(len(asked), context.samples, replace=False)]
        return [_next_line(context, blocks, index, line, within or length) for index, line in drawn]

    def _lines(self, block: Block) -> Iterator[int]:
        """Lines of the first twenty of a function that can be asked for."""
        lines = block.text.split("\n")[:20] if block.text.startswith(("def ", "@")) else []
        for number, line in enumerate(lines):
            # The metric passes over lines with such marks.
            marked = any(mark in line for mark in ("`", "#", "//"))
            if number >= 2 and self.shortest <= len(line.strip()) <= self.longest and not marked:
                yield number

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """The similarity of the first line."""
        return scoring.line_similarity(prediction, references[0])

    def measure(self) -> str:
        return "similarity of the next line"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return f"{len(questions)} lines of Python files of {context.corpus.name}; first line of the greedy answer"

    def stamps(self, context: EvaluationContext) -> dict[str, Any]:
        return {"generator": 1, "wording": "own"}


def _next_line(context: EvaluationContext, blocks: Sequence[Block], index: int, line: int, length: int) -> Question:
    lines = blocks[index].text.split("\n")
    begun, right = "\n".join(lines[:line]) + "\n", lines[line]
    budget = context.count(right) + SPARE

    def text(before: Sequence[Block]) -> str:
        return "Write the line that comes next in this code.\n\n" + GAP.join([*(each.text for each in before), begun])

    room = length - budget + 1
    least = text_size(context, text([]))
    if least > room:
        raise PePatchError(
            f"A function that is to be gone on with takes {least} tokens, and there is room for {room} beside its next "
            "line. Ask for a greater length."
        )
    # From the nearest statement backwards, and on from the end of the text where its start is reached.
    backwards = iter([*reversed(blocks[:index]), *reversed(blocks[index + 1 :])])
    before, _ = fill(context, backwards, room - least)
    while (excess := text_size(context, text(before[::-1])) - room) > 0:
        before.remove(least_loss(context, before, excess))
    return Question(context.prompt(text(before[::-1])), (right,), budget, context.prompt(text([])))


OFFLINE = {task.name: task for task in (ParagraphCount, NextLine)}
