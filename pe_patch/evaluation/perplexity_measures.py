"""Measures of loss: on fixed targets, in a sliding window, and by position; and what every measure of loss shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import PePatchError
from .context import EvaluationContext, ResourceUsage
from .model import EvaluatedModel
from .results import Row
from .retrieval import start_ids

TARGETS = 128
SPOTS = 64
STRIDE = 256
STRETCH_TOKENS = 8192
WINDOWS = 8
FULL_SAMPLES = 32
"""Questions at each length from which on a measure reads its whole default amount of text."""

JournalKey = Callable[..., str]
"""Makes the journal key of a value from the names that identify it."""


class Measure:
    """One way to measure perplexity. Subclasses are frozen dataclasses whose fields are its options.

    An option that is None has its default value.
    """

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Estimate how many tokens the model reads at one length, for the progress bar."""
        raise NotImplementedError

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row | None:
        """Measure one length.

        Args:
            context: Model, text and settings of the evaluation.
            length: Tokens that the model reads at a time.
            key: Makes the journal keys of values that several lengths share.

        Returns:
            The row, or None if the text has nothing to score.
        """
        raise NotImplementedError


def window_start(context: EvaluationContext, bos: bool | None) -> np.ndarray:
    """Return the ids [n] that every window starts with: BOS, or none.

    Args:
        context: Its template has the setting of the evaluation.
        bos: The measure's own setting. None takes that of the evaluation.
    """
    return context.start_ids if bos is None else start_ids(context.model.tokenizer, bos)


