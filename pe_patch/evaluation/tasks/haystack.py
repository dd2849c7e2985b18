"""Heat maps: the same facts in the same text, moved from its start to its end, at every length."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import OptionError, PePatchError
from ..context import EvaluationContext
from ..question import Question
from ..question_task import QuestionTask
from ..retrieval import Wording, encode, encode_pair, place, splice, take_piece
from .needle import resolve_wording

SEPARATOR = ", "


@dataclass(frozen=True)
class _HeatMap(QuestionTask):
    """A task that asks for facts in real text and scores the share of their values in the answer.

    The first fact of the question is at the depth. The others follow it evenly up to the end of the text, as in
    Kamradt's multi-needle test. Distractors have random places. Text, facts and places of distractors depend only on
    the number of the question, so the text before the first fact is the same at all depths.
    """

    distractors: int = 0
    """The number of facts about other keys."""
    wording: str | Wording | None = None
    """A name in WORDINGS or a Wording; None takes the one that fits the tokenizer."""

    by_depth: ClassVar[bool] = True
    shares_text: ClassVar[bool] = True
    same_at_every_length: ClassVar[bool] = True
    keys: ClassVar[int] = 1
    """The number of keys in a question."""
    values: ClassVar[int] = 1
    """The number of values per key of a question."""
    paper: ClassVar[str] = "Kamradt 2023, LLMTest_NeedleInAHaystack (the idea; wording and generator are ours)"

    def __post_init__(self) -> None:
        if self.distractors < 0:
            raise OptionError(f"distractors must be at least 0, got {self.distractors}.")

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the share of the references that occur in the answer."""
        return sum(reference in prediction for reference in references) / len(references)

    def measure(self) -> str:
        facts = self.keys * self.values
        others = f", {self.distractors} distractors" if self.distractors else ""
        return f"share of {facts} values found{others}" if facts > 1 else f"values found, 1 needle{others}"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        texts = len({question.group for question in questions})
        return f"{super().measured_on(context, questions)}, about {texts} texts, the same at each depth"

    def stamps(self, context: EvaluationContext) -> dict[str, Any]:
        return {"wording": resolve_wording(self.wording, context).name}

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        numbers = range(context.samples_at(depth))
        return [
            question
            for number in numbers
            for question in self._questions_about_text(context, within or length, depth or 0.0, number)
        ]

    def _questions_about_text(
        self, context: EvaluationContext, length: int, depth: float, number: int
    ) -> Iterator[Question]:
        """Yield the questions about one text: one, or one per key if the wording cannot ask for several keys."""
        tokenizer, wording = context.model.tokenizer, resolve_wording(self.wording, context)
        rng = np.random.default_rng([context.seed, zlib.crc32(self.name.encode()), number])
        keys = wording.draw_keys(rng, self.keys + self.distractors)
        values = [wording.draw_values(rng, self.values if i < self.keys else 1) for i in range(len(keys))]
        start, distractor_depths = rng.random(), rng.random(self.distractors)
        facts = [
            encode(tokenizer, wording.needle.format(key=key, value=value))
            for key, values_of_key in zip(keys, values, strict=True)
            for value in values_of_key
        ]
        asked = self.keys * self.values
        depths = np.concatenate([depth + (1 - depth) * np.arange(asked) / asked, distractor_depths])
        head = np.concatenate([context.template.head_ids(tokenizer), encode(tokenizer, wording.instruction)])
        ends = [_encode_end(tokenizer, *end) for end in self._ends(wording, context.template.tail, keys, values)]
        longest = max(len(question) + budget for question, budget, _ in ends)
        used = len(head) + sum(map(len, facts)) + longest
        piece = take_piece(context.corpus.stream, length - used, start, f"{len(facts)} facts and a question", used)
        text = [segment for segment, _ in splice(piece, facts, place(tokenizer, wording, piece, depths))]
        for question, budget, references in ends:
            prompt = np.concatenate([head, *text, question])
            yield Question(prompt, references, budget, np.concatenate([head, question]), depth, group=number)

    def _ends(
        self, wording: Wording, tail: str, keys: list[str], values: list[list[str]]
    ) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Yield the text after the context (question and beginning of the answer), the answer and its values."""
        asked, expected = keys[: self.keys], values[: self.keys]
        if self.values > 1 and wording.several_values is None:
            raise PePatchError(
                f"The wording {wording.name!r} cannot ask for several values of one key, which {self.name!r} needs; "
                "needle_single, needle_multi_key and needle_multi_query work with it."
            )
        if self.keys > 1 and wording.several_keys is not None:
            question, lead = wording.several_keys
            single_values = [value for (value,) in expected]
            yield _fill_question(wording, question, lead, tail, single_values, keys=SEPARATOR.join(asked))
            return
        for key, values_of_key in zip(asked, expected, strict=True):
            question, lead = wording.several_values or ("", "") if self.values > 1 else (wording.question, wording.lead)
            yield _fill_question(wording, question, lead, tail, values_of_key, key=key, count=len(values_of_key))


def _fill_question(
    wording: Wording, question: str, lead: str, tail: str, values: list[str], **names: Any
) -> tuple[str, str, tuple[str, ...]]:
    answer = wording.answer.format(value=SEPARATOR.join(values))
    return question.format(**names) + tail + lead.format(**names), answer, tuple(values)


def _encode_end(tokenizer: Any, question: str, answer: str, references: tuple[str, ...]) -> tuple[np.ndarray, int, Any]:
    """Return the ids of the question `[n]`, the number of tokens of the answer, and the references."""
    ids, answer_ids = encode_pair(tokenizer, question, answer)
    return ids, len(answer_ids), references


@dataclass(frozen=True)
class NeedleSingle(_HeatMap):
    """A heat map of one fact."""

    name: ClassVar[str] = "needle_single"
    summary: ClassVar[str] = "heat map: retrieve one fact at each depth of each length"


@dataclass(frozen=True)
class NeedleMultiKey(_HeatMap):
    """A heat map of one fact among facts about other keys."""

    distractors: int = 7
    name: ClassVar[str] = "needle_multi_key"
    summary: ClassVar[str] = "heat map: retrieve one fact among facts about other keys"


@dataclass(frozen=True)
class NeedleMultiValue(_HeatMap):
    """A heat map of several values of one key."""

    name: ClassVar[str] = "needle_multi_value"
    summary: ClassVar[str] = "heat map: retrieve all four values of one key"
    values: ClassVar[int] = 4


@dataclass(frozen=True)
class NeedleMultiQuery(_HeatMap):
    """A heat map of facts about several keys."""

    name: ClassVar[str] = "needle_multi_query"
    summary: ClassVar[str] = "heat map: retrieve the values of four keys"
    keys: ClassVar[int] = 4


HEAT_MAP: Mapping[str, type[QuestionTask]] = {
    task.name: task for task in (NeedleSingle, NeedleMultiKey, NeedleMultiValue, NeedleMultiQuery)
}
