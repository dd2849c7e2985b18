"""Base class of RULER's tasks: options, questions, and the name that a result may carry."""

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
from .material import file_digest
from .niah import WITH_TOKENS
from .official import official
from .scoring import postprocess, string_match_all
from .wording import NAMES, OFFICIAL, OWN, Wording, choose

RULER_ITSELF, RULER_LIKE = "RULER", "after RULER"
"""The name of the benchmark in a row's stamps, without and with substitutes for RULER's material."""


@dataclass(frozen=True)
class GeneratorSetup:
    """A generator with the description of its material."""

    generator: Generator
    stamps: dict[str, Any]
    """The entries for the rows about the text."""
    substitutes: Callable[[], list[str]] = list
    """Returns the material that is not RULER's; call it after generating all samples."""


@dataclass(frozen=True)
class RulerTask(QuestionTask):
    """One of RULER's tasks. Needles, values, places and answers equal RULER's for the same tokenizer and seed.

    Args:
        wording: "official" (RULER's words, from the installed lm-eval), "own" (ours) or "tokens" (single tokens, for
            the vocabulary of the demo model). None takes "tokens" for the demo's vocabulary, else "official", or "own"
            where lm-eval is not installed.
        exact_fit: True to fill the window. RULER's search for a size leaves part of it empty, for running text up to
            three quarters of a short window.
    """

    wording: str | None = None
    exact_fit: bool = False

    paper: ClassVar[str] = "Hsieh et al. 2024, arXiv 2404.06654"
    match: ClassVar[Callable[[str, Sequence[str]], float]] = staticmethod(string_match_all)

    def __post_init__(self) -> None:
        if self.wording == "english":  # the name that the needle tasks have for our words
            object.__setattr__(self, "wording", OWN.name)
        if self.wording is not None and self.wording not in NAMES:
            raise unknown("wording", self.wording, NAMES)

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None = None, within: int | None = None
    ) -> list[Question]:
        """Return the questions; with `within`, the same facts in a shorter text."""
        with self._name_in_errors():
            key = context.key(self, "facts", length)
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
        substitutes = [substitute for substitute in stamps["substitutes"] if stamps["haystack"] not in substitute]
        replaced = f" with {', '.join(substitutes)}" if substitutes else ""
        source = "of RULER" if stamps["benchmark"] == RULER_ITSELF else f"{RULER_LIKE}{replaced}"
        return (
            f"{len(questions)} questions {source}, in {stamps['haystack']}; {self.measure()}, "
            f"greedy answers of at most {budget} token{'s' if budget > 1 else ''}"
        )

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> GeneratorSetup:
        """Return the generator of this task's samples for one length."""
        raise NotImplementedError

    def check(self, context: EvaluationContext) -> None:
        """Raise the errors of the first question early, before the evaluation starts."""
        if choose(self.wording, context.model.tokenizer, self.name, WITH_TOKENS) == OFFICIAL:
            official()

    def identity(self, context: EvaluationContext) -> str:
        """Add the wording that an unset option takes, and the content of the files."""
        name = choose(self.wording, context.model.tokenizer, self.name, WITH_TOKENS)
        wording = official().name if name == OFFICIAL else name
        paths = [getattr(self, option, None) for option in ("haystack", "words", "squad", "hotpotqa")]
        return f"{self!r} {wording} {[file_digest(path) for path in paths if path]}"

    def work_units(self, context: EvaluationContext, length: int) -> Iterator[WorkUnit]:
        with self._name_in_errors():
            self.check(context)
        yield from super().work_units(context, length)

    @contextmanager
    def _name_in_errors(self) -> Iterator[None]:
        """Prefix errors inside the context with the name of the task."""
        try:
            yield
        except PePatchError as error:
            raise type(error)(f"{self.name}: {error}") from error

    def _ask(
        self, context: EvaluationContext, length: int, facts: Sequence[Any] | None = None
    ) -> tuple[list[Question], list[Any]]:
        """Return the questions and their facts, which are drawn unless given."""
        # With a truncating tokenizer no text would ever be too long; this raises for one.
        whole_ids(context.model.tokenizer, "door " * (2 * length))
        name = choose(self.wording, context.model.tokenizer, self.name, WITH_TOKENS)
        wording = official() if name == OFFICIAL else replace(OWN, name=name)
        setup = self.make(context, _counter(context), length, wording)
        generator, questions, used_facts = setup.generator, [], []
        samples = generator.samples(context.samples, self.exact_fit) if facts is None else generator.with_facts(facts)
        for sample in samples:
            group = len(used_facts) if len(sample.prompts) > 1 else None
            used_facts.append(sample.facts)
            questions += self._questions(context, sample, generator.budget, group)
            if len(questions) >= context.samples:
                break
        stamps = self._stamps(context, setup, wording)
        return [replace(question, stamps=stamps) for question in questions[: context.samples]], used_facts

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

    def _stamps(self, context: EvaluationContext, setup: GeneratorSetup, wording: Wording) -> dict[str, Any]:
        substitutes = [] if wording.name.startswith(OFFICIAL) else [f"wording {wording.name}"]
        substitutes += setup.substitutes()
        if self.exact_fit:
            substitutes.append("sizes that fill the window")
        if setup.generator.endless:
            substitutes.append("sizes found where RULER's search does not end")
        return {
            "benchmark": RULER_LIKE if substitutes else RULER_ITSELF,
            "substitutes": substitutes,
            "wording": wording.name,
            "tokenizer_hash": context.tokenizer_hash,
            "generator": VERSION,
            **setup.stamps,
        }


def _counter(context: EvaluationContext) -> Tokens:
    """Return a function that counts tokens as RULER does: without BOS, but with a chat template.

    BOS fits all the same, since the model never reads the last token of the answer. A tokenizer that puts more than one
    token before a text has the others counted.
    """
    tokenizer, frame = context.model.tokenizer, context.template
    more = 0 if frame.chat else max(0, len(context.start_ids) - 1)

    def tokens(text: str, answer_prefix: str) -> int:
        prompt = f"{frame.head}{text}{frame.tail}{answer_prefix}"
        return more + len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])

    return tokens
