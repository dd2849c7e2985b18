"""What a candidate is judged by: the loss of a model that turns by its factors."""

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
"""The most tokens at a document's end whose loss counts by default; no logits are made of any others."""
SHARE = 8
"""One in so many tokens is a target by default: those at the end, which have the length before them. The mean over all
places lets the far end get worse for the sake of the many nearer ones."""


@dataclass(frozen=True)
class Material:
    """Sequences [rows, length] and which of their tokens are targets, as a mask over the last `targets`."""

    rows: Sequence[np.ndarray]
    mask: np.ndarray
    text: str
    measured_on: str

    @property
    def targets(self) -> int:
        return self.mask.shape[1]

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that change with any token or target."""
        whole = np.stack(self.rows).tobytes() + self.mask.tobytes()
        return hashlib.sha256(whole).hexdigest()[:12]


def load_corpus(tokenizer: Any, text: str | Sequence[str] | Corpus, needed: int) -> Corpus:
    """The text to search on; of "stdlib" the files that evaluation does not measure on."""
    if isinstance(text, Corpus):
        return text
    if not isinstance(text, str) or text != "stdlib":
        return Corpus.load(tokenizer, text, needed)
    from ..data.text import load_documents

    corpus = Corpus.load(tokenizer, load_documents(text, split="train"), needed)
    return replace(corpus, name="stdlib, files for training")


def documents(
    tokenizer: Any, corpus: Corpus, length: int, samples: int, seed: int, targets: int | None = None
) -> Material:
    """LongRoPE's: the loss of documents of `length` tokens, of which the last `targets` count; by default an eighth of
    them, at most 2048."""
    targets = max(1, min(TARGETS, length // SHARE)) if targets is None else targets
    if not 1 <= targets < length:
        raise OptionError(f"targets={targets}; of {length} tokens 1 to {length - 1} can be targets.")
    start = start_ids(tokenizer)
    size = length - len(start)
    pieces, where = corpus.spots(size, targets, samples, seed)
    if len(pieces) < samples:
        raise PePatchError(
            f"The text ({corpus.name}) has room for {len(pieces)} different pieces of {size} tokens, {samples} are "
            "wanted. Give a longer text or fewer samples."
        )
    told = f"the last {targets} tokens of {samples} pieces of {length} tokens ({where}) of {corpus.name}"
    rows = [np.concatenate([start, piece]) for piece in pieces]
    return Material(rows, np.ones((samples, targets), dtype=bool), corpus.name, told)


def needles(tokenizer: Any, corpus: Corpus, length: int, samples: int, seed: int, count: int) -> Material:
    """LongRoPE2's needle-driven loss: that of the answers alone. Each text hides `count` facts at as many distances
    and asks for all of them at its end; the first one's place moves from the text's start on by equal steps."""
    wording = wording_for(tokenizer)
    made = [
        make_sample(
            tokenizer, corpus.stream, wording, length=length, needles=count, queries=count,
            depth=index / samples, rng=np.random.default_rng([seed, index]), answer_in_sequence=True,
        )
        for index in range(samples)
    ]  # fmt: skip
    targets = max(int(length - np.flatnonzero(sample.is_answer)[0]) for sample in made)
    mask = np.stack([sample.is_answer[-targets:] for sample in made])
    told = f"the answers to {samples * count} questions about {count} facts hidden in {length} tokens of {corpus.name}"
    return Material([sample.input_ids for sample in made], mask, corpus.name, told)


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
    """What the candidates of a method are scored on; a text that is too short raises `PePatchError`."""
    corpus = load_corpus(tokenizer, text, length)
    if method == "longrope":
        return documents(tokenizer, corpus, length, samples, seed, targets)
    if targets is not None:
        raise OptionError("targets belongs to the method 'longrope'; of longrope2 the answers are the targets.")
    return needles(tokenizer, corpus, length, samples, seed, count)


class Objective:
    """The mean loss in nats of a model's targets under a scheme; the model is given back as it was each time."""

    def __init__(self, subject: EvaluatedModel, material: Material, on_existing: str = "error") -> None:
        self.subject, self.material, self.on_existing = subject, material, on_existing

    def __call__(self, scheme: str, **options: Any) -> float:
        with patched(self.subject.model, scheme, on_existing=self.on_existing, **options):
            losses = self.subject.losses(self.material.rows, self.material.targets)
        score = float(losses[self.material.mask].mean())
        if not math.isfinite(score):
            raise PePatchError(
                f"The loss under {scheme!r} is {score}: the model gives no finite logits on this text in its dtype; "
                "load it with --dtype float32 or bfloat16."
            )
        return score


def check_samples(samples: int, count: int) -> None:
    """Raise `OptionError` unless there is something to measure."""
    for name, value in (("samples", samples), ("needles", count)):
        if value < 1:
            raise OptionError(f"{name}={value}; it must be at least 1.")
