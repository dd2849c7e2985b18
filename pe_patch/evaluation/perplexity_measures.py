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

TARGETS = 128
SPOTS = 64
STRIDE = 256
STRETCH_TOKENS = 8192
WINDOWS = 8

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


def limited_option(context: EvaluationContext, name: str, value: int | None, default: int) -> int:
    """Return an option in tokens that must be below every length; None is the default, or half the shortest length.

    Raises:
        PePatchError: The value is not below the shortest length.
    """
    bound = context.min_length
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

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Return the tokens of all pieces."""
        return (self.spots or SPOTS) * length

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Score the last tokens of pieces of `length` tokens; the control shortens the text before them."""
        targets = limited_option(context, "targets", self.targets, TARGETS)
        pieces, where = context.corpus.spots(context.max_length, targets, self.spots or SPOTS, context.seed)
        with context.timed() as usage:
            losses = context.model.losses([piece[-length:] for piece in pieces], targets)
        summary = summarise(context, losses)
        loss_with = partial(self._loss, context, pieces, targets)
        control = control_loss(
            context,
            length,
            key("fixed", "within"),
            summary["loss"],
            partial(loss_with, context.control_length),
        )
        bare_key = key("fixed", "bare")
        without_context = context.recall(bare_key)
        if without_context is None:
            without_context = context.remember(bare_key, loss_with(targets + 1))
        target_ids = np.stack([piece[-targets:] for piece in pieces])
        return loss_row(
            context,
            usage,
            length,
            "nats per token, fixed targets",
            summary,
            f"the same last {targets} tokens of {len(pieces)} spots ({where}) in {context.corpus.name}, "
            f"{length - targets} tokens before them, each token weighing the same",
            {
                "targets": targets,
                "spots": len(pieces),
                "targets_hash": hashlib.sha256(target_ids.tobytes()).hexdigest()[:12],
            },
            control=control,
            without_context=without_context,
        )

    def _loss(self, context: EvaluationContext, pieces: list[np.ndarray], targets: int, length: int) -> float:
        losses = context.model.losses([piece[-length:] for piece in pieces], targets)
        return summarise(context, losses)["loss"]


# By position


def position_buckets(losses: np.ndarray) -> list[dict[str, Any]]:
    """Average losses by position in buckets that double in size.

    Args:
        losses: Losses in nats [windows, positions]. Position 0 has one token before it.

    Returns:
        One dict per bucket. `first` and `last` count the tokens before the predicted one.
    """
    buckets, first = [], 1
    while first <= losses.shape[1]:
        last = min(2 * first - 1, losses.shape[1])
        bucket = losses[:, first - 1 : last]
        buckets.append({"first": first, "last": last, "loss": float(bucket.mean()), "tokens": int(bucket.size)})
        first = last + 1
    return buckets


@dataclass(frozen=True)
class LossByPosition(Measure):
    """Loss of every token of some windows, by its position in the window."""

    windows: int | None = None

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Return the tokens of all windows."""
        return (self.windows or WINDOWS) * length

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Score windows of `length` tokens in one pass; the control is the mean up to the control length."""
        pieces, where = context.corpus.spots(context.max_length, TARGETS, self.windows or WINDOWS, context.seed)
        with context.timed() as usage:
            losses = context.model.losses([piece[-length:] for piece in pieces], length - 1)
        inside = min(length, context.control_length)
        return loss_row(
            context,
            usage,
            length,
            "nats per token, by position",
            summarise(context, losses),
            f"every token but the first of {len(pieces)} windows ({where}) in {context.corpus.name}, each token "
            f"weighing the same; the control is those at positions below {inside}",
            {"buckets": position_buckets(losses)},
            control=float(losses[:, : inside - 1].mean()),
        )


# Sliding window


@dataclass(frozen=True)
class Span:
    """A window of a text: the model reads tokens `start` to `end` (exclusive), and the last `scored` of them count."""

    start: int
    end: int
    scored: int


def sliding_losses(
    model: EvaluatedModel, ids: np.ndarray, window: int, stride: int, bos: int | None = None
) -> np.ndarray:
    """Compute the loss of every token of a text in a sliding window.

    The first window scores all its tokens. Every other window moves by `stride` (the last one by less) and scores only
    its new tokens, so that each token counts once, with up to `window` - 1 tokens before it.

    Args:
        model: The evaluated model.
        ids: Token ids of the text [n].
        window: Tokens that the model reads at a time.
        stride: Tokens between the starts of two windows. It must be below `window`.
        bos: Id that every window starts with, in place of one token of the text; None for no such id.

    Returns:
        Losses in nats [n - 1], or [n] with `bos`, since it gives the first token a context.
    """
    return np.concatenate(span_losses(model, ids, sliding_spans(len(ids), window, stride, bos is not None), bos))


