"""LongPPL: perplexity on the tokens that long context makes easier (Fang et al. 2024, arXiv:2410.23771).

A judge, which is another model or the evaluated model, reads each text twice: with all preceding tokens as context, and
with a short context. Key tokens are those whose loss falls by more than `MIN_GAIN` with the long context, to less than
`MAX_LOSS`. Key tokens are passed on as character spans, so that judge and evaluated model can differ in tokenizer.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import OptionError, PePatchError
from .context import EvaluationContext
from .model import EvaluatedModel, model_fingerprint, tokenizer_hash, windows
from .perplexity_measures import (
    WINDOWS,
    JournalKey,
    Measure,
    Span,
    amount,
    control_loss,
    limited_option,
    sliding_losses,
    span_losses,
    start_facts,
    start_words,
    window_start,
)
from .results import Row
from .retrieval import start_ids

logger = logging.getLogger(__name__)

MIN_GAIN = 2.0
"""Nats by which the whole context must lower the judge's loss of a key token, compared with the short context."""
MAX_LOSS = 2.0
"""Nats that the judge's loss of a key token must stay below with the whole context."""
SHORT_CONTEXT = 4096
SHARED_CONTEXT = 1024

CharSpan = tuple[int, int]
"""Start and end (exclusive) of characters in a text."""


@dataclass(frozen=True, eq=False)
class Judge:
    """The model that selects the key tokens."""

    model: Any
    tokenizer: Any

    @classmethod
    def of(cls, source: Any) -> Judge:
        """Make a judge from a folder, a name on the hub, or (model, tokenizer).

        Raises:
            OptionError: The source is of another type.
        """
        if isinstance(source, Judge):
            return source
        if isinstance(source, str):
            from ..checkpoints.sources import load

            return cls(*load(source))
        if isinstance(source, tuple) and len(source) == 2:
            return cls(*source)
        raise OptionError(f"judge must be a folder, or (model, tokenizer); got {type(source).__name__}.")

    @cached_property
    def name(self) -> str:
        """Model name with hashes of the weights and the tokenizer."""
        known = getattr(self.model.config, "name_or_path", "") or type(self.model).__name__
        return f"{known} {model_fingerprint(self.model)} {tokenizer_hash(self.tokenizer)}"

    def __repr__(self) -> str:
        return f"Judge({self.name!r})"


