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
    """Facts in real text at a given depth; a score is the share of the values asked for that the answer holds.

    The first fact asked for stands at the depth, the others asked for follow it evenly up to the end of the text, as
    in Kamradt's multi-needle test; distractors have places of their own. Text, facts and places depend on the number
    of the question alone, so that the text before the first fact is read once for all depths. `distractors` are facts
    about other keys, `wording` as in `Needle`.
    """

    distractors: int = 0
    wording: str | Wording | None = None

    by_depth: ClassVar[bool] = True
    shares_text: ClassVar[bool] = True
    same_at_every_length: ClassVar[bool] = True
    keys: ClassVar[int] = 1
    values: ClassVar[int] = 1
    """Of each key that is asked for."""
    paper: ClassVar[str] = "Kamradt 2023, LLMTest_NeedleInAHaystack (the idea; wording and generator are ours)"

    def __post_init__(self) -> None:
        if self.distractors < 0:
            raise OptionError(f"distractors cannot be negative, got {self.distractors}.")

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """The share of the references that occur in the answer."""
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
        numbers = range(context.samples_per_depth)
        return [each for number in numbers for each in self._about(context, within or length, depth or 0.0, number)]

    def _about(self, context: EvaluationContext, length: int, depth: float, number: int) -> Iterator[Question]:
        """The questions about one text: one, or one for each key where the wording asks for keys one by one."""
        tokenizer, wording = context.model.tokenizer, resolve_wording(self.wording, context)
        rng = np.random.default_rng([context.seed, zlib.crc32(self.name.encode()), number])
        keys = wording.draw_keys(rng, self.keys + self.distractors)
        values = [wording.draw_values(rng, self.values if i < self.keys else 1) for i in range(len(keys))]
        start, elsewhere = rng.random(), rng.random(self.distractors)
        facts = [
            encode(tokenizer, wording.needle.format(key=key, value=value))
            for key, several in zip(keys, values, strict=True)
            for value in several
        ]
        asked = self.keys * self.values
        depths = np.concatenate([depth + (1 - depth) * np.arange(asked) / asked, elsewhere])
        head = np.concatenate([context.template.head_ids(tokenizer), encode(tokenizer, wording.instruction)])
        ends = [_ids(tokenizer, *end) for end in self._ends(wording, context.template.tail, keys, values)]
        longest = max(len(question) + budget for question, budget, _ in ends)
        used = len(head) + sum(map(len, facts)) + longest
        piece = take_piece(context.corpus.stream, length - used, start, f"{len(facts)} facts and a question", used)
        text = [part for part, _ in splice(piece, facts, place(tokenizer, wording, piece, depths))]
        for question, budget, references in ends:
            prompt = np.concatenate([head, *text, question])
            yield Question(prompt, references, budget, np.concatenate([head, question]), depth, group=number)

    def _ends(
        self, wording: Wording, tail: str, keys: list[str], values: list[list[str]]
    ) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """What stands after the text (question and the answer's beginning), the answer and its parts."""
        asked, right = keys[: self.keys], values[: self.keys]
        if self.values > 1 and wording.several_values is None:
            raise PePatchError(
                f"The wording {wording.name!r} cannot ask for several values of one key, as {self.name!r} does; "
                "needle_single, needle_multi_key and needle_multi_query work with it."
            )
        if self.keys > 1 and wording.several_keys is not None:
            question, lead = wording.several_keys
            yield (*_written(wording, question, lead, tail, [one for (one,) in right], keys=SEPARATOR.join(asked)),)
            return
        for key, several in zip(asked, right, strict=True):
            question, lead = wording.several_values or ("", "") if self.values > 1 else (wording.question, wording.lead)
            yield (*_written(wording, question, lead, tail, several, key=key, count=len(several)),)


def _written(
    wording: Wording, question: str, lead: str, tail: str, values: list[str], **names: Any
) -> tuple[str, str, tuple[str, ...]]:
    answer = wording.answer.format(value=SEPARATOR.join(values))
    return question.format(**names) + tail + lead.format(**names), answer, tuple(values)


def _ids(tokenizer: Any, question: str, answer: str, references: tuple[str, ...]) -> tuple[np.ndarray, int, Any]:
    """The question's ids, how many tokens the answer has, and its parts."""
    ids, right = encode_pair(tokenizer, question, answer)
    return ids, len(right), references


@dataclass(frozen=True)
class NeedleSingle(_HeatMap):
    """One fact."""

    name: ClassVar[str] = "needle_single"
    summary: ClassVar[str] = "heat map: one fact at each depth of each length"


@dataclass(frozen=True)
class NeedleMultiKey(_HeatMap):
    """One fact among facts about other keys."""

    distractors: int = 7
    name: ClassVar[str] = "needle_multi_key"
    summary: ClassVar[str] = "heat map: one fact among others about other keys"


@dataclass(frozen=True)
class NeedleMultiValue(_HeatMap):
    """Several facts about one key, all asked for."""

    name: ClassVar[str] = "needle_multi_value"
    summary: ClassVar[str] = "heat map: all of four values of one key are asked for"
    values: ClassVar[int] = 4


@dataclass(frozen=True)
class NeedleMultiQuery(_HeatMap):
    """Facts about several keys, all asked for."""

    name: ClassVar[str] = "needle_multi_query"
    summary: ClassVar[str] = "heat map: the values of four keys are asked for"
    keys: ClassVar[int] = 4


HEAT_MAP: Mapping[str, type[QuestionTask]] = {
    task.name: task for task in (NeedleSingle, NeedleMultiKey, NeedleMultiValue, NeedleMultiQuery)
}