def start_facts(context: EvaluationContext, start: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Return the facts about BOS for the details of a row."""
    return {"bos": len(start) > 0, "window_start": context.model.tokenizer.convert_ids_to_tokens(list(map(int, start)))}


def start_words(context: EvaluationContext, start: Sequence[int] | np.ndarray) -> str:
    """Return words for the description of a row: whether its windows start with BOS."""
    tokens = start_facts(context, start)["window_start"]
    return f"every window starts with {' '.join(tokens)}" if tokens else "no window starts with a BOS token"


def amount(context: EvaluationContext, value: int | None, default: int) -> int:
    """Return an option that sets how much text is read; None is the default, in proportion to few `samples`.

    At least 2, so that the loss has an interval.
    """
    return value or max(2, -(-default * min(context.samples, FULL_SAMPLES) // FULL_SAMPLES))


def limited_option(context: EvaluationContext, name: str, value: int | None, default: int, start: int = 0) -> int:
    """Return an option in tokens that must be below every length; None is the default, or half the shortest length.

    Args:
        context: Settings of the evaluation.
        name: Name of the option, for the error.
        value: The option.
        default: The value for None.
        start: Tokens that every window starts with before the text.

    Raises:
        PePatchError: The value is not below the shortest length.
    """
    bound = context.min_length - max(0, start - 1)
    if value is not None and value >= bound:
        raise PePatchError(f"{name}={value} leaves no context at length {bound}. Use a value below {bound}.")
    return value or max(1, min(default, bound // 2))


def summarise(context: EvaluationContext, losses: np.ndarray, groups: np.ndarray | None = None) -> dict[str, Any]:
    """Return the mean, the interval, the perplexity and the bits per byte of some losses.

    Args:
        context: Its corpus gives the bytes per token.
        losses: Losses in nats [groups, tokens], or of any shape together with `groups`.
        groups: Index of the text spot of each loss, in the shape of `losses`. None takes the row number.
    """
    if groups is None:
        groups = np.repeat(np.arange(len(losses)), losses.shape[1])
    return context.token_loss(losses.ravel().tolist(), groups.ravel().tolist())


def control_loss(
    context: EvaluationContext, length: int, key: str, loss: float, measure_control: Callable[[], float]
) -> float:
    """Return the loss on the same tokens within the trained window, measured once for all lengths.

    Args:
        context: Settings and journal of the evaluation.
        length: Length of the row.
        key: Journal key of the control.
        loss: Loss at `length`. It is the control itself up to the control length.
        measure_control: Measures the loss at the control length.
    """
    if length < context.control_length:
        return loss
    control = context.recall(key)
    if control is None:
        control = context.remember(key, loss if length == context.control_length else measure_control())
    return control


def loss_row(
    context: EvaluationContext,
    usage: ResourceUsage,
    length: int,
    measure: str,
    summary: dict[str, Any],
    measured_on: str,
    details: dict[str, Any],
    *,
    control: float | None = None,
    without_context: float | None = None,
) -> Row:
    """Make the row of a measure whose score is a loss in nats per token; `summary` is from `summarise`."""
    return context.row(
        usage,
        task="perplexity",
        measure=measure,
        length=length,
        tokens=length,
        depth=None,
        score=summary["loss"],
        low=summary["low"],
        high=summary["high"],
        samples=summary["tokens"],
        control=control,
        control_length=None if control is None else min(length, context.control_length),
        without_context=without_context,
        measured_on=measured_on,
        details={"perplexity": summary["perplexity"], "bits_per_byte": summary["bits_per_byte"], **details},
    )


# Fixed targets


@dataclass(frozen=True)
class FixedTargets(Measure):
    """Loss of the same last tokens of each piece of text at every length.

    Only this measure separates the effect of more context from the effect of other target tokens.
    """

    targets: int | None = None
    spots: int | None = None
    bos: bool | None = None

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Return the tokens of all pieces, and of the control."""
        return amount(context, self.spots, SPOTS) * (length + context.control_tokens(length))

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Score the last tokens of pieces of `length` tokens; the control shortens the text before them."""
        start = window_start(context, self.bos)
        targets = limited_option(context, "targets", self.targets, TARGETS, len(start))
        pieces, where = context.corpus.spots(
            context.max_length, targets, amount(context, self.spots, SPOTS), context.seed
        )
        losses_at = partial(self._losses, context, pieces, targets, start)
        with context.timed() as usage:
            losses = losses_at(length)
        summary = summarise(context, losses)
        control = control_loss(
            context,
            length,
            key("fixed", "within"),
            summary["loss"],
            lambda: summarise(context, losses_at(context.control_length))["loss"],
        )
        bare_key = key("fixed", "bare")
        without_context = context.recall(bare_key)
        if without_context is None:
            # BOS alone before the targets, or one token of the text, since the model predicts nothing without a token
            bare = losses_at(targets + max(1, len(start)))
            without_context = context.remember(bare_key, summarise(context, bare)["loss"])
        target_ids = np.stack([piece[-targets:] for piece in pieces])
        return loss_row(
            context,
            usage,
            length,
            "nats per token, fixed targets",
            summary,
            f"the same last {targets} tokens of {len(pieces)} spots ({where}) in {context.corpus.name}, "
            f"{length - targets} tokens before them, {start_words(context, start)}, each token weighing the same",
            {
                "targets": targets,
                "spots": len(pieces),
                "targets_hash": hashlib.sha256(target_ids.tobytes()).hexdigest()[:12],
                "loss_by_spot": losses.mean(axis=1).tolist(),  # to pair the spots of two schemes
                **start_facts(context, start),
            },
            control=control,
            without_context=without_context,
        )

    def _losses(
        self, context: EvaluationContext, pieces: list[np.ndarray], targets: int, start: np.ndarray, length: int
    ) -> np.ndarray:
        return context.model.losses([window_of(piece, length, start) for piece in pieces], targets)


def window_of(piece: np.ndarray, length: int, start: np.ndarray) -> np.ndarray:
    """Return a window of `length` tokens: `start`, then the last tokens of a piece."""
    return np.concatenate([start, piece[len(piece) - (length - len(start)) :]])


# By position


def position_buckets(losses: np.ndarray, before: int = 1) -> list[dict[str, Any]]:
    """Average losses by position in buckets that double in size.

    Args:
        losses: Losses in nats [windows, positions].
        before: Tokens before the first predicted one.

    Returns:
        One dict per bucket. `first` and `last` count the tokens before the predicted one.
    """
    buckets, first, end = [], before, losses.shape[1] + before
    bounds = [1]
    while bounds[-1] < end:
        bounds.append(2 * bounds[-1])
    for bound in bounds:
        last = min(2 * bound, end) - 1
        if first > last:
            continue
        bucket = losses[:, first - before : last + 1 - before]
        buckets.append({"first": first, "last": last, "loss": float(bucket.mean()), "tokens": int(bucket.size)})
        first = last + 1
    return buckets


@dataclass(frozen=True)
class LossByPosition(Measure):
    """Loss of every token of some windows, by its position in the window."""

    windows: int | None = None
    bos: bool | None = None

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Return the tokens of all windows."""
        return amount(context, self.windows, WINDOWS) * length

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Score windows of `length` tokens in one pass; the control is the mean up to the control length."""
        start = window_start(context, self.bos)
        before = max(1, len(start))
        pieces, where = context.corpus.spots(
            context.max_length, TARGETS, amount(context, self.windows, WINDOWS), context.seed
        )
        with context.timed() as usage:
            losses = context.model.losses([window_of(piece, length, start) for piece in pieces], length - before)
        inside = min(length, context.control_length)
        return loss_row(
            context,
            usage,
            length,
            "nats per token, by position",
            summarise(context, losses),
            f"every token{'' if len(start) else ' but the first'} of {len(pieces)} windows ({where}) in "
            f"{context.corpus.name}, {start_words(context, start)}, each token weighing the same; the control is those "
            f"at positions below {inside}",
            {"buckets": position_buckets(losses, before), **start_facts(context, start)},
            control=float(losses[:, : inside - before].mean()),
        )


# Sliding window


@dataclass(frozen=True)
class Span:
    """A window of a text: the model reads tokens `start` to `end` (exclusive), and the last `scored` of them count."""

    start: int
    end: int
    scored: int


def sliding_losses(
    model: EvaluatedModel, ids: np.ndarray, window: int, stride: int, start: Sequence[int] | np.ndarray = ()
) -> np.ndarray:
    """Compute the loss of every token of a text in a sliding window.

    The first window scores all its tokens. Every other window moves by `stride` (the last one by less) and scores only
    its new tokens, so that each token counts once, with up to `window` - 1 tokens before it.

    Args:
        model: The evaluated model.
        ids: Token ids of the text [n].
        window: Tokens that the model reads at a time.
        stride: Tokens between the starts of two windows. It must be below `window`.
        start: Ids that every window starts with, in place of as many tokens of the text: BOS, or none.

    Returns:
        Losses in nats [n - 1], or [n] with `start`, since it gives the first token a context.
    """
    return np.concatenate(span_losses(model, ids, sliding_spans(len(ids), window, stride, len(start)), start))


def sliding_spans(count: int, window: int, stride: int, start: int = 0) -> list[Span]:
    """Return the windows of `sliding_losses` over `count` tokens. The last window is full, too."""
    window = min(window - start, count)
    starts = [*range(0, count - window + 1, stride)]
    spans = [Span(first, first + window, stride if first else window - (not start)) for first in starts]
    rest = count - spans[-1].end
    return [*spans, Span(count - window, count, rest)] if rest else spans


def span_losses(
    model: EvaluatedModel, ids: np.ndarray, spans: Sequence[Span], start: Sequence[int] | np.ndarray = ()
) -> list[np.ndarray]:
    """Compute the losses of the scored tokens of each span in nats; every window starts with the ids `start`.

    Spans of equal shape share batches.
    """
    prefix = np.array(start, dtype=ids.dtype)
    by_span: dict[Span, np.ndarray] = {}
    for shape in dict.fromkeys((span.end - span.start, span.scored) for span in spans):
        alike = [span for span in spans if (span.end - span.start, span.scored) == shape]
        sequences = [np.concatenate([prefix, ids[span.start : span.end]]) for span in alike]
        by_span.update(zip(alike, model.losses(sequences, shape[1]), strict=True))
    return [by_span[span] for span in spans]


@dataclass(frozen=True)
class StridedMeasure(Measure):
    """Base of measures that move a window by `stride` tokens over stretches of text."""

    stride: int | None = None
    stretch_tokens: int | None = None

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Return the tokens of one window per stride, and of the control."""
        windows = -(-amount(context, self.stretch_tokens, STRETCH_TOKENS) // self.stride_for(context))
        return windows * (length + context.control_tokens(length))

    def stride_for(self, context: EvaluationContext) -> int:
        """Return the stride: 256 tokens by default, or half the shortest length if that is less."""
        return limited_option(context, "stride", self.stride, STRIDE)

    def stretches(self, context: EvaluationContext) -> tuple[list[np.ndarray], str]:
        """Return about `stretch_tokens` tokens of text in stretches of equal length, and where they are from."""
        total = amount(context, self.stretch_tokens, STRETCH_TOKENS)
        size = max(context.max_length, min(total, 4 * context.max_length))
        return context.corpus.spots(size, size, max(1, total // size), context.seed)


@dataclass(frozen=True)
class SlidingWindow(StridedMeasure):
    """Loss of every token of some stretches of text in a sliding window."""

    bos: bool | None = None

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Slide a window of `length` tokens; the control slides one of the control length over the same stretches."""
        start = window_start(context, self.bos)
        stride = limited_option(context, "stride", self.stride, STRIDE, len(start))
        texts, where = self.stretches(context)
        losses_in = partial(self._losses, context, texts, stride, start)
        with context.timed() as usage:
            losses = losses_in(length)
        # One group per stride: a stretch per group would leave too few groups for an interval.
        groups = np.arange(losses.shape[1]) // stride + np.arange(len(texts))[:, None] * losses.shape[1]
        summary = summarise(context, losses, groups)
        size = len(texts[0])
        windows_per_text = len(sliding_spans(size, length, stride, len(start)))
        return loss_row(
            context,
            usage,
            length,
            "nats per token, sliding window",
            summary,
            f"every token{'' if len(start) else ' but the first'} of {len(texts)} stretches of {size} tokens ({where}) "
            f"in {context.corpus.name}, window {length}, stride {stride}, {start_words(context, start)}, each token "
            "weighing the same",
            {
                "window": length,
                "stride": stride,
                **start_facts(context, start),
                "stretches": len(texts),
                "stretch": size,
                "windows": windows_per_text * len(texts),
            },
            control=control_loss(
                context,
                length,
                key("sliding", "within"),
                summary["loss"],
                lambda: summarise(context, losses_in(context.control_length))["loss"],
            ),
        )

    def _losses(
        self, context: EvaluationContext, texts: list[np.ndarray], stride: int, start: np.ndarray, window: int
    ) -> np.ndarray:
        return np.stack([sliding_losses(context.model, ids, window, stride, start) for ids in texts])
