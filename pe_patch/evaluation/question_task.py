"""Tasks that ask questions: subclasses make and score them, the base class measures them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from ..errors import PePatchError
from .context import EvaluationContext, Outcome, ResourceUsage, WorkUnit
from .model import Work
from .question import Question, scores_references
from .results import Row

EXAMPLES_PER_ROW = 3
"""Answers that a row keeps. The file of answers has all of them."""
PROMPT_TAIL = 240
"""Characters of the end of a prompt that are kept with an answer."""


class QuestionTask:
    """A task whose score is the mean of its questions' scores. Subclasses are frozen dataclasses of its options.

    A subclass makes the questions (`questions`), scores an answer (`score`) and names the score (`measure`). The base
    class checks that every prompt fits its length, and gives every score an interval and two controls: the same
    questions within the trained window, and the same questions without their text.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    retrieves: ClassVar[bool] = True
    """True if the score shows that the model reads its context."""
    by_depth: ClassVar[bool] = False
    """True for one row per depth, False for one row per length."""
    shares_text: ClassVar[bool] = False
    """True if question i has the same text at every depth, so that the model reads the text once for all depths."""
    same_at_every_length: ClassVar[bool] = False
    """True if the facts do not depend on the length, so that one control serves all lengths."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "score" in vars(cls):
            cls.score = scores_references(cls.score)

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        """Make the questions for one length and depth.

        Args:
            context: Model, text and settings of the evaluation.
            length: Maximum tokens of a prompt and its answer.
            depth: Position of the answer, from 0 (start) to 1 (end); None for tasks without depths.
            within: Maximum tokens for the control. The questions stay the same and only their text gets shorter.
        """
        raise NotImplementedError

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Score an answer from 0 to 1."""
        raise NotImplementedError

    def measure(self) -> str:
        """Name the score in a few words."""
        raise NotImplementedError

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        """Describe the questions in a sentence: how many, about which text, and how they are scored."""
        each = " at each depth" if self.by_depth else ""
        budget = max(question.budget for question in questions)
        return (
            f"{len(questions)} questions{each} in {context.corpus.name}; {self.measure()}, greedy answers of at most "
            f"{budget} token{'s' if budget > 1 else ''}"
        )

    def identity(self, context: EvaluationContext) -> str:
        """Identify the task with everything its questions depend on beside the settings of the evaluation."""
        return repr(self)

    def stamps(self, context: EvaluationContext) -> dict[str, Any]:
        """Return JSON-able facts about the task for its rows."""
        return {}

    def work_units(self, context: EvaluationContext, length: int) -> Iterator[WorkUnit]:
        """Yield one unit per depth, or a single unit if all depths share their text."""
        depths = tuple(depth for depth in context.depths if context.samples_at(depth))
        if not self.by_depth:
            yield self._work_unit(context, length, (None,))
        elif self.shares_text:
            yield self._work_unit(context, length, depths)
        else:
            for depth in depths:
                yield self._work_unit(context, length, (depth,))

    def _work_unit(self, context: EvaluationContext, length: int, depths: tuple[float | None, ...]) -> WorkUnit:
        control = context.control_tokens(length) if self.same_at_every_length else context.control_length
        has_control = length > context.control_length and control > 0
        name = "all" if len(depths) != 1 or depths[0] is None else f"depth {depths[0]}"
        asked = sum(map(context.samples_at, depths))
        tokens = asked * (length + (control if has_control else 0))
        # each question, its control, and the question without its text, which is short
        work = Work(prompts=asked * (2 + has_control), tokens=tokens)
        return WorkUnit(name, work, partial(self._measure, context, length, depths))

    def _measure(self, context: EvaluationContext, length: int, depths: tuple[float | None, ...]) -> Outcome:
        questions = {depth: list(self.questions(context, length, depth)) for depth in depths}
        for asked in questions.values():
            _check_lengths(self, asked, length)
        with context.timed() as usage:
            texts = self._answer_all_depths(context, questions)
        usage.seconds /= len(depths)
        rows, answers = [], []
        for depth, asked in questions.items():
            scores = self._scores(texts[depth], asked)
            rows.append(self._row(context, usage, length, depth, asked, texts[depth], scores))
            answers += [
                {"task": self.name, "length": length, "depth": depth, "number": number}
                | _example(context, question, text, score)
                for number, (question, text, score) in enumerate(zip(asked, texts[depth], scores, strict=True))
            ]
        return Outcome(rows, answers)

    def _answer_all_depths(
        self, context: EvaluationContext, questions: dict[float | None, list[Question]]
    ) -> dict[float | None, list[str]]:
        """Answer question 1 of every depth, then question 2, so that prompts with the same text are neighbours."""
        order = [
            (depth, number)
            for number in range(max(map(len, questions.values())))
            for depth, asked in questions.items()
            if number < len(asked)
        ]
        answers = context.model.answers([questions[depth][number] for depth, number in order])
        texts: dict[float | None, list[str]] = {depth: [] for depth in questions}
        for (depth, _), text in zip(order, answers, strict=True):
            texts[depth].append(text)
        return texts

    def _scores(self, texts: Sequence[str], questions: Sequence[Question]) -> list[float]:
        pairs = zip(texts, questions, strict=True)
        scores = [float(self.score(text, question.references)) for text, question in pairs]
        if wrong := [score for score in scores if not 0 <= score <= 1]:
            raise PePatchError(
                f"The task {self.name!r} gave an answer the score {wrong[0]}; scores must be from 0 to 1."
            )
        return scores

    def _row(
        self,
        context: EvaluationContext,
        usage: ResourceUsage,
        length: int,
        depth: float | None,
        questions: list[Question],
        texts: list[str],
        scores: list[float],
    ) -> Row:
        from .metrics import score_interval

        groups = [number if question.group is None else question.group for number, question in enumerate(questions)]
        low, high = score_interval(scores, groups)
        score = sum(scores) / len(scores)
        control, no_control = self._control(context, length, depth, score)
        sizes = [len(question.prompt) for question in questions]
        return context.row(
            usage,
            task=self.name,
            measure=self.measure(),
            length=length,
            tokens=max(size + question.budget for size, question in zip(sizes, questions, strict=True)),
            depth=depth,
            score=score,
            low=low,
            high=high,
            samples=len(scores),
            control=control,
            control_length=min(length, context.control_length),
            without_context=self._score_without_context(context, length, depth, questions),
            measured_on=self.measured_on(context, questions),
            details={
                "scores": scores,
                **({"groups": groups} if any(question.group is not None for question in questions) else {}),
                "prompt_tokens": {"mean": sum(sizes) / len(sizes), "least": min(sizes), "greatest": max(sizes)},
                **({"no_control": no_control} if no_control else {}),
                "stamps": {**self.stamps(context), **questions[0].stamps},
                "examples": [
                    _example(context, *example)
                    for example in list(zip(questions, texts, scores, strict=True))[:EXAMPLES_PER_ROW]
                ],
            },
        )

    def _control(
        self, context: EvaluationContext, length: int, depth: float | None, score: float
    ) -> tuple[float | None, str]:
        """Return the score of the same questions within the trained window, or None and the reason for it.

        All lengths share the control if the questions do not depend on the length. The journal keeps it.
        """
        if length < context.control_length:
            return score, ""
        key = self._shared_key(context, "within", length, depth)
        control = context.recall(key)
        if control is None:
            if length == context.control_length:
                control = [score, ""]
            else:
                control = self._measure_control(context, length, depth)
            control = context.remember(key, control)
        value, reason = control
        return value, reason

    def _measure_control(self, context: EvaluationContext, length: int, depth: float | None) -> list[Any]:
        try:
            questions = list(self.questions(context, length, depth, within=context.control_length))
            _check_lengths(self, questions, context.control_length)
        except PePatchError as error:  # the questions do not fit the window: the row gives the reason
            return [None, str(error)]
        return [self._mean_score(context, questions), ""]

    def _score_without_context(
        self, context: EvaluationContext, length: int, depth: float | None, questions: list[Question]
    ) -> float | None:
        """Return the score of the same questions without their text; None if they make no sense without it."""
        bare = [
            replace(question, prompt=question.without_context)
            for question in questions
            if question.without_context is not None
        ]
        if len(bare) < len(questions):
            return None
        key = self._shared_key(context, "bare", length, depth)
        score = context.recall(key)
        return context.remember(key, self._mean_score(context, bare)) if score is None else score

    def _shared_key(self, context: EvaluationContext, name: str, length: int, depth: float | None) -> str:
        return context.key(self, name, depth, None if self.same_at_every_length else length)

    def _mean_score(self, context: EvaluationContext, questions: list[Question]) -> float:
        scores = self._scores(context.model.answers(questions), questions)
        return sum(scores) / len(scores)


def _check_lengths(task: QuestionTask, questions: Sequence[Question], length: int) -> None:
    """Raise `PePatchError` if a prompt and its answer exceed the length.

    The last answer token does not count, since the model never reads it.
    """
    if not questions:
        raise PePatchError(f"The task {task.name!r} has no question at {length} tokens.")
    longest = max(len(question.prompt) + question.budget - 1 for question in questions)
    if longest > length:
        raise PePatchError(
            f"The task {task.name!r} made a prompt of {longest} tokens, answer included, for a length of {length}. "
            "Prompts are never cut: use a greater length."
        )


def _example(context: EvaluationContext, question: Question, text: str, score: float) -> dict[str, Any]:
    end = context.model.tokenizer.decode(question.prompt[-PROMPT_TAIL:])[-PROMPT_TAIL:]
    return {
        "question": end,
        "prediction": text,
        "references": list(question.references),
        "score": score,
        "prompt_tokens": len(question.prompt),
    }
