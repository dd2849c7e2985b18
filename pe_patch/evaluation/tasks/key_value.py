"""Ask for one value of a JSON object of random identifiers, which cannot be guessed."""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..context import EvaluationContext
from ..question import Question
from ..question_task import QuestionTask
from .filling import largest_fit, text_size

SPARE = 4
"""Tokens that an answer may have beyond the value, for example a space or quotes."""
LEAD = "Its value is"

Pair = tuple[str, str]


@dataclass(frozen=True)
class KeyValue(QuestionTask):
    """A task that asks for one value of a JSON object with as many pairs of random UUIDs as fit.

    The question is about the pair at the depth. The other pairs fill the length up to less than one pair.
    """

    name: ClassVar[str] = "key_value"
    summary: ClassVar[str] = "retrieve one value of a JSON object of random identifiers"
    paper: ClassVar[str] = "Liu et al. 2023, arXiv 2307.03172 (the idea; wording and generator are ours)"
    by_depth: ClassVar[bool] = True
    same_at_every_length: ClassVar[bool] = True

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        """Return questions whose pair does not depend on the length; a longer object appends further pairs."""
        return [
            self._question(context, within or length, depth or 0.0, number)
            for number in range(context.samples_at(depth))
        ]

    def _question(self, context: EvaluationContext, length: int, depth: float, number: int) -> Question:
        # The other pairs have a separate random stream, so that their number does not change the pair of the question.
        seeds = [context.seed, zlib.crc32(self.name.encode()), round(depth * 1e6), number]
        asked, *_ = _pairs(np.random.default_rng([*seeds, 0]), 1)
        drawn: list[Pair] = []
        stream = np.random.default_rng([*seeds, 1])

        def others(count: int) -> list[Pair]:
            if count > len(drawn):
                drawn.extend(_pairs(stream, count - len(drawn)))
            return drawn[:count]

        budget = context.count(f' "{asked[1]}"') + SPARE

        def text(count: int) -> str:
            return _prompt(_insert(others(count - 1), asked, depth), asked[0])

        count = largest_fit(
            lambda n: text_size(context, text(n), LEAD), length - budget + 1, 1, "An object of one pair"
        )
        place = round(depth * (count - 1))
        return Question(
            prompt=context.prompt(text(count), LEAD),
            references=(asked[1],),
            budget=budget,
            without_context=context.prompt(_prompt([], asked[0]), LEAD),
            depth=place / (count - 1) if count > 1 else 0.0,
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the answer contains the value, else 0."""
        return float(references[0] in prediction)

    def measure(self) -> str:
        return "share of values found"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return (
            f"{len(questions)} questions at each depth, in JSON objects of random UUIDs; greedy answer holds the value"
        )

    def stamps(self, context: EvaluationContext) -> dict[str, Any]:
        return {"generator": 1, "wording": "own"}


def _pairs(rng: np.random.Generator, count: int) -> list[Pair]:
    return [(_identifier(rng), _identifier(rng)) for _ in range(count)]


def _identifier(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _insert(others: list[Pair], asked: Pair, depth: float) -> list[Pair]:
    place = round(depth * len(others))
    return [*others[:place], asked, *others[place:]]


def _prompt(pairs: list[Pair], key: str) -> str:
    content = json.dumps(dict(pairs), indent=0)
    return f'A JSON object:\n\n{content}\n\nOne of its keys is "{key}". Which value belongs to it?\n'


KEY_VALUE: Mapping[str, type[KeyValue]] = {KeyValue.name: KeyValue}
