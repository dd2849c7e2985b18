"""RULER's tasks as an evaluation asks them: their options, their stamps and the name that a result may bear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ....errors import PePatchError, unknown
from ...context import EvaluationContext, WorkUnit
from ...corpus import whole_ids
from ...question import Question
from ...question_task import QuestionTask
from .generator import VERSION, Generator, Sample, Tokens
from .niah import WITH_TOKENS
from .official import official
from .scoring import postprocess, string_match_all
from .wording import ENGLISH, NAMES, OFFICIAL, Wording, choose

RULER_ITSELF, RULER_LIKE = "RULER", "after RULER"
"""What a row's stamps call its benchmark: where nothing was substituted, and where something was."""


@dataclass(frozen=True)
class Made:
    """A generator, what rows say about the text that it uses, and, once all samples are made, what of it is not
    RULER's own."""

    generator: Generator
    stamps: dict[str, Any]
    substitutes: Callable[[], list[str]] = list


@dataclass(frozen=True)
class RulerTask(QuestionTask):
    """One of RULER's tasks. Needles, values, places and answers are RULER's own for the same tokenizer and seed.

    `wording` is "english" (ours), "official" (RULER's, read from the installed lm-eval), "tokens" (single tokens, for
    the demo's vocabulary) or None for the one that fits the vocabulary. RULER's search for a size leaves a part of the
    window empty, with running text up to three quarters of a short one; `exact_fit` fills it.
    """

    wording: str | None = None
    exact_fit: bool = False

    paper: ClassVar[str] = "Hsieh et al. 2024, arXiv 2404.06654"
    match: ClassVar[Callable[[str, Sequence[str]], float]] = staticmethod(string_match_all)

    def __post_init__(self) -> None:
        if self.wording is not None and self.wording not in NAMES:
            raise unknown("wording", self.wording, NAMES)

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None = None, within: int | None = None
    ) -> list[Question]:
        key = context.key(self, "facts", length)
        with self._named():
            if within is None:
                questions, facts = self._ask(context, length)
                context.remember(key, facts)
            else:
                facts = context.recall(key)
                if facts is None:
                    facts = context.remember(key, self._ask(context, length)[1])
                questions, _ = self._ask(context, within, facts)
        return questions

    def score(self, prediction: str, references: Sequence[str]) -> float:
        return type(self).match(postprocess(prediction), references)

    def measure(self) -> str:
        return "share of references found"

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        stamps, budget = questions[0].stamps, questions[0].budget
        substitutes = [each for each in stamps["substitutes"] if stamps["haystack"] not in each]
        other = f" with {', '.join(substitutes)}" if substitutes else ""
        which = "of RULER" if stamps["benchmark"] == RULER_ITSELF else f"{RULER_LIKE}{other}"
        return (
            f"{len(questions)} questions {which}, in {stamps['haystack']}; {self.measure()}, "
            f"greedy answers of at most {budget} token{'s' if budget > 1 else ''}"
        )

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> Made:
        """The generator of this task's samples, for one length."""
        raise NotImplementedError

    def check(self, context: EvaluationContext) -> None:
        """Raise now what would be raised when the first question is made."""
        if choose(self.wording, context.model.tokenizer, self.name, WITH_TOKENS) == OFFICIAL:
            official()

    def work_units(self, context: EvaluationContext, length: int) -> Iterator[WorkUnit]:
        with self._named():
            self.check(context)
        yield from super().work_units(context, length)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors within say which task they are of."""
        try:
            yield
        except PePatchError as error:
            raise type(error)(f"{self.name}: {error}") from error

    def _ask(
        self, context: EvaluationContext, length: int, facts: Sequence[Any] | None = None
    ) -> tuple[list[Question], list[Any]]:
        """The questions, and the facts behind them: new ones, or those given."""
        # Of a tokenizer that cuts, no text would ever be too long.
        whole_ids(context.model.tokenizer, "door " * (2 * length))
        name = choose(self.wording, context.model.tokenizer, self.name, WITH_TOKENS)
        wording = official() if name == OFFICIAL else replace(ENGLISH, name=name)
        made = self.make(context, _counter(context), length, wording)
        generator, questions, kept = made.generator, [], []
        samples = generator.samples(context.samples, self.exact_fit) if facts is None else generator.again(facts)
        for sample in samples:
            group = len(kept) if len(sample.prompts) > 1 else None
            kept.append(sample.facts)
            questions += self._questions(context, sample, generator.budget, group)
            if len(questions) >= context.samples:
                break
        stamps = self._stamps(context, made, wording)
        return [replace(question, stamps=stamps) for question in questions[: context.samples]], kept

    def _questions(
        self, context: EvaluationContext, sample: Sample, budget: int, group: int | None
    ) -> Iterable[Question]:
        for prompt in sample.prompts:
            yield Question(
                prompt=context.prompt(prompt.text, prompt.answer_prefix),
                references=prompt.references,
                budget=budget,
                without_context=context.prompt(prompt.bare, prompt.answer_prefix),
                group=group,
            )

    def _stamps(self, context: EvaluationContext, made: Made, wording: Wording) -> dict[str, Any]:
        substitutes = [] if wording.name.startswith(OFFICIAL) else [f"wording {wording.name}"]
        substitutes += made.substitutes()
        if self.exact_fit:
            substitutes.append("sizes that fill the window")
        if made.generator.endless:
            substitutes.append("sizes found where RULER's search does not end")
        return {
            "benchmark": RULER_LIKE if substitutes else RULER_ITSELF,
            "substitutes": substitutes,
            "wording": wording.name,
            "tokenizer_hash": context.tokenizer_hash,
            "generator": VERSION,
            **made.stamps,
        }


def _counter(context: EvaluationContext) -> Tokens:
    """Counts as RULER does: without the token that a text starts with, but with a chat template."""
    tokenizer, frame = context.model.tokenizer, context.template

    def tokens(text: str, answer_prefix: str) -> int:
        whole = f"{frame.head}{text}{frame.tail}{answer_prefix}"
        return len(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])

    return tokens
