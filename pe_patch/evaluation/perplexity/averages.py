"""How papers and libraries turn losses into one perplexity: pure functions, none like another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .sliding import Span

LONGLORA_E = 2.71828
"""The base that LongLoRA's evaluation writes for e."""


def yarn_spans(count: int, window: int, stride: int) -> list[Span]:
    """Windows of `window` tokens of a text that begin at multiples of `stride`, until one reaches the end.

    Each scores what the one before has not reached, so the last may be shorter, with less before its tokens.
    """
    spans: list[Span] = []
    for start in range(0, count, stride):
        end = min(start + window, count)
        spans.append(Span(start, end, end - (spans[-1].end if spans else 0)))
        if end == count:
            break
    return spans


def longlora_spans(count: int, window: int, stride: int) -> list[Span]:
    """Windows that begin at multiples of `stride` below `count` - `window`, the last left out; all but the first token
    of each are scored, so that most tokens are scored many times."""
    return [Span(start, start + window, window - 1) for start in range(0, count - window, stride)][:-1]


def mean_of_window_means(windows: Sequence[np.ndarray]) -> float:
    """A first window of many tokens weighs as much as a later one of a few (YaRN; LongLoRA has windows of one size).

    LongLoRA takes the mean of batches first, which is the same where all batches are full.
    """
    return math.fsum(math.fsum(losses) / len(losses) for losses in windows) / len(windows)


def mean_of_tokens(windows: Sequence[np.ndarray]) -> float:
    """Every token weighs the same (PoSE, lm-eval's rolling)."""
    return math.fsum(loss for losses in windows for loss in losses) / sum(map(len, windows))


def mean_of_perplexities(texts: Sequence[np.ndarray]) -> float:
    """The mean of exp(mean loss) over texts: a text that is predicted badly outweighs the rest (`evaluate`)."""
    return math.fsum(math.exp(math.fsum(losses) / len(losses)) for losses in texts) / len(texts)
