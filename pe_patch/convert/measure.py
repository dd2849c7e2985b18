"""Measure a model before and after a conversion: cache size, and loss and retrieval on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.folders import MODEL, WEIGHTS, check_output, replaced_content
from ..data.text import TextSourceError, load_documents
from ..errors import OptionError, PePatchError, unknown
from ..evaluation.corpus import Corpus
from ..evaluation.model import CacheSize, cache_size, windows
from ..evaluation.perplexity import Perplexity
from ..evaluation.run import evaluate, planned_tokens
from ..evaluation.tasks import Needle, Task
from ..mla.checks import METHODS

TARGETS = ("mla",)
ROW = 512
"""Tokens in a row of calibration; a shorter model window lowers it."""
LONGEST = 2048
"""Default length in tokens for measuring a model with a longer window."""

Interval = tuple[float | None, float | None]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Measured:
    """Measurements at one length: loss in nats per token, retrieval as the share of exact answers."""

    cache: CacheSize
    loss: float
    loss_interval: Interval
    loss_measured_on: str
    retrieval: float | None = None
    """None if no questions were asked."""
    retrieval_interval: Interval = (None, None)
    questions: int = 0
    retrieval_measured_on: str = ""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields in one flat dict, for a table or a line of JSON."""
        fields = asdict(self)
        cache = fields.pop("cache")
        counted = {
            "cached_numbers_per_token_and_layer": self.cache.numbers_per_layer,
            "cached_bytes_per_token": cache["bytes"],
        }
        return {**counted, **fields, "perplexity": self.perplexity}


@dataclass(frozen=True)
class Ruler:
    """Held-out text and questions that are equal for all compared models."""

    tokenizer: Any
    corpus: Corpus
    length: int
    questions: int = 0
    """Number of questions; 0 measures only the loss."""
    spots: int = 64
    """Number of places in the text at which the loss is measured."""
    seed: int = 0

    @property
    def tasks(self) -> list[Task]:
        """The measured tasks."""
        return [Perplexity(measures=("fixed",), spots=self.spots), *([Needle()] if self.questions else [])]

    def tokens(self, model: Any, questions: int) -> int:
        """Return about how many tokens a measurement with so many questions reads."""
        return planned_tokens(
            model, self.tokenizer, self.tasks, [self.length], samples=max(1, questions), text=self.corpus
        )

    def measure(self, model: Any, advance: Advance = lambda tokens: None) -> Measured:
        """Measure a model; `advance` is called with the tokens that were read since its last call."""
        read = 0

        def report(tokens: int, total: int) -> None:
            nonlocal read
            advance(tokens - read)
            read = tokens

        results = evaluate(
            model, self.tokenizer, self.tasks, [self.length], samples=max(1, self.questions), seed=self.seed,
            text=self.corpus, retrieval=False, beyond_window=True, label=type(model).__name__, progress=report,
        )  # fmt: skip
        loss, answers = results.select(task=Perplexity.name)[0], results.cell(task=Needle.name)
        measured = Measured(cache_size(model), loss.score, (loss.low, loss.high), loss.measured_on)
        if answers is None:
            return measured
        return replace(
            measured,
            retrieval=answers.score,
            retrieval_interval=(answers.low, answers.high),
            questions=answers.samples,
            retrieval_measured_on=results.select(task=Needle.name)[0].measured_on,
        )


@dataclass(frozen=True)
class Material:
    """The text of a conversion: calibration rows, and the text to measure on."""

    rows: list[list[int]]
    """Token ids for calibration, in rows."""
    calibrated_on: str
    ruler: Ruler

    @property
    def calibration_tokens(self) -> int:
        """Number of calibration tokens."""
        return sum(map(len, self.rows))


def prepare(
    model: Any,
    tokenizer: Any,
    *,
    calibration: str = "stdlib",
    text: str | None = None,
    length: int | None = None,
    tokens: int = 65536,
    questions: int = 0,
    spots: int = 64,
    seed: int = 0,
) -> Material:
    """Prepare the calibration text and the text to measure on.

    Args:
        model: the model to convert.
        tokenizer: its tokenizer.
        calibration: calibration text: stdlib, a folder, a file or a hub data set.
        text: text to measure on; None uses held-out documents of the calibration text.
        length: length in tokens to measure at; None uses the model's window, at most 2048.
        tokens: number of calibration tokens.
        questions: number of retrieval questions; 0 measures only the loss.
        spots: number of places in the text at which the loss is measured.
        seed: random seed for calibration, questions and text positions.
    """
    native = windows(model)[0]
    length = length or min(native or LONGEST, LONGEST)
    same = text is None or text == calibration
    corpus = _held_out(tokenizer, calibration, length) if same else Corpus.load(tokenizer, str(text), needed=length)
    documents = load_documents(calibration, split="train" if same else None)
    rows = calibration_rows(tokenizer, documents, tokens, min(native or ROW, ROW), seed)
    count = sum(map(len, rows))
    where = f"{calibration}, without the measured documents" if same else calibration
    return Material(rows, f"{count:,} tokens of {where}", Ruler(tokenizer, corpus, length, questions, spots, seed))


def _held_out(tokenizer: Any, source: str, needed: int) -> Corpus:
    if source == "stdlib":  # the corpus selects held-out files
        return Corpus.load(tokenizer, source, needed=needed)
    try:
        documents = load_documents(source, split="test")
    except TextSourceError as error:
        if "split" not in str(error):
            raise
        raise PePatchError(
            f"{source} has too few documents to hold some out; give another text to measure on (--text)."
        ) from error
    return replace(Corpus.load(tokenizer, documents, needed=needed), name=f"{source}, held-out documents")


def calibration_rows(
    tokenizer: Any, documents: Sequence[str], tokens: int, length: int, seed: int = 0
) -> list[list[int]]:
    """Return rows of up to `length` ids from documents in random order, with `tokens` ids in total or all there are."""
    rows: list[list[int]] = []
    for index in np.random.default_rng(seed).permutation(len(documents)):
        ids = tokenizer(documents[index], verbose=False)["input_ids"]
        for start in range(0, len(ids) - 1, length):
            rows.append(ids[start : start + min(length, tokens)])
            tokens -= len(rows[-1])
            if tokens < 2:
                return rows
    return rows


def share(word: str) -> float:
    """Convert `1/8` or `0.125` to a number."""
    try:
        return float(Fraction(word))
    except (ValueError, ZeroDivisionError) as error:
        raise OptionError(f"A share of the cache must be a number such as 1/8 or 0.125, got {word!r}.") from error


def share_name(value: float) -> str:
    """Format a share, such as `1/8` for 0.125."""
    return str(Fraction(value).limit_denominator(256))


def check_request(target: str, methods: Sequence[str]) -> None:
    """Raise `UnknownNameError` if the target or a method does not exist."""
    for kind, name, known in [("target", target, TARGETS), *(("method", method, METHODS) for method in methods)]:
        if name not in known:
            raise unknown(kind, name, known)


def save(model: Any, tokenizer: Any, folder: Path, *, overwrite: bool = False) -> None:
    """Write model and tokenizer to a folder, all files or none.

    Raises:
        OutputError: the folder is not empty and `overwrite` is False. With `overwrite`, weights there are replaced.
    """
    inputs = [getattr(model, "name_or_path", None), getattr(tokenizer, "name_or_path", None)]
    real = check_output(folder, MODEL, inputs=inputs, overwrite=overwrite)
    with replaced_content(real, stale=WEIGHTS) as content:
        model.save_pretrained(content)
        tokenizer.save_pretrained(content)
