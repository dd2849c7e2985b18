"""Variants of two LongBench data sets for any length, without data and with our wording."""

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
from ..code import GAP, SPARE, block_to_drop, fill
from ..code_blocks import Block, read_code, read_paragraphs
from ..filling import text_size
from ..generated import GeneratedQuestion, GeneratedTask
from . import scoring

PAPER = "Bai et al. 2023, arXiv 2308.14508 (the idea; wording and generator are ours)"


@dataclass(frozen=True)
class ParagraphCount(GeneratedTask):
    """A task that asks for the number of different paragraphs among numbered ones, some of which repeat.

    The paragraphs are the first ones of docstrings in the evaluation's text.

    Args:
        repeated: the share of paragraphs that repeat an earlier one, from 0 to below 1.
    """

    repeated: float = 0.4

    name: ClassVar[str] = "paragraph_count"
    summary: ClassVar[str] = "count the different paragraphs of documentation"
    paper: ClassVar[str] = PAPER
    min_units: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not 0 <= self.repeated < 1:
            raise OptionError(f"repeated is a share of the paragraphs, from 0 to below 1; got {self.repeated}.")

    def draw_question(self, context: EvaluationContext, rng: np.random.Generator, depth: float) -> GeneratedQuestion:
        source = read_paragraphs(tuple(context.corpus.texts))
        order = rng.permutation(len(source))
        chosen: list[int] = []
        different = [0]

        def first(count: int) -> list[int]:
            """Return indices of paragraphs in `source`; a longer list begins with the shorter one."""
            while len(chosen) < count:
                if chosen and rng.random() < self.repeated:
                    chosen.append(chosen[int(rng.integers(len(chosen)))])
                elif different[-1] < len(order):
                    chosen.append(int(order[different[-1]]))
                else:
                    raise PePatchError(
                        f"The text ({context.corpus.name}) has only {len(source)} different docstrings. "
                        f"Give more Python "
                        "source code."
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

        return GeneratedQuestion(text, question, "The number is", lambda count: str(len(set(first(count)))), "9999")

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the share of the numbers in the answer that are right."""
        return scoring.numbers_right(prediction, references[0])

    def measure(self) -> str:
        return "share of numbers right"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return f"{len(questions)} questions about paragraphs of documentation in {context.corpus.name}; greedy answer"


@dataclass(frozen=True)
class NextLine(QuestionTask):
    """A task that asks for the next line of a function, after as many whole statements of code as fit.

    The nearest lines help most, so a good score does not show that the model read the distant text.
    """

    name: ClassVar[str] = "next_line"
    summary: ClassVar[str] = "write the next line of real code, scored by similarity"
    paper: ClassVar[str] = PAPER
    retrieves: ClassVar[bool] = False
    same_at_every_length: ClassVar[bool] = True
    shortest: ClassVar[int] = 16
    """The smallest number of characters in the line, without white space around it."""
    longest: ClassVar[int] = 100
    """The largest number of characters."""

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        """Return questions whose lines do not depend on the length."""
        blocks = read_code(tuple(context.corpus.texts)).blocks
        candidates = [(index, line) for index, block in enumerate(blocks) for line in self._lines(block)]
        if len(candidates) < context.samples:
            raise PePatchError(
                f"The text ({context.corpus.name}) has only {len(candidates)} suitable lines of Python for "
                f"{context.samples} samples. Give source code: text='stdlib', or a folder of .py files."
            )
        rng = np.random.default_rng([context.seed, zlib.crc32(self.name.encode())])
        drawn = [candidates[choice] for choice in rng.choice(len(candidates), context.samples, replace=False)]
        return [_next_line(context, blocks, index, line, within or length) for index, line in drawn]

    def _lines(self, block: Block) -> Iterator[int]:
        """Yield the numbers of suitable lines among the first twenty of a function."""
        lines = block.text.split("\n")[:20] if block.text.startswith(("def ", "@")) else []
        for number, line in enumerate(lines):
            # The metric skips lines with these marks.
            marked = any(mark in line for mark in ("`", "#", "//"))
            if number >= 2 and self.shortest <= len(line.strip()) <= self.longest and not marked:
                yield number

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the similarity of the first line."""
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
        return "Write the line that comes next in this code.\n\n" + GAP.join([*(block.text for block in before), begun])

    room = length - budget + 1
    minimum = text_size(context, text([]))
    if minimum > room:
        raise PePatchError(
            f"The beginning of a function takes {minimum} tokens, and there is room for {room} beside its next line. "
            "Ask for a greater length."
        )
    # Go backwards from the nearest statement, and continue from the end of the text after reaching its start.
    backwards = iter([*reversed(blocks[:index]), *reversed(blocks[index + 1 :])])
    before, _ = fill(context, backwards, room - minimum)
    while (excess := text_size(context, text(before[::-1])) - room) > 0:
        before.remove(block_to_drop(context, before, excess))
    return Question(context.prompt(text(before[::-1])), (right,), budget, context.prompt(text([])))


OFFLINE = {task.name: task for task in (ParagraphCount, NextLine)}
