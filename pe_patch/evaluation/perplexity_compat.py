"""Perplexity as papers and libraries compute it, for comparison with their figures. No two of them average alike.

YaRN: arXiv:2309.00071, eval/perplexity.py. PoSE: arXiv:2309.10400, src/eval_ppl.py. LongLoRA: arXiv:2309.12307,
eval.py. `evaluate`: the metric "perplexity" of Hugging Face evaluate. lm-eval: `loglikelihood_rolling` of
lm-evaluation-harness.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import PePatchError
from .context import EvaluationContext, ResourceUsage
from .model import EvaluatedModel
from .perplexity_measures import (
    STRETCH_TOKENS,
    WINDOWS,
    JournalKey,
    Measure,
    Span,
    StridedMeasure,
    amount,
    sliding_spans,
    span_losses,
    start_facts,
)
from .results import Row

DOCUMENTS = 8
LONGLORA_E = 2.71828
"""The value of e in LongLoRA's evaluation."""


# Windows and averages


def yarn_spans(count: int, window: int, stride: int) -> list[Span]:
    """Return windows of `window` tokens that start at multiples of `stride`, up to the first that reaches the end.

    Each window scores the tokens that the previous one did not reach. The last window may be shorter, which leaves its
    tokens less context.
    """
    spans: list[Span] = []
    for start in range(0, count, stride):
        end = min(start + window, count)
        spans.append(Span(start, end, end - (spans[-1].end if spans else 0)))
        if end == count:
            break
    return spans


def longlora_spans(count: int, window: int, stride: int) -> list[Span]:
    """Return windows that start at multiples of `stride` below `count` - `window`, without the last window.

    Each window scores all its tokens but the first, so that most tokens are scored many times.
    """
    return [Span(start, start + window, window - 1) for start in range(0, count - window, stride)][:-1]


def mean_of_window_means(windows: Sequence[np.ndarray]) -> float:
    """Average the mean losses of the windows, as YaRN does. A short window weighs as much as a long one.

    LongLoRA, whose windows have equal size, averages batches first. This is the same if all batches are full.
    """
    return math.fsum(math.fsum(losses) / len(losses) for losses in windows) / len(windows)


def mean_of_tokens(windows: Sequence[np.ndarray]) -> float:
    """Average the losses of all tokens with equal weights, as PoSE and lm-eval do."""
    return math.fsum(loss for losses in windows for loss in losses) / sum(map(len, windows))


def mean_of_perplexities(texts: Sequence[np.ndarray]) -> float:
    """Average exp(mean loss) over the texts, as Hugging Face evaluate does. Badly predicted texts dominate."""
    return math.fsum(math.exp(math.fsum(losses) / len(losses)) for losses in texts) / len(texts)


# Measures


def required_bos(context: EvaluationContext, mode: str) -> list[int]:
    """Return the id of BOS, which the reference of a compat mode puts before every window, for any tokenizer.

    Raises:
        PePatchError: The tokenizer has no BOS token.
    """
    bos = context.model.tokenizer.bos_token_id
    if bos is None:
        raise PePatchError(
            f"compat={mode!r} puts the BOS token before every window, and this tokenizer has none. "
            "Use measures=('sliding',), which does as the tokenizer does."
        )
    return [bos]


def _compat_row(
    context: EvaluationContext,
    usage: ResourceUsage,
    length: int,
    name: str,
    measure: str,
    perplexity: float,
    windows: list[np.ndarray],
    measured_on: str,
    start: Sequence[int],
    details: dict[str, Any] | None = None,
) -> Row:
    """Make the row of a compat mode: the perplexity that the original prints, without interval and control."""
    return context.row(
        usage,
        task="perplexity",
        measure=measure,
        length=length,
        tokens=length,
        depth=None,
        score=perplexity,
        low=None,
        high=None,
        samples=sum(map(len, windows)),
        control=None,
        control_length=None,
        measured_on=measured_on,
        details={"compat": name, "windows": len(windows), **start_facts(context, start), **(details or {})},
    )


