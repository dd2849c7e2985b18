"""Tasks that ask: a prompt, the answers that would be right, and everything that makes a score of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ..errors import PePatchError
from .bench import Bench, Outcome, Piece

EXAMPLES = 3
"""Answers of a row that are shown with it; all of them go to the file of answers."""
TAIL = 240
"""Characters of a prompt's end that are kept with an answer."""


@dataclass(frozen=True)
class Question:
    """One prompt whose answers are known."""

    prompt: np.ndarray
    """Token ids [n], int64: all that the model is given."""
    references: tuple[str, ...]
    budget: int
    """The most tokens that the answer may take; they count in the length."""
    without_context: np.ndarray | None = None
    """The same question with nothing to read before it [m]: what the model knows without the text."""
    depth: float | None = None
    """Where the answer stands: 0 is the start of the text, 1 its end."""
    group: int | None = None
    """The same for questions about the same text, whose answers are not independent; None where each has its own."""
    stamps: Mapping[str, Any] = field(default_factory=dict)
    """What the row should tell of its questions (JSON-able, the same for all of them)."""


class QuestionTask:
    """A task whose score is a share of right answers. Subclasses are frozen dataclasses whose fields are its options.

    They say what is asked (`questions`) and what an answer is worth (`score`); the rest is here, the same for all: the
    budget is checked, every score has its interval and two controls, the same questions within the trained window and
    with nothing to read.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    retrieves: ClassVar[bool] = True
    by_depth: ClassVar[bool] = False
    """One row for each depth, else one for each length."""
    shares_text: ClassVar[bool] = False
    """Questions of one number have the same text at every depth: they are asked together, and it is read once."""
    same_at_every_length: ClassVar[bool] = False
    """The facts do not depend on the length, so that one control serves all lengths."""

    def questions(
        self, bench: Bench, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[Question]:
        """The questions of one cell, prompts and answers at most `length` tokens; `within` shortens their text only."""
        raise NotImplementedError

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """What an answer is worth, from 0 to 1."""
        raise NotImplementedError

    def measure(self) -> str:
        """What is counted, in a few words."""
        raise NotImplementedError

    def measured_on(self, bench: Bench, questions: Sequence[Question]) -> str:
        """A sentence: how many questions, over which text, and how they are judged."""
        each = " at each depth" if self.by_depth else ""
        budget = max(question.budget for question in questions)
        return (
            f"{len(questions)} questions{each} in {bench.corpus.name}; {self.measure()}, greedy answers of at most "
            f"{budget} token{'s' if budget > 1 else ''}"
        )

    def stamps(self, bench: Bench) -> dict[str, Any]:
        """What the task's rows carry beside their numbers (JSON-able)."""
        return {}

    def pieces(self, bench: Bench, length: int) -> Iterator[Piece]:
        """One piece for each depth, or one for all of them where they share their text."""
        if not self.by_depth:
            yield self._piece(bench, length, (None,), bench.samples)
        elif self.shares_text:
            yield self._piece(bench, length, tuple(bench.depths), bench.samples_per_depth)
        else:
            for depth in bench.depths:
                yield self._piece(bench, length, (depth,), bench.samples_per_depth)

    def _piece(self, bench: Bench, length: int, depths: tuple[float | None, ...], count: int) -> Piece:
        control = bench.control_length if length > bench.control_length and not self.same_at_every_length else 0
        name = "all" if len(depths) != 1 or depths[0] is None else f"depth {depths[0]}"
        tokens = count * len(depths) * (length + control)
        return Piece(name, tokens, partial(self._measure, bench, length, depths))

    def _measure(self, bench: Bench, length: int, depths: tuple[float | None, ...]) -> Outcome:
        asked = {depth: list(self.questions(bench, length, depth)) for depth in depths}
        for questions in asked.values():
            _check(self, questions, length)
        with bench.timed() as work:
            given = self._answers(bench, asked)
        work.seconds /= len(depths)
        rows, answers = [], []
        for depth, questions in asked.items():
            found, texts = self._judge(given[depth], questions), given[depth]
            rows.append(self._row(bench, work, length, depth, questions, texts, found))
            answers += [
                {"task": self.name, "length": length, "depth": depth, "number": number}
                | _example(bench, question, text, score)
                for number, (question, text, score) in enumerate(zip(questions, texts, found, strict=True))
            ]
        return Outcome(rows, answers)

    def _answers(self, bench: Bench, asked: dict[float | None, list[Question]]) -> dict[float | None, list[str]]:
        """Asked number by number, so that prompts with the same text stand side by side."""
        order = [
            (depth, number)
            for number in range(max(map(len, asked.values())))
            for depth, questions in asked.items()
            if number < len(questions)
        ]
        given = bench.subject.answers([asked[depth][number] for depth, number in order])
        found: dict[float | None, list[str]] = {depth: [] for depth in asked}
        for (depth, _), text in zip(order, given, strict=True):
            found[depth].append(text)
        return found

    def _judge(self, given: Sequence[str], questions: Sequence[Question]) -> list[float]:
        return [float(self.score(text, question.references)) for text, question in zip(given, questions, strict=True)]

    def _row(
        self,
        bench: Bench,
        work: Any,
        length: int,
        depth: float | None,
        questions: list[Question],
        texts: list[str],
        scores: list[float],
    ) -> Any:
        from .metrics import score_interval

        groups = [number if each.group is None else each.group for number, each in enumerate(questions)]
        low, high = score_interval(scores, groups)
        score = sum(scores) / len(scores)
        control, reason = self._within(bench, length, depth, score)
        sizes = [len(question.prompt) for question in questions]
        return bench.row(
            work,
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
            control_length=min(length, bench.control_length),
            without_context=self._bare(bench, length, depth, questions),
            measured_on=self.measured_on(bench, questions),
            details={
                "scores": scores,
                **({"groups": groups} if any(each.group is not None for each in questions) else {}),
                "prompt_tokens": {"mean": sum(sizes) / len(sizes), "least": min(sizes), "greatest": max(sizes)},
                **({"no_control": reason} if reason else {}),
                "stamps": {**self.stamps(bench), **questions[0].stamps},
                "examples": [
                    _example(bench, *each) for each in list(zip(questions, texts, scores, strict=True))[:EXAMPLES]
                ],
            },
        )

    def _within(self, bench: Bench, length: int, depth: float | None, score: float) -> tuple[float | None, str]:
        """The score of the same questions where their text fits the trained window, or why there is none."""
        if length < bench.control_length:
            return score, ""

        def measured() -> list[Any]:
            if length == bench.control_length:
                return [score, ""]
            try:
                questions = list(self.questions(bench, length, depth, within=bench.control_length))
                _check(self, questions, bench.control_length)
            except PePatchError as error:  # questions too long for the window: the row says so
                return [None, str(error)]
            return [self._mean(bench, questions), ""]

        value, reason = bench.once(self._shared_key(bench, "within", length, depth), measured)
        return value, reason

    def _bare(self, bench: Bench, length: int, depth: float | None, questions: list[Question]) -> float | None:
        """The score of the same questions with nothing to read; None where they say nothing without their text."""
        bare = [replace(each, prompt=each.without_context) for each in questions if each.without_context is not None]
        if len(bare) < len(questions):
            return None
        measured: Callable[[], float] = lambda: self._mean(bench, bare)  # noqa: E731
        return bench.once(self._shared_key(bench, "bare", length, depth), measured)

    def _shared_key(self, bench: Bench, what: str, length: int, depth: float | None) -> str:
        return bench.key(self, what, depth, None if self.same_at_every_length else length)

    def _mean(self, bench: Bench, questions: list[Question]) -> float:
        scores = self._judge(bench.subject.answers(questions), questions)
        return sum(scores) / len(scores)


def _check(task: QuestionTask, questions: Sequence[Question], length: int) -> None:
    """Nothing may be cut: a prompt and its answer fill at most the length (an answer's last token is never read)."""
    if not questions:
        raise PePatchError(f"The task {task.name!r} has no question at {length} tokens.")
    longest = max(len(question.prompt) + question.budget - 1 for question in questions)
    if longest > length:
        raise PePatchError(
            f"The task {task.name!r} made a prompt of {longest} tokens, its answer included, where {length} were asked "
            "for. A prompt is never cut: ask for a greater length."
        )


def _example(bench: Bench, question: Question, text: str, score: float) -> dict[str, Any]:
    end = bench.subject.tokenizer.decode(question.prompt[-TAIL:])[-TAIL:]
    return {
        "question": end,
        "prediction": text,
        "references": list(question.references),
        "score": score,
        "prompt_tokens": len(question.prompt),
    }
