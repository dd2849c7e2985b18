"""RULER's types of tasks: needles, variables, common words, code words and documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import ClassVar

from ....errors import OptionError
from ...context import EvaluationContext
from .documents import DocumentQuestions, Documents, Source, load
from .generator import Generator, Tokens
from .material import Essay, digest, essay_from, essay_of, read_words, wonderwords
from .niah import Niah, Shape, TokenNiah
from .scoring import string_match_part
from .source_questions import BY_HOPS
from .task import GeneratorSetup, RulerTask
from .tracking import Tracking
from .wording import TOKENS, Wording
from .words import CommonWords, FrequentWords


@dataclass(frozen=True)
class NiahTask(RulerTask):
    """A task that asks for facts hidden in noise or among similar facts."""

    shape: ClassVar[Shape]

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> GeneratorSetup:
        noise = self.shape.haystack == "noise"
        text = wording.noise if noise else wording.needle
        stamps = {"haystack": "noise" if noise else "needles", "haystack_sha256": digest(text), **_word_source()}
        return GeneratorSetup(self.generator(context, tokens, length, wording), stamps)

    def generator(
        self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording, essay: Essay | None = None
    ) -> Generator:
        generator = TokenNiah if wording.name == TOKENS else Niah
        return generator(tokens, length, context.seed, self.shape, wording, essay)


@dataclass(frozen=True)
class EssayNiahTask(NiahTask):
    """A task that asks for facts hidden in running text.

    Args:
        haystack: a text file, or the JSON file of essays that RULER's script writes; None takes the evaluation's text.
    """

    haystack: str | None = None

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> GeneratorSetup:
        corpus = context.corpus
        essay = essay_from(self.haystack) if self.haystack else essay_of(tuple(corpus.texts), corpus.name)
        stamps = {"haystack": essay.name, "haystack_sha256": essay.sha256, "splitter": essay.splitter.name}
        stamps |= _word_source()
        substitutes = [] if essay.official else [f"haystack {essay.name}"]
        substitutes += [] if essay.splitter.official else [f"splitter {essay.splitter.name}"]
        return GeneratorSetup(self.generator(context, tokens, length, wording, essay), stamps, lambda: substitutes)


@dataclass(frozen=True)
class TrackingTask(RulerTask):
    """A task that asks for the variables in a chain of assignments hidden in noise."""

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> GeneratorSetup:
        stamps = {"haystack": "noise", "haystack_sha256": digest(wording.noise)}
        return GeneratorSetup(Tracking(tokens, length, context.seed, wording), stamps)


@dataclass(frozen=True)
class CommonWordsTask(RulerTask):
    """A task that asks for the most common words of a list.

    Args:
        words: a JSON file of words such as RULER's `english_words.json`, for lengths that need more words than
            wonderwords has; None invents words.
    """

    words: str | None = None

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> GeneratorSetup:
        more = read_words(self.words) if self.words else None
        generator = CommonWords(tokens, length, context.seed, wording, more.words if more else None)
        words = [*wonderwords(), *(more.words if more else ())]
        stamps = {"haystack": "words", "haystack_sha256": digest("\n".join(words)), **_word_source()}

        def substitutes() -> list[str]:
            if not generator.needed_more_words or (more and more.official):
                return []
            return [f"words of {more.name}" if more else "words that do not exist"]

        return GeneratorSetup(generator, stamps, substitutes)


@dataclass(frozen=True)
class FrequentWordsTask(RulerTask):
    """A task that asks for the most frequent code words of a text."""

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> GeneratorSetup:
        return GeneratorSetup(
            FrequentWords(tokens, length, context.seed, wording),
            {"haystack": "random code words", "haystack_sha256": None},
        )


@dataclass(frozen=True)
class DocumentsTask(RulerTask):
    """A task that asks questions about documents."""

    match: ClassVar[Callable[[str, Sequence[str]], float]] = staticmethod(string_match_part)

    def documents(self) -> Documents:
        """Load the documents and their questions."""
        raise NotImplementedError

    def measure(self) -> str:
        return "one of the references found"

    def check(self, context: EvaluationContext) -> None:
        super().check(context)
        self.documents()

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> GeneratorSetup:
        documents = self.documents()
        stamps = {"haystack": documents.name, "haystack_sha256": documents.sha256}
        substitutes = [] if documents.official else [f"questions of {documents.name}"]
        generator = DocumentQuestions(tokens, length, context.seed, wording, documents)
        return GeneratorSetup(generator, stamps, lambda: substitutes)


@dataclass(frozen=True)
class SquadTask(DocumentsTask):
    """Questions of SQuAD."""

    squad: str | None = None
    """Path of SQuAD 2.0's development set. Without it the task raises an error."""

    def documents(self) -> Documents:
        return _load(self.squad, "squad", "SQuAD 2.0 (dev-v2.0.json)", "qa_local_1")


@dataclass(frozen=True)
class HotpotTask(DocumentsTask):
    """Questions of HotpotQA."""

    hotpotqa: str | None = None
    """Path of HotpotQA's development set with distractors. Without it the task raises an error."""

    def documents(self) -> Documents:
        return _load(self.hotpotqa, "hotpotqa", "HotpotQA (hotpot_dev_distractor_v1.json)", "qa_local_2")


@dataclass(frozen=True)
class LocalTask(DocumentsTask):
    """Questions about Python's standard library, which need no file; like RULER's tasks, but not part of RULER."""

    hops: ClassVar[int]

    def documents(self) -> Documents:
        return BY_HOPS[self.hops]()


def _load(path: str | None, source: Source, title: str, instead: str) -> Documents:
    if path is None:
        raise OptionError(
            f"The questions of {title} do not come with the library. Give {source}= the path of the file, or use the "
            f"task {instead}, whose questions are about Python's standard library."
        )
    return load(path, source)


def _word_source() -> dict[str, str]:
    return {"words": f"wonderwords {version('wonderwords')}"}