@dataclass(frozen=True)
class YarnSliding(StridedMeasure):
    """YaRN's sliding window: BOS before every window, and the mean of the windows' means."""

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Score the stretches of the sliding measure."""
        windows, usage, measured_on = _yarn_windows(self, context, length, "yarn")
        measured_on += "; the mean of the windows' means, the first window weighing as much as another's newest tokens"
        return _compat_row(
            context,
            usage,
            length,
            "yarn",
            "perplexity, as YaRN's sliding window",
            math.exp(mean_of_window_means(windows)),
            windows,
            measured_on,
            required_bos(context, "yarn"),
            {"stride": self.stride_for(context)},
        )


@dataclass(frozen=True)
class PoseSliding(StridedMeasure):
    """PoSE's sliding window: YaRN's windows, and the mean over tokens."""

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Score the stretches of the sliding measure."""
        windows, usage, measured_on = _yarn_windows(self, context, length, "pose")
        return _compat_row(
            context,
            usage,
            length,
            "pose",
            "perplexity, as PoSE's sliding window",
            math.exp(mean_of_tokens(windows)),
            windows,
            f"{measured_on}; each token weighing the same",
            required_bos(context, "pose"),
            {"stride": self.stride_for(context)},
        )


def _yarn_windows(
    measure: StridedMeasure, context: EvaluationContext, length: int, mode: str
) -> tuple[list[np.ndarray], ResourceUsage, str]:
    """Return the losses of YaRN's windows over the stretches of the sliding measure, and a description of them."""
    stride, start = measure.stride_for(context), required_bos(context, mode)
    texts, where = measure.stretches(context)
    with context.timed() as usage:
        windows = [
            losses
            for ids in texts
            for losses in span_losses(context.model, ids, yarn_spans(len(ids), length - 1, stride), start)
        ]
    measured_on = (
        f"every token of {len(texts)} stretches of {len(texts[0])} tokens ({where}) in {context.corpus.name}, in "
        f"{len(windows)} windows of up to {length - 1} tokens behind the BOS token that begin every {stride} tokens"
    )
    return windows, usage, measured_on


@dataclass(frozen=True)
class YarnTruncate(Measure):
    """YaRN's --truncate: the first length - 1 tokens of each text behind BOS, and the mean of the texts' means."""

    windows: int | None = None

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Return the tokens of all pieces."""
        return amount(context, self.windows, WINDOWS) * length

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Score the beginnings of some pieces of text."""
        start, size = required_bos(context, "yarn_truncate"), context.max_length
        texts, where = context.corpus.spots(size, size, amount(context, self.windows, WINDOWS), context.seed)
        with context.timed() as usage:
            windows = [span_losses(context.model, ids, [Span(0, length - 1, length - 1)], start)[0] for ids in texts]
        return _compat_row(
            context,
            usage,
            length,
            "yarn_truncate",
            "perplexity, as YaRN's --truncate",
            math.exp(mean_of_window_means(windows)),
            windows,
            f"the first {length - 1} tokens of {len(texts)} pieces ({where}) in {context.corpus.name}, the BOS token "
            "before each; the mean of the pieces' means",
            start,
        )


