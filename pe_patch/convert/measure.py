"""What a conversion changes, measured: the cache on a real cache object, loss and retrieval on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from ..evaluation.run import evaluate
from ..evaluation.tasks import Needle
from ..mla.checks import METHODS

TARGETS = ("mla",)
ROW = 512
"""Tokens to a row of calibration, or the model's window where that is less."""
LONGEST = 2048
"""Length at which a model of a longer window is measured unless told otherwise."""

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Measured:
    """A model at one length: loss in nats per token, retrieval as the share of questions answered exactly."""

    cache: CacheSize
    loss: float
    loss_interval: Interval
    loss_measured_on: str
    retrieval: float | None = None
    """None where no questions were asked."""
    retrieval_interval: Interval = (None, None)
    questions: int = 0
    retrieval_measured_on: str = ""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Everything flat, for a table or a line of JSON."""
        found = asdict(self)
        cache = found.pop("cache")
        counted = {
            "cached_numbers_per_token_and_layer": self.cache.numbers_per_layer,
            "cached_bytes_per_token": cache["bytes"],
        }
        return {**counted, **found, "perplexity": self.perplexity}


@dataclass(frozen=True)
class Ruler:
    """The same held-out text and the same questions for all models that are held against each other."""

    tokenizer: Any
    corpus: Corpus
    length: int
    questions: int = 0
    """How many facts are asked for; 0 measures the loss alone."""
    spots: int = 64
    seed: int = 0

    def measure(self, model: Any) -> Measured:
        tasks = [Perplexity(measures=("fixed",), spots=self.spots), *([Needle()] if self.questions else [])]
        found = evaluate(
            model, self.tokenizer, tasks, [self.length], samples=max(1, self.questions), seed=self.seed,
            text=self.corpus, retrieval=False, beyond_window=True, label=type(model).__name__, progress=False,
        )  # fmt: skip
        loss, answers = found.select(task=Perplexity.name)[0], found.cell(task=Needle.name)
        measured = Measured(cache_size(model), loss.score, (loss.low, loss.high), loss.measured_on)
        if answers is None:
            return measured
        return replace(
            measured,
            retrieval=answers.score,
            retrieval_interval=(answers.low, answers.high),
            questions=answers.samples,
            retrieval_measured_on=found.select(task=Needle.name)[0].measured_on,
        )


@dataclass(frozen=True)
class Material:
    """The text of a conversion: what it is calibrated on, and how it is judged."""

    rows: list[list[int]]
    """Token ids to calibrate on."""
    calibrated_on: str
    ruler: Ruler


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
    """Text to calibrate on, `tokens` of it, and other text to judge by: `text`, or held-out documents of the same
    source. `length` is by default the model's window, up to 2048 tokens."""
    native = windows(model)[0]
    length = length or min(native or LONGEST, LONGEST)
    same = text is None or text == calibration
    corpus = _held_out(tokenizer, calibration, length) if same else Corpus.load(tokenizer, str(text), needed=length)
    documents = load_documents(calibration, split="train" if same else None)
    rows = calibration_rows(tokenizer, documents, tokens, min(native or ROW, ROW), seed)
    count = sum(map(len, rows))
    where = f"{calibration}, documents that were not measured on" if same else calibration
    return Material(rows, f"{count:,} tokens of {where}", Ruler(tokenizer, corpus, length, questions, spots, seed))


def _held_out(tokenizer: Any, source: str, needed: int) -> Corpus:
    if source == "stdlib":  # of which the corpus takes the held-out files by itself
        return Corpus.load(tokenizer, source, needed=needed)
    try:
        documents = load_documents(source, split="test")
    except TextSourceError as error:
        if "split" not in str(error):
            raise
        raise PePatchError(
            f"{source} has too few documents to hold some out for measuring: give other text to measure on (--text)."
        ) from error
    return replace(Corpus.load(tokenizer, documents, needed=needed), name=f"{source}, held-out documents")


def calibration_rows(
    tokenizer: Any, documents: Sequence[str], tokens: int, length: int, seed: int = 0
) -> list[list[int]]:
    """Rows of `length` ids from documents in random order, `tokens` in all or all there are."""
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
    """`1/8` or `0.125` as a number."""
    try:
        return float(Fraction(word))
    except (ValueError, ZeroDivisionError) as error:
        raise OptionError(f"A share of the cache is written 1/8 or 0.125, got {word!r}.") from error


def share_name(value: float) -> str:
    """`1/8` for 0.125."""
    return str(Fraction(value).limit_denominator(256))


def check_request(target: str, methods: Sequence[str]) -> None:
    """Raise where a target or a method does not exist."""
    for kind, name, known in [("target", target, TARGETS), *(("method", method, METHODS) for method in methods)]:
        if name not in known:
            raise unknown(kind, name, known)


def save(model: Any, tokenizer: Any, folder: Path, *, overwrite: bool = False) -> None:
    """Write model and tokenizer to a folder, whole or not at all.

    A folder that holds anything raises `OutputError` unless `overwrite=True`; then weights there are replaced.
    """
    inputs = [getattr(model, "name_or_path", None), getattr(tokenizer, "name_or_path", None)]
    real = check_output(folder, MODEL, inputs=inputs, overwrite=overwrite)
    with replaced_content(real, stale=WEIGHTS) as content:
        model.save_pretrained(content)
        tokenizer.save_pretrained(content)
