"""Tasks whose texts are made of as many whole units as fit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..context import EvaluationContext
from ..question import Question
from ..question_task import QuestionTask
from .filling import most, text_size


@dataclass(frozen=True)
class Drawn:
    """One question: `text(units)` is its prompt, `bare` that with nothing to read, `answer(units)` the right answer,
    and `widest` an answer that takes as many tokens as any."""

    text: Callable[[int], str]
    bare: str
    lead: str
    answer: Callable[[int], str]
    widest: str


@dataclass(frozen=True)
class Generated(QuestionTask):
    """As many whole units of text as fit beside the question and its answer."""

    least: ClassVar[int] = 1
    """The fewest units that a question can be asked about."""
    spare: ClassVar[int] = 2
    """Tokens that an answer may take beside the right one."""

    def drawn(self, context: EvaluationContext, rng: np.random.Generator, depth: float) -> Drawn:
        """The facts of one question."""
        raise NotImplementedError

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        count = context.samples_per_depth if self.by_depth else context.samples
        return [self._question(context, within or length, depth, number) for number in range(count)]

    def _question(self, context: EvaluationContext, length: int, depth: float | None, number: int) -> Question:
        seeds = [context.seed, zlib.crc32(self.name.encode()), round((depth or 0.0) * 1e6), number]
        drawn = self.drawn(context, np.random.default_rng(seeds), depth or 0.0)
        budget = context.count(" " + drawn.widest) + self.spare
        size: Callable[[int], int] = lambda units: text_size(context, drawn.text(units), drawn.lead)  # noqa: E731
        units = most(size, length - budget + 1, self.least, f"A question of {self.name!r}")
        return Question(
            prompt=context.prompt(drawn.text(units), drawn.lead),
            references=(drawn.answer(units),),
            budget=budget,
            without_context=context.prompt(drawn.bare, drawn.lead),
            depth=round(depth * units) / units if self.by_depth and depth is not None else None,
        )

    def stamps(self, context: EvaluationContext) -> dict[str, Any]:
        return {"generator": 1, "wording": "own"}
