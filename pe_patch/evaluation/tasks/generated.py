"""Tasks whose texts are made of as many whole units as fit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..bench import Bench
from ..questions import Question, QuestionTask
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

    def drawn(self, bench: Bench, rng: np.random.Generator, depth: float) -> Drawn:
        """The facts of one question."""
        raise NotImplementedError

    def questions(
        self, bench: Bench, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        count = bench.samples_per_depth if self.by_depth else bench.samples
        return [self._question(bench, within or length, depth, number) for number in range(count)]

    def _question(self, bench: Bench, length: int, depth: float | None, number: int) -> Question:
        seeds = [bench.seed, zlib.crc32(self.name.encode()), round((depth or 0.0) * 1e6), number]
        drawn = self.drawn(bench, np.random.default_rng(seeds), depth or 0.0)
        budget = bench.count(" " + drawn.widest) + self.spare
        size: Callable[[int], int] = lambda units: text_size(bench, drawn.text(units), drawn.lead)  # noqa: E731
        units = most(size, length - budget + 1, self.least, f"A question of {self.name!r}")
        return Question(
            prompt=bench.prompt(drawn.text(units), drawn.lead),
            references=(drawn.answer(units),),
            budget=budget,
            without_context=bench.prompt(drawn.bare, drawn.lead),
            depth=round(depth * units) / units if self.by_depth and depth is not None else None,
        )

    def stamps(self, bench: Bench) -> dict[str, Any]:
        return {"generator": 1, "wording": "own"}