def is_key_token(short: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return a mask [n] of the key tokens, from the losses with the short and the whole context, [n] each in nats."""
    return (short - whole > MIN_GAIN) & (whole < MAX_LOSS)


def short_context_losses(
    model: EvaluatedModel,
    ids: np.ndarray,
    short_context: int,
    shared_context: int,
    start: Sequence[int] | np.ndarray = (),
) -> np.ndarray:
    """Compute the losses of all tokens from index `short_context` on, with little context each.

    Args:
        model: The judge.
        ids: Token ids [n].
        short_context: Minimum number of tokens before each scored token.
        shared_context: Tokens that are scored in one window. The last of them has `shared_context` - 1 more tokens
            before it than the first.
        start: Ids that every window starts with: BOS, or none.

    Returns:
        Losses in nats [n - short_context].
    """
    starts = range(0, len(ids) - short_context, shared_context)
    ends = [min(first + short_context + shared_context, len(ids)) for first in starts]
    spans = [Span(first, end, end - first - short_context) for first, end in zip(starts, ends, strict=True)]
    return np.concatenate(span_losses(model, ids, spans, start))


def key_token_spans(
    judge: EvaluatedModel,
    text: str,
    short_context: int,
    shared_context: int,
    start: Sequence[int] | np.ndarray = (),
) -> tuple[list[CharSpan], int]:
    """Find the judge's key tokens in a text.

    The authors' code starts only the first window with BOS. Here all windows start with `start`, since otherwise the
    loss that a missing BOS costs would count as the gain of a longer context.

    Args:
        judge: The judge.
        text: The text.
        short_context: Minimum number of tokens before each scored token.
        shared_context: Tokens that share one short context.
        start: Ids that every window starts with: BOS, or none.

    Returns:
        The character spans of the key tokens, in order and without overlaps, and the number of key tokens.

    Raises:
        PePatchError: The text is longer than the judge's window.
    """
    ids, offsets = _encode_with_offsets(judge.tokenizer, text)
    window = windows(judge.model)[1]
    if window is not None and len(start) + len(ids) > window:
        raise PePatchError(
            f"The judge of LongPPL reads {len(start) + len(ids)} tokens here, beyond its window of {window}. "
            "Give a judge with a longer window, or use shorter lengths."
        )
    if len(ids) <= short_context:
        return [], 0
    whole = _losses_with_whole_context(judge, ids, start)[-(len(ids) - short_context) :]
    short = short_context_losses(judge, ids, short_context, shared_context, start)
    indices = np.flatnonzero(is_key_token(short, whole)) + short_context
    return merge_spans([offsets[index] for index in indices]), len(indices)


def _losses_with_whole_context(model: EvaluatedModel, ids: np.ndarray, start: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the losses of all tokens [n], or of all but the first [n - 1] without `start`."""
    return model.losses([np.concatenate([np.array(start, dtype=ids.dtype), ids])], len(ids) - (not len(start)))[0]


def merge_spans(spans: Sequence[CharSpan]) -> list[CharSpan]:
    """Merge spans that touch or overlap. `spans` must be in order."""
    merged: list[CharSpan] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def inside_spans(tokens: Sequence[CharSpan], spans: Sequence[CharSpan]) -> np.ndarray:
    """Return a mask [n] of the tokens that lie completely within one of the spans.

    Args:
        tokens: Character span of each token.
        spans: Merged spans, as `merge_spans` returns them.
    """
    starts = np.array([start for start, _ in spans], dtype=np.int64)
    ends = np.array([end for _, end in spans], dtype=np.int64)
    if not len(spans):
        return np.zeros(len(tokens), dtype=bool)
    offsets = np.array(tokens, dtype=np.int64).reshape(-1, 2)
    candidate = np.searchsorted(starts, offsets[:, 0], side="right") - 1
    return (candidate >= 0) & (offsets[:, 1] <= ends[candidate])


@dataclass(frozen=True)
class LongPPL(Measure):
    """Perplexity of the key tokens of some texts."""

    windows: int | None = None
    judge: Judge | None = None
    short_context: int | None = None
    shared_context: int | None = None
    bos: bool | None = None

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Return the tokens that the model and the judge read.

        Each text counts once for the score, once for the judge with the whole context, and about
        (short_context + shared_context) / shared_context = 5 times for the judge with the short context.
        """
        return amount(context, self.windows, WINDOWS) * length * 7

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row | None:
        """Score the key tokens of texts of `length` tokens; the control scores the same tokens in a shorter window."""
        short_context = limited_option(context, "short_context", self.short_context, SHORT_CONTEXT)
        shared_context = self.shared_context or min(SHARED_CONTEXT, max(1, short_context // 4))
        start = window_start(context, self.bos)
        texts = self._texts(context, length - len(start))
        judge = self._judge_model(context)
        judge_start = start if self.judge is None else start_ids(judge.tokenizer)
        with context.timed() as usage:
            spans, judge_counts = zip(
                *[key_token_spans(judge, text, short_context, shared_context, judge_start) for text, _, _ in texts],
                strict=True,
            )
            # without BOS, the first token has no context and is not scored
            first = 0 if len(start) else 1
            masks = [
                inside_spans(offsets, key_spans)[first:]
                for (_, _, offsets), key_spans in zip(texts, spans, strict=True)
            ]
            losses = [_losses_with_whole_context(context.model, ids, start) for _, ids, _ in texts]
        groups = np.concatenate([np.full(mask.sum(), index) for index, mask in enumerate(masks)])
        if not len(groups):
            logger.warning(
                "LongPPL at %d tokens has no row: the judge finds no token that a context of more than %d tokens makes "
                "easier.",
                length,
                short_context,
            )
            return None
        summary = _summarise_key_tokens(context, losses, masks, groups)

        def measure_control() -> float:
            window = context.control_length
            stride = max(1, min(shared_context, window // 2))
            in_window = [sliding_losses(context.model, ids, window, stride, start) for _, ids, _ in texts]
            return _summarise_key_tokens(context, in_window, masks, groups)["loss"]

        control_key = key(f"longppl at {length}", "within")
        control = control_loss(context, length, control_key, summary["loss"], measure_control)
        every_loss = np.concatenate(losses)
        return context.row(
            usage,
            task="perplexity",
            measure="LongPPL",
            length=length,
            tokens=length,
            depth=None,
            score=summary["perplexity"],
            low=None if summary["low"] is None else math.exp(summary["low"]),
            high=None if summary["high"] is None else math.exp(summary["high"]),
            samples=summary["tokens"],
            control=math.exp(control),
            control_length=min(length, context.control_length),
            measured_on=f"{summary['tokens']} key tokens among the first {length} tokens of {len(texts)} texts of "
            f"{context.corpus.name}, which the judge predicts better by more than {MIN_GAIN} nats, and below "
            f"{MAX_LOSS}, than with {short_context} to {short_context + shared_context - 1} tokens before them; exp of "
            f"their mean loss, {start_words(context, start)}, each token weighing the same",
            details={
                "judge": "the evaluated model" if self.judge is None else self.judge.name,
                "key_tokens": summary["tokens"],
                "key_tokens_of_judge": sum(judge_counts),
                "key_hash": hashlib.sha256(repr(spans).encode()).hexdigest()[:12],
                "scored_tokens": int(every_loss.size),
                "perplexity_of_all": math.exp(min(float(every_loss.mean()), 700.0)),
                "short_context": short_context,
                "shared_context": shared_context,
                **start_facts(context, start),
            },
        )

    def _judge_model(self, context: EvaluationContext) -> EvaluatedModel:
        if self.judge is None:
            return context.model
        evaluated = context.model
        return type(evaluated)(
            self.judge.model,
            self.judge.tokenizer,
            autocast=evaluated.autocast,
            advance=evaluated.advance,
            work=evaluated.work,
        )

    def _texts(self, context: EvaluationContext, length: int) -> list[tuple[str, np.ndarray, list[CharSpan]]]:
        """Return the first `length` tokens of some documents, each as text, ids [length] and character spans.

        All lengths use the same documents. If no document is long enough, they are joined.
        """
        longest = context.max_length
        long_enough = [i for i, ids in enumerate(context.corpus.documents) if len(ids) >= longest]
        order = np.random.default_rng([context.seed, longest]).permutation(len(long_enough))
        count = amount(context, self.windows, WINDOWS)
        chosen = [context.corpus.texts[long_enough[index]] for index in order[:count]]
        texts = []
        for text in chosen or ["".join(context.corpus.texts)]:
            ids, offsets = _encode_with_offsets(context.model.tokenizer, text)
            texts.append((text[: offsets[length - 1][1]], ids[:length], offsets[:length]))
        return texts


def _summarise_key_tokens(
    context: EvaluationContext, losses: Sequence[np.ndarray], masks: Sequence[np.ndarray], groups: np.ndarray
) -> dict[str, Any]:
    key_losses = np.concatenate([loss[mask] for loss, mask in zip(losses, masks, strict=True)])
    return context.token_loss(key_losses.tolist(), groups.tolist())


def _encode_with_offsets(tokenizer: Any, text: str) -> tuple[np.ndarray, list[CharSpan]]:
    """Return the ids [n] of a text without special tokens, and the character span of each token."""
    if not tokenizer.is_fast:
        raise PePatchError(
            "LongPPL needs the position of each token in the text, which only fast tokenizers give. "
            "Load the tokenizer with use_fast=True, or leave 'longppl' out."
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return np.array(encoding["input_ids"], dtype=np.int64), [(start, end) for start, end in encoding["offset_mapping"]]
