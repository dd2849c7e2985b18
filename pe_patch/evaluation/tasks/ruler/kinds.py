"""RULER's tasks by what they ask about: needles, running text, variables, words, code words and documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import ClassVar

from ....errors import OptionError
from ...context import EvaluationContext
from .documents import Answering, Documents, Source, load
from .generator import Generator, Tokens
from .material import Essay, digest, essay_from, essay_of, read_words, single
from .niah import Niah, Shape, TokenNiah
from .scoring import string_match_part
from .source_questions import BY_HOPS
from .task import Made, RulerTask
from .tracking import Tracking
from .wording import TOKENS, Wording
from .words import CommonWords, FrequentWords


@dataclass(frozen=True)
class NiahTask(RulerTask):
    """Facts hidden in noise, or among facts of their kind."""

    shape: ClassVar[Shape]

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> Made:
        noise = self.shape.haystack == "noise"
        text = wording.noise if noise else wording.needle
        stamps = {"haystack": "noise" if noise else "needles", "haystack_sha256": digest(text), **_source_of_words()}
        return Made(self.generator(context, tokens, length, wording), stamps)

    def generator(
        self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording, essay: Essay | None = None
    ) -> Generator:
        kind = TokenNiah if wording.name == TOKENS else Niah
        return kind(tokens, length, context.seed, self.shape, wording, essay)


@dataclass(frozen=True)
class EssayNiahTask(NiahTask):
    """Facts hidden in running text. `haystack` is a text file, or the JSON file of essays that RULER's script writes;
    None is the evaluation's own text."""

    haystack: str | None = None

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> Made:
        corpus = context.corpus
        essay = essay_from(self.haystack) if self.haystack else essay_of(tuple(corpus.texts), corpus.name)
        stamps = {"haystack": essay.name, "haystack_sha256": essay.sha256, "splitter": essay.splitter.name}
        stamps |= _source_of_words()
        other = [] if essay.official else [f"haystack {essay.name}"]
        other += [] if essay.splitter.official else [f"splitter {essay.splitter.name}"]
        return Made(self.generator(context, tokens, length, wording, essay), stamps, lambda: other)


@dataclass(frozen=True)
class TrackingTask(RulerTask):
    """A chain of assignments hidden in noise."""

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> Made:
        stamps = {"haystack": "noise", "haystack_sha256": digest(wording.noise)}
        return Made(Tracking(tokens, length, context.seed, wording), stamps)


@dataclass(frozen=True)
class CommonWordsTask(RulerTask):
    """The most common words of a list. `words` is a JSON file of words, as RULER's `english_words.json`, for lengths
    that need more than wonderwords has; None makes words up there."""

    words: str | None = None

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> Made:
        many = read_words(self.words) if self.words else None
        generator = CommonWords(tokens, length, context.seed, wording, many.words if many else None)
        words = [*single(), *(many.words if many else ())]
        stamps = {"haystack": "words", "haystack_sha256": digest("\n".join(words)), **_source_of_words()}

        def substitutes() -> list[str]:
            if not generator.beyond or (many and many.official):
                return []
            return [f"words of {many.name}" if many else "words that do not exist"]

        return Made(generator, stamps, substitutes)


@dataclass(frozen=True)
class FrequentWordsTask(RulerTask):
    """The most frequent code words of a text."""

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> Made:
        return Made(
            FrequentWords(tokens, length, context.seed, wording),
            {"haystack": "random code words", "haystack_sha256": None},
        )


@dataclass(frozen=True)
class DocumentsTask(RulerTask):
    """Questions about documents."""

    match: ClassVar[Callable[[str, Sequence[str]], float]] = staticmethod(string_match_part)

    def documents(self) -> Documents:
        raise NotImplementedError

    def measure(self) -> str:
        return "one of the references found"

    def check(self, context: EvaluationContext) -> None:
        super().check(context)
        self.documents()

    def make(self, context: EvaluationContext, tokens: Tokens, length: int, wording: Wording) -> Made:
        documents = self.documents()
        stamps = {"haystack": documents.name, "haystack_sha256": documents.sha256}
        other = [] if documents.official else [f"questions of {documents.name}"]
        return Made(Answering(tokens, length, context.seed, wording, documents), stamps, lambda: other)


@dataclass(frozen=True)
class SquadTask(DocumentsTask):
    """`squad` is the path of SQuAD 2.0's development set."""

    squad: str | None = None

    def documents(self) -> Documents:
        return _load(self.squad, "squad", "SQuAD 2.0 (dev-v2.0.json)", "qa_local_1")


@dataclass(frozen=True)
class HotpotTask(DocumentsTask):
    """`hotpotqa` is the path of HotpotQA's development set with distractors."""

    hotpotqa: str | None = None

    def documents(self) -> Documents:
        return _load(self.hotpotqa, "hotpotqa", "HotpotQA (hotpot_dev_distractor_v1.json)", "qa_local_2")


@dataclass(frozen=True)
class LocalTask(DocumentsTask):
    """Questions about Python's standard library, which need no file: a task like RULER's, and not RULER's."""

    hops: ClassVar[int]

    def documents(self) -> Documents:
        return BY_HOPS[self.hops]()


def _load(path: str | None, source: Source, title: str, instead: str) -> Documents:
    if path is None:
        raise OptionError(
            f"The questions of {title} do not come with the library. Give {source}= the path of the file, or ask "
            f"{instead}, whose questions are about Python's own source."
        )
    return load(path, source)


def _source_of_words() -> dict[str, str]:
    return {"words": f"wonderwords {version('wonderwords')}"}
