"""Fill the length with as many whole units of generated text as fit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..context import EvaluationContext
from ..question import Question
from ..question_task import QuestionTask
from .filling import largest_fit, text_size


@dataclass(frozen=True)
class GeneratedQuestion:
    """A question whose text has any number of units."""

    text: Callable[[int], str]
    """Returns the prompt with this number of units."""
    bare: str
    """The prompt without any units."""
    lead: str
    """The beginning of the answer, which follows the prompt."""
    answer: Callable[[int], str]
    """Returns the right answer for this number of units."""
    widest: str
    """An answer with the largest possible number of tokens."""


@dataclass(frozen=True)
class GeneratedTask(QuestionTask):
    """A task whose prompts have as many whole units of text as fit beside the question and its answer."""

    min_units: ClassVar[int] = 1
    """The smallest number of units that a question needs."""
    spare_tokens: ClassVar[int] = 2
    """Tokens that an answer may have beyond the widest right one."""

    def draw_question(self, context: EvaluationContext, rng: np.random.Generator, depth: float) -> GeneratedQuestion:
        """Draw the facts of one question."""
        raise NotImplementedError

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        numbers = range(context.samples_at(depth))
        return [self._question(context, within or length, depth, number) for number in numbers]

    def _question(self, context: EvaluationContext, length: int, depth: float | None, number: int) -> Question:
        seeds = [context.seed, zlib.crc32(self.name.encode()), round((depth or 0.0) * 1e6), number]
        drawn = self.draw_question(context, np.random.default_rng(seeds), depth or 0.0)
        budget = context.count(" " + drawn.widest) + self.spare_tokens
        size: Callable[[int], int] = lambda units: text_size(context, drawn.text(units), drawn.lead)  # noqa: E731
        units = largest_fit(size, length - budget + 1, self.min_units, f"A question of {self.name!r}")
        return Question(
            prompt=context.prompt(drawn.text(units), drawn.lead),
            references=(drawn.answer(units),),
            budget=budget,
            without_context=context.prompt(drawn.bare, drawn.lead),
            depth=round(depth * units) / units if self.by_depth and depth is not None else None,
        )

    def stamps(self, context: EvaluationContext) -> dict[str, Any]:
        return {"generator": 1, "wording": "own"}
