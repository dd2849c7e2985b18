"""Measure the loss that scores a candidate, and build the sequences for it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import OptionError, PePatchError
from ..evaluation.corpus import Corpus
from ..evaluation.model import EvaluatedModel
from ..evaluation.retrieval import make_sample, start_ids, wording_for
from ..patching.api import patched

TARGETS = 2048
"""The largest default number of targets: tokens at the end of a document whose loss counts. Only they get logits."""
TARGET_SHARE = 8
"""One in this many tokens is a target by default. Only the last tokens have the full length before them; a mean over
all tokens would let the far end get worse in favor of the many near ones."""


@dataclass(frozen=True)
class Material:
    """The sequences that candidates are scored on."""

    rows: Sequence[np.ndarray]
    """Token ids `[rows, length]`."""
    mask: np.ndarray
    """Booleans `[rows, targets]`: which of the last `targets` tokens count."""
    text: str
    """The name of the corpus."""
    measured_on: str
    """The targets and the corpus, in words."""

    @property
    def targets(self) -> int:
        """The number of tokens at the end that get logits."""
        return self.mask.shape[1]

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that identify the tokens and the targets."""
        content = np.stack(self.rows).tobytes() + self.mask.tobytes()
        return hashlib.sha256(content).hexdigest()[:12]


def load_corpus(tokenizer: Any, text: str | Sequence[str] | Corpus, needed: int) -> Corpus:
    """Load the text to search on, without the documents that a source holds out for the evaluation."""
    if isinstance(text, Corpus):
        return text
    from ..data.text import held_out_split, load_documents

    if not isinstance(text, str) or held_out_split(text) is None:
        return Corpus.load(tokenizer, text, needed)
    corpus = Corpus.load(tokenizer, load_documents(text, split="train"), needed)
    return replace(corpus, name=f"{text}, files for training")


def documents(
    tokenizer: Any, corpus: Corpus, length: int, samples: int, seed: int, targets: int | None = None
) -> Material:
    """Build LongRoPE's sequences: pieces of text whose last `targets` tokens count.

    Args:
        tokenizer: the tokenizer of the model.
        corpus: the text.
        length: tokens per sequence.
        samples: the number of sequences.
        seed: the random seed of the places in the text.
        targets: the number of tokens that count; None takes an eighth of `length`, at most 2048.
    """
    targets = max(1, min(TARGETS, length // TARGET_SHARE)) if targets is None else targets
    if not 1 <= targets < length:
        raise OptionError(f"targets={targets}; of {length} tokens 1 to {length - 1} can be targets.")
    start = start_ids(tokenizer)
    size = length - len(start)
    pieces, where = corpus.spots(size, targets, samples, seed)
    if len(pieces) < samples:
        raise PePatchError(
            f"The text ({corpus.name}) has only {len(pieces)} different pieces of {size} tokens; samples={samples} "
            f"needs {samples}. Give a longer text or fewer samples."
        )
    measured_on = f"the last {targets} tokens of {samples} pieces of {length} tokens ({where}) of {corpus.name}"
    rows = [np.concatenate([start, piece]) for piece in pieces]
    return Material(rows, np.ones((samples, targets), dtype=bool), corpus.name, measured_on)


def needles(tokenizer: Any, corpus: Corpus, length: int, samples: int, seed: int, count: int) -> Material:
    """Build LongRoPE2's sequences, in which only the tokens of answers count.

    Each text hides `count` facts at random places and asks for all of them at its end. The place of the first fact
    moves through the text in equal steps.
    """
    wording = wording_for(tokenizer)
    prompts = [
        make_sample(
            tokenizer, corpus.stream, wording, length=length, needles=count, queries=count,
            depth=index / samples, rng=np.random.default_rng([seed, index]), answer_in_sequence=True,
        )
        for index in range(samples)
    ]  # fmt: skip
    targets = max(int(length - np.flatnonzero(prompt.is_answer)[0]) for prompt in prompts)
    mask = np.stack([prompt.is_answer[-targets:] for prompt in prompts])
    questions = f"{samples * count} questions about {count} facts hidden in {length} tokens of {corpus.name}"
    return Material([prompt.input_ids for prompt in prompts], mask, corpus.name, f"the answers to {questions}")


def make_material(
    method: str,
    tokenizer: Any,
    text: str | Sequence[str] | Corpus,
    length: int,
    samples: int,
    count: int,
    seed: int,
    targets: int | None = None,
) -> Material:
    """Build the sequences on which a method scores its candidates.

    Raises:
        OptionError: if `targets` is out of range, or given for longrope2.
        PePatchError: if the text is too short.
    """
    corpus = load_corpus(tokenizer, text, length)
    if method == "longrope":
        return documents(tokenizer, corpus, length, samples, seed, targets)
    if targets is not None:
        raise OptionError("targets is an option of the method 'longrope'; the targets of longrope2 are the answers.")
    return needles(tokenizer, corpus, length, samples, seed, count)


class Objective:
    """A callable that returns the mean loss of the targets under a scheme, in nats per token.

    It patches the model for each call and restores it afterwards.
    """

    def __init__(self, subject: EvaluatedModel, material: Material, on_existing: str = "error") -> None:
        self.subject, self.material, self.on_existing = subject, material, on_existing

    def __call__(self, scheme: str, **options: Any) -> float:
        with patched(self.subject.model, scheme, on_existing=self.on_existing, **options):
            losses = self.subject.losses(self.material.rows, self.material.targets)
        score = float(losses[self.material.mask].mean())
        if not math.isfinite(score):
            raise PePatchError(
                f"The loss under {scheme!r} is {score}: the logits of the model are not finite on this text in its "
                "dtype. Load the model with --dtype float32 or bfloat16."
            )
        return score


def check_samples(samples: int, count: int) -> None:
    """Raise `OptionError` if `samples` or `needles` is below 1."""
    for name, value in (("samples", samples), ("needles", count)):
        if value < 1:
            raise OptionError(f"{name}={value}; it must be at least 1.")