@dataclass(frozen=True)
class LongLora(StridedMeasure):
    """LongLoRA's evaluation: all tokens of overlapping windows over joined documents, and the mean of their means."""

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Score the windows over the beginning of the joined documents.

        Raises:
            PePatchError: The text has fewer than two windows.
        """
        stride = self.stride_for(context)
        ids = context.corpus.stream[: context.max_length + (self.stretch_tokens or STRETCH_TOKENS)]
        spans = longlora_spans(len(ids), length, stride)
        if not spans:
            raise PePatchError(
                f"compat='longlora' leaves its last window out, and {len(ids)} tokens of text hold no two windows of "
                f"{length} tokens {stride} apart. Give a longer text, a larger stretch_tokens or a smaller stride."
            )
        with context.timed() as usage:
            windows = span_losses(context.model, ids, spans)
        return _compat_row(
            context,
            usage,
            length,
            "longlora",
            "perplexity, as LongLoRA's",
            LONGLORA_E ** mean_of_window_means(windows),
            windows,
            f"all tokens but the first of {len(spans)} windows of {length} tokens that begin every {stride} tokens of "
            f"the first {len(ids)} of {context.corpus.name}, documents joined, the last window left out, so most "
            f"tokens are scored many times; the mean of the windows' means, as a power of {LONGLORA_E}; no "
            "window starts with a BOS token",
            [],
            {"stride": stride},
        )


@dataclass(frozen=True)
class HuggingFaceEvaluate(Measure):
    """The metric of Hugging Face evaluate: texts cut to length - 1 tokens behind BOS, and the mean of perplexities."""

    documents: int | None = None

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Return the tokens of the cut documents."""
        return sum(
            min(length, len(ids)) for ids in context.corpus.documents[: amount(context, self.documents, DOCUMENTS)]
        )

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Score the beginnings of the first documents."""
        start = required_bos(context, "evaluate")
        texts = [ids[: length - 1] for ids in context.corpus.documents[: amount(context, self.documents, DOCUMENTS)]]
        with context.timed() as usage:
            windows = [span_losses(context.model, ids, [Span(0, len(ids), len(ids))], start)[0] for ids in texts]
        return _compat_row(
            context,
            usage,
            length,
            "evaluate",
            "perplexity, as Hugging Face evaluate's",
            mean_of_perplexities(windows),
            windows,
            f"the first {length - 1} tokens, or all, of the first {len(texts)} documents of {context.corpus.name}, the "
            "BOS token before each; the mean of the documents' perplexities",
            start,
        )


@dataclass(frozen=True)
class LmEvalRolling(Measure):
    """lm-eval's rolling likelihood: windows without overlap, one token before each, and the perplexity per word."""

    documents: int | None = None

    def tokens(self, context: EvaluationContext, length: int) -> int:
        """Return the tokens of the documents."""
        return sum(map(len, context.corpus.documents[: amount(context, self.documents, DOCUMENTS)]))

    def row(self, context: EvaluationContext, length: int, key: JournalKey) -> Row:
        """Score every token of the first documents."""
        texts = context.corpus.texts[: amount(context, self.documents, DOCUMENTS)]
        with context.timed() as usage:
            windows = [rolling_losses(context.model, text, length) for text in texts]
        total = math.fsum(loss for losses in windows for loss in losses)
        # lm-eval's tasks count words and bytes in this way
        words = sum(len(re.split(r"\s+", text)) for text in texts)
        size = sum(len(text.encode("utf-8")) for text in texts)
        return _compat_row(
            context,
            usage,
            length,
            "lm_eval",
            "word perplexity, as lm-eval's rolling",
            math.exp(min(total / words, 700.0)),
            windows,
            f"every token of the first {len(texts)} documents of {context.corpus.name}, in windows of {length} tokens "
            "that do not overlap, one token before each (the last reaches back as far as it can); the whole loss by "
            "the number of words",
            rolling_prefix(context.model.tokenizer),
            {
                "log_likelihood": -total,
                "token_perplexity": math.exp(total / sum(map(len, windows))),
                "byte_perplexity": math.exp(total / size),
                "bits_per_byte": total / size / math.log(2),
            },
        )


def rolling_losses(model: EvaluatedModel, text: str, window: int) -> np.ndarray:
    """Compute the loss of every token of a text in the windows of lm-eval.

    The first token is predicted from BOS, or from EOS if the tokenizer has no BOS. The ids include the special tokens
    that the tokenizer adds by default.

    Args:
        model: The evaluated model.
        text: The text.
        window: Tokens that the model reads at a time.

    Returns:
        Losses in nats [n].

    Raises:
        PePatchError: The tokenizer has neither BOS nor EOS.
    """
    tokenizer = model.tokenizer
    (prefix,) = rolling_prefix(tokenizer)
    plain = {"add_special_tokens": False} if text.startswith(tokenizer.decode([prefix])) else {}
    ids = np.array([prefix, *tokenizer.encode(text, verbose=False, **plain)], dtype=np.int64)
    # The model predicts the last token of a span without reading it, so a span has one token more than the window.
    spans = sliding_spans(len(ids), window + 1, window)
    return np.concatenate([_losses_without_last(model, ids[span.start : span.end])[-span.scored :] for span in spans])


def rolling_prefix(tokenizer: Any) -> list[int]:
    """Return the id from which lm-eval predicts the first token of a text.

    Raises:
        PePatchError: The tokenizer has neither BOS nor EOS.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise PePatchError(
            "compat='lm_eval' predicts the first token from BOS or EOS, and this tokenizer has neither. Set its "
            "eos_token, or leave compat='lm_eval' out."
        )
    return [prefix]


def _losses_without_last(model: EvaluatedModel, ids: np.ndarray) -> np.ndarray:
    """Return the losses of all tokens but the first. The model does not read the last one."""
    tokens = torch.from_numpy(ids).to(model.device)
    with model.inference_mode():
        logits = model.model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
    model.advance(len(ids) - 1)
    return F.cross_entropy(logits.float(), tokens[1:], reduction="none").double().cpu().numpy()


COMPAT: dict[str, type[Measure]] = {
    "yarn": YarnSliding,
    "pose": PoseSliding,
    "yarn_truncate": YarnTruncate,
    "longlora": LongLora,
    "evaluate": HuggingFaceEvaluate,
    "lm_eval": LmEvalRolling,
}