def sliding_spans(count: int, window: int, stride: int, bos: bool) -> list[Span]:
    """Return the windows of `sliding_losses` over `count` tokens. The last window is full, too."""
    window = min(window - bos, count)
    starts = [*range(0, count - window + 1, stride)]
    spans = [Span(start, start + window, stride if start else window - (not bos)) for start in starts]
    rest = count - spans[-1].end
    return [*spans, Span(count - window, count, rest)] if rest else spans


def span_losses(
    model: EvaluatedModel, ids: np.ndarray, spans: Sequence[Span], bos: int | None = None
) -> list[np.ndarray]:
    """Compute the losses of the scored tokens of each span in nats. Spans of equal shape share batches."""
    prefix = [] if bos is None else [bos]
    by_span: dict[Span, np.ndarray] = {}
    for shape in dict.fromkeys((span.end - span.start, span.scored) for span in spans):
        alike = [span for span in spans if (span.end - span.start, span.scored) == shape]
        sequences = [np.concatenate([np.array(prefix, dtype=ids.dtype), ids[span.start : span.end]]) for span in alike]
        by_span.update(zip(alike, model.losses(sequences, shape[1]), strict=True))
    return [by_span[span] for span in spans]


def bos_token(context: EvaluationContext, option: str) -> int:
    """Return the id of the tokenizer's BOS token.

    Args:
        context: Its model has the tokenizer.
        option: The option that needs the token, for the error.

    Raises:
        PePatchError: The tokenizer has none.
    """
    bos = context.model.tokenizer.bos_token_id
    if bos is None:
        raise PePatchError(
            f"{option} puts the BOS token before every window, and this tokenizer has none. "
            "Use measures=('sliding',) without bos, which needs none."
        )
    return bos


@dataclass(frozen=True)
class StridedMeasure(Measure):
    """Base of measures that move a window by `stride` tokens over stretches of text."""

    stride: int | None = None
    stretch_tokens: int | None = None

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Return the tokens of one window per stride."""
        return -(-(self.stretch_tokens or STRETCH_TOKENS) // self.stride_for(context)) * length

    def stride_for(self, context: EvaluationContext) -> int:
        """Return the stride: 256 tokens by default, or half the shortest length if that is less."""
        return limited_option(context, "stride", self.stride, STRIDE)

    def stretches(self, context: EvaluationContext) -> tuple[list[np.ndarray], str]:
        """Return about `stretch_tokens` tokens of text in stretches of equal length, and where they are from."""
        total = self.stretch_tokens or STRETCH_TOKENS
        size = max(context.max_length, min(total, 4 * context.max_length))
        return context.corpus.spots(size, size, max(1, total // size), context.seed)


@dataclass(frozen=True)
class SlidingWindow(StridedMeasure):
    """Loss of every token of some stretches of text in a sliding window."""

    bos: bool | None = None

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Slide a window of `length` tokens; the control slides one of the control length over the same stretches."""
        stride, bos = self.stride_for(context), bos_token(context, "bos=True") if self.bos else None
        texts, where = self.stretches(context)
        losses_in = partial(self._losses, context, texts, stride, bos)
        with context.timed() as usage:
            losses = losses_in(length)
        # One group per stride: a stretch per group would leave too few groups for an interval.
        groups = np.arange(losses.shape[1]) // stride + np.arange(len(texts))[:, None] * losses.shape[1]
        summary = summarise(context, losses, groups)
        size = len(texts[0])
        windows_per_text = len(sliding_spans(size, length, stride, bos is not None))
        return loss_row(
            context,
            usage,
            length,
            "nats per token, sliding window",
            summary,
            f"every token{'' if self.bos else ' but the first'} of {len(texts)} stretches of {size} tokens ({where}) "
            f"in {context.corpus.name}, window {length}{' with the BOS token first' if self.bos else ''}, stride "
            f"{stride}, each token weighing the same",
            {
                "window": length,
                "stride": stride,
                "bos": bool(self.bos),
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
        self, context: EvaluationContext, texts: list[np.ndarray], stride: int, bos: int | None, window: int
    ) -> np.ndarray:
        return np.stack([sliding_losses(context.model, ids, window, stride, bos) for ids in texts])
