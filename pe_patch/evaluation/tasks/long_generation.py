"""Let the model continue real text for long, and measure repetition, the prompt's rare words and a judge's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ...errors import OptionError
from ..context import EvaluationContext, Outcome, ResourceUsage, WorkUnit
from ..longppl import Judge
from ..model import EvaluatedModel, Sampling, Work, windows
from ..perplexity_measures import amount, summarise
from ..question_task import PROMPT_TAIL
from ..repetition import WordCounts, distinct_share, longest_repeat, rare_words, words_of
from ..results import Row
from ..retrieval import encode, start_ids

TEXTS = 8
LEAST_PROMPT = 64
"""Tokens of the shortest prompt."""
SIZES = (1, 2, 3, 4)
"""Words of the n-grams that are counted."""
MAIN = "distinct 4-grams"
MEASURES: Mapping[str, Callable[[list[str]], float]] = {
    MAIN: lambda words: distinct_share(words, 4),
    "words outside the longest repeated span": lambda words: 1 - longest_repeat(words) / max(1, len(words)),
}
KEPT = "rare words of the prompt that are used"
JUDGED = "nats per token of the continuation, by a judge"

Scores = Mapping[str, Sequence[float]]
"""By measure, the scores of the texts."""


@dataclass(frozen=True)
class Continuation:
    """A prompt with the text that follows it, by the model and in the source."""

    prompt: str
    generated: str
    real: str


@dataclass(frozen=True)
class LongGeneration:
    """Continuations of real text: how much they repeat themselves, and whether they keep to the subject.

    A length is that of prompt and continuation together. All lengths continue at the same places of the text, so that
    they differ only in how much comes before. Each measure is also taken of the text that really follows, as the bound
    to compare with. The end-of-text token is suppressed, so that all continuations are equally long.
    """

    tokens: int = 2000
    """Tokens of a continuation."""
    texts: int | None = None
    """Texts to continue. None is 8, or fewer if `samples` is less than 32."""
    temperature: float = 1.0
    """Temperature of the draws; 0 takes the most probable token."""
    top_p: float = 0.95
    """Draw from the most probable tokens that together have at least this probability (nucleus sampling)."""
    judge: Any = None
    """A folder or (model, tokenizer) that reads each continuation within its own window. None asks no judge."""

    name: ClassVar[str] = "long_generation"
    summary: ClassVar[str] = "continue real text; repetition, rare words of the prompt, loss under a judge"
    paper: ClassVar[str] = (
        "distinct-n of Li et al. 2016, arXiv 1510.03055; nucleus of Holtzman et al., arXiv 1904.09751"
    )
    retrieves: ClassVar[bool] = False
    depends_on_lengths: ClassVar[bool] = True
    """The longest length determines where the texts are continued."""

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("texts", self.texts)):
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise OptionError(
                f"temperature must be at least 0 and top_p above 0 and at most 1, got {self.temperature} and "
                f"{self.top_p}."
            )
        if self.judge is not None:
            object.__setattr__(self, "judge", Judge.of(self.judge))

    def work_units(self, context: EvaluationContext, length: int) -> Iterator[WorkUnit]:
        """Yield one unit: all texts together.

        Raises:
            OptionError: The length leaves no room for a prompt.
        """
        if length < self.tokens + LEAST_PROMPT:
            raise OptionError(
                f"A length of {length} tokens leaves {max(0, length - self.tokens)} for the prompt of long_generation, "
                f"which continues it by {self.tokens}. Use lengths of at least {self.tokens + LEAST_PROMPT}, or "
                f"fewer tokens (--task-option tokens={max(1, length // 2)})."
            )
        count = amount(context, self.texts, TEXTS)
        work = Work(prompts=count, tokens=count * length, forward_passes=count * self.tokens)
        yield WorkUnit("all", work, partial(self._measure, context, length))

    def _measure(self, context: EvaluationContext, length: int) -> Outcome:
        start = context.start_ids
        longest, count = max(context.lengths) - len(start), amount(context, self.texts, TEXTS)
        spots, where = context.corpus.spots(longest, self.tokens, count, context.seed)
        pieces = [spot[len(spot) - (length - len(start)) :] for spot in spots]
        prompts = [np.concatenate([start, piece[: -self.tokens]]) for piece in pieces]
        sampling = Sampling(self.temperature, self.top_p, context.seed)
        with context.timed() as usage:
            generated = context.model.continuations(prompts, self.tokens, sampling)
        decode = context.model.tokenizer.decode
        texts = [
            Continuation(decode(piece[: -self.tokens]), decode(ids), decode(piece[-self.tokens :]))
            for piece, ids in zip(pieces, generated, strict=True)
        ]
        rows = self._rows(context, usage, length, texts, where)
        return Outcome(rows, [self._answer(length, number, text) for number, text in enumerate(texts)])

    def _answer(self, length: int, number: int, text: Continuation) -> dict[str, Any]:
        return {
            "task": self.name,
            "length": length,
            "depth": None,
            "number": number,
            "question": text.prompt[-PROMPT_TAIL:],
            "prediction": text.generated,
            "references": [text.real],
            "score": MEASURES[MAIN](words_of(text.generated)),
        }

    def _rows(
        self, context: EvaluationContext, usage: ResourceUsage, length: int, texts: list[Continuation], where: str
    ) -> list[Row]:
        from ..metrics import score_interval

        drawn = "the most probable token" if self.temperature == 0 else (
            f"draws at temperature {self.temperature:g} from the nucleus of {self.top_p:g}"
        )  # fmt: skip
        said = f"{len(texts)} continuations of {self.tokens} tokens, {where} of {context.corpus.name}, {drawn}"
        counts = WordCounts.of(context.corpus.texts)
        measured = {real: _scores(texts, counts, real) for real in (False, True)}
        speed = len(texts) * self.tokens / usage.seconds if usage.seconds else 0.0
        rows = []
        for measure in measured[False]:
            for real, shown in ((False, measure), (True, f"{measure}, of the real text")):
                if not (scores := measured[real][measure]):
                    continue
                details: dict[str, Any] = {"scores": [*scores]}
                if not real and measure == MAIN:
                    details |= {"tokens_per_second": speed, "of_each_text": [_facts(text) for text in texts]}
                low, high = score_interval(scores)
                mean = sum(scores) / len(scores)
                rows.append(self._row(context, usage, length, shown, mean, low, high, len(scores), said, details))
        if self.judge is not None:
            rows += self._judged(context, usage, length, texts, said)
        return rows

    def _judged(
        self, context: EvaluationContext, usage: ResourceUsage, length: int, texts: list[Continuation], said: str
    ) -> Iterator[Row]:
        judge = EvaluatedModel(self.judge.model, self.judge.tokenizer, autocast=context.model.autocast)
        for real, shown in ((False, JUDGED), (True, f"{JUDGED}, of the real text")):
            losses = [_judge_losses(judge, text.prompt, text.real if real else text.generated) for text in texts]
            losses = [each for each in losses if len(each)]
            if not losses:
                continue
            groups = np.concatenate([np.full(len(each), index) for index, each in enumerate(losses)])
            found = summarise(context, np.concatenate(losses), groups)
            yield self._row(
                context, usage, length, shown, found["loss"], found["low"], found["high"], found["tokens"],
                f"{said}; read by {self.judge.name} within its window", {},
            )  # fmt: skip

    def _row(
        self,
        context: EvaluationContext,
        usage: ResourceUsage,
        length: int,
        measure: str,
        score: float,
        low: float | None,
        high: float | None,
        samples: int,
        said: str,
        details: dict[str, Any],
    ) -> Row:
        return context.row(
            usage, task=self.name, measure=measure, length=length, tokens=length, depth=None, score=score, low=low,
            high=high, samples=samples, control=None, control_length=None, measured_on=said, details=details,
        )  # fmt: skip


def _scores(texts: Sequence[Continuation], counts: WordCounts, real: bool) -> Scores:
    """Return the scores of the generated or of the real continuations; a text without rare words has none for them."""
    written = [words_of(text.real if real else text.generated) for text in texts]
    rare = [rare_words(words_of(text.prompt), counts) for text in texts]
    kept = [len(asked & set(words)) / len(asked) for asked, words in zip(rare, written, strict=True) if asked]
    return {**{name: [measure(words) for words in written] for name, measure in MEASURES.items()}, KEPT: kept}


def _facts(text: Continuation) -> dict[str, Any]:
    """Return the numbers of words, of distinct n-grams and of the longest repeated span, generated and real."""
    facts: dict[str, Any] = {}
    for name, written in (("generated", words_of(text.generated)), ("real", words_of(text.real))):
        shares = {f"distinct_{size}": distinct_share(written, size) for size in SIZES}
        facts[name] = {"words": len(written), **shares, "longest_repeat": longest_repeat(written)}
    return facts


def _judge_losses(judge: EvaluatedModel, prompt: str, text: str) -> np.ndarray:
    """Return the judge's losses of a continuation, in nats [n], with as much of the prompt as its window holds.

    Of a continuation that is longer than the window, the judge reads what fits.
    """
    start = start_ids(judge.tokenizer)
    native, effective = windows(judge.model)
    ids = encode(judge.tokenizer, text)
    room = (effective or native or len(ids)) - len(start)
    ids = ids[: room - 1]
    before = encode(judge.tokenizer, prompt)
    before = before[max(0, len(before) - (room - len(ids))) :]
    sequence = np.concatenate([start, before, ids])
    targets = min(len(ids), len(sequence) - 1)
    return judge.losses([sequence], targets)[0] if targets > 0 else np.zeros(0)


LONG_GENERATION: Mapping[str, type[LongGeneration]] = {LongGeneration.name: LongGeneration}
