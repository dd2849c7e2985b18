"""Hide facts in real text and ask for one of several facts, or for the only one."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ...errors import OptionError, PePatchError, unknown
from ..context import EvaluationContext, WorkUnit
from ..question import Question
from ..question_task import QuestionTask
from ..retrieval import WORDINGS, RetrievalSample, Wording, make_sample, wording_for


@dataclass(frozen=True)
class _HiddenFact(QuestionTask):
    """Questions about facts hidden in real text; prompt and answer fill the length exactly."""

    needles: int = 1
    """The number of hidden facts."""
    wording: str | Wording | None = None
    """A name in WORDINGS or a Wording; None takes the one that fits the tokenizer."""

    by_depth: ClassVar[bool] = True
    same_at_every_length: ClassVar[bool] = True

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the answer equals the reference apart from surrounding white space, else 0."""
        return float(prediction.strip() == references[0].strip())

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        """Return questions whose facts do not depend on the length, so that a control asks for the same facts."""
        total = within or length
        samples = [self._sample(context, total, depth, number) for number in range(context.samples_at(depth))]
        return [
            Question(sample.input_ids, (sample.answer,), len(sample.answer_ids), sample.bare_ids, sample.depth)
            for sample in samples
        ]

    def _sample(self, context: EvaluationContext, length: int, depth: float | None, number: int) -> RetrievalSample:
        sample = self._make_sample(context, length, number, [round((depth or 0.0) * 1e6)], depth)
        if len(sample.input_ids) + len(sample.answer_ids) != length:
            raise PePatchError(f"A prompt and its answer do not have {length} tokens together.")
        return sample

    def _make_sample(
        self,
        context: EvaluationContext,
        length: int,
        number: int,
        seeds: list[int],
        depth: float | Sequence[float] | None,
        asked: int = 0,
    ) -> RetrievalSample:
        return make_sample(
            context.model.tokenizer,
            context.corpus.stream,
            resolve_wording(self.wording, context),
            length=length,
            needles=self.needles,
            depth=depth,
            asked=asked,
            rng=np.random.default_rng([context.seed, zlib.crc32(self.name.encode()), *seeds, number]),
            head=context.template.head_ids(context.model.tokenizer),
            tail=context.template.tail,
        )

    def measure(self) -> str:
        return f"exact answers, {self.needles} needle{'s' if self.needles > 1 else ''}"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return (
            f"{len(questions)} questions at each depth, wording {resolve_wording(self.wording, context).name}, in "
            f"{context.corpus.name}; greedy answer, equal to the right one"
        )

    def stamps(self, context: EvaluationContext) -> dict[str, Any]:
        return {"wording": resolve_wording(self.wording, context).name}


def resolve_wording(wording: str | Wording | None, context: EvaluationContext) -> Wording:
    """Return a wording by name, the given Wording, or the one that fits the tokenizer."""
    if wording is None:
        return wording_for(context.model.tokenizer)
    if isinstance(wording, Wording):
        return wording
    if wording == "own":  # the name that RULER's tasks have for our words
        wording = "english"
    if wording not in WORDINGS:
        raise unknown("wording", wording, WORDINGS)
    return WORDINGS[wording]


@dataclass(frozen=True)
class Needle(_HiddenFact):
    """A task that asks for one of several hidden facts; the others are distractors."""

    needles: int = 8
    shared_text: bool = False
    """Hide a fact at every depth of one text and ask for each in turn, so that the model reads one text for all depths.
    It costs a fraction of a text for each depth; the answers about one text are not independent."""

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "retrieve one of several facts hidden in real text (multi-key needle in a haystack)"
    paper: ClassVar[str] = "Hsieh et al. 2024, arXiv 2404.06654 (the idea; wording and generator are ours)"

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        made = super().questions(context, length, depth, within)
        return [replace(each, group=number) for number, each in enumerate(made)] if self.shared_text else made

    def work_units(self, context: EvaluationContext, length: int) -> Iterator[WorkUnit]:
        if not self.shared_text:
            yield from super().work_units(context, length)
            return
        if len(context.depths) > self.needles:
            raise OptionError(
                f"shared_text hides a fact at each of the {len(context.depths)} depths, and needles is {self.needles}. "
                f"Set needles to at least {len(context.depths)}, or give fewer depths."
            )
        yield self._work_unit(context, length, tuple(depth for depth in context.depths if context.samples_at(depth)))

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        same = ", about the same text at each depth" if self.shared_text else ""
        return super().measured_on(context, questions) + same

    def _sample(self, context: EvaluationContext, length: int, depth: float | None, number: int) -> RetrievalSample:
        if not self.shared_text:
            return super()._sample(context, length, depth, number)
        depths = list(context.depths)
        return self._make_sample(context, length, number, [], depths, 0 if depth is None else depths.index(depth))


@dataclass(frozen=True)
class Passkey(_HiddenFact):
    """A task that asks for the only hidden fact."""

    name: ClassVar[str] = "passkey"
    summary: ClassVar[str] = "retrieve the only fact hidden in real text"
    paper: ClassVar[str] = "Mohtashami and Jaggi 2023, arXiv 2305.16300 (the idea; wording and generator are ours)"


NEEDLE: Mapping[str, type[QuestionTask]] = {task.name: task for task in (Needle, Passkey)}
