"""Metrics with confidence intervals. They are `evaluate.Metric` classes and need no script from the hub."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value

CONFIDENCE = 0.95
RESAMPLES = 2000
NORMAL_QUANTILE = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def binomial_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact interval of a proportion.

    The lower end is the p at which `successes` or more have the probability (1 - confidence) / 2. The upper end is the
    p at which `successes` or fewer have it.

    Raises:
        ValueError: The counts are not 0 <= successes <= trials with trials >= 1.

    Source: Clopper and Pearson, Biometrika 26, 1934.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"Need 0 <= successes <= trials and trials >= 1, got {successes} of {trials}.")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _root(lambda p: 1 - _binomial_cdf(successes - 1, trials, p) - tail)
    high = 1.0 if successes == trials else _root(lambda p: tail - _binomial_cdf(successes, trials, p))
    return low, high


def bootstrap_interval(
    scores: Sequence[float], sizes: Sequence[int] | None = None, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the percentile interval of a mean from `RESAMPLES` draws with a fixed seed.

    Args:
        scores: Scores, or with `sizes` the sums of the scores of each group.
        sizes: Number of questions in each group; None if each score is one question. Groups are drawn as a whole.
        confidence: Confidence level.

    Source: Efron, Annals of Statistics 7, 1979.
    """
    values = np.asarray(scores, dtype=np.float64)
    counts = np.ones(len(values)) if sizes is None else np.asarray(sizes, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values[picks].sum(axis=1) / counts[picks].sum(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def score_interval(scores: Sequence[float], groups: Sequence[Any] | None = None) -> tuple[float, float]:
    """Return the interval of a mean of scores from 0 to 1: exact if all scores are 0 or 1, else by the bootstrap.

    Scores of one group (questions about one text) are not independent, so the bootstrap draws whole groups. If all
    scores are 0, or all are 1, the interval is the exact one with one trial per group.

    Args:
        scores: Score of each question.
        groups: Group of each question. None puts each question into a group of one.
    """
    if groups is None or len(set(groups)) == len(scores):
        exact = all(score in (0, 1) for score in scores)
        return binomial_interval(int(sum(scores)), len(scores)) if exact else bootstrap_interval(scores)
    sums: dict[Any, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        sums.setdefault(group, []).append(score)
    if len(set(scores)) == 1 and scores[0] in (0, 1):
        return binomial_interval(int(scores[0]) * len(sums), len(sums))
    return bootstrap_interval([sum(group) for group in sums.values()], sizes=[len(group) for group in sums.values()])


def _binomial_cdf(successes: int, trials: int, p: float) -> float:
    """Return P(X <= successes) for binomial X with 0 < p < 1. Logarithms keep large counts from overflowing."""
    total = math.lgamma(trials + 1)
    return math.fsum(
        math.exp(
            total - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * math.log(p) + (trials - k) * math.log1p(-p)
        )
        for k in range(successes + 1)
    )


def _root(increasing: Any) -> float:
    """Find the zero of an increasing function over (0, 1) by bisection to 2^-50."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return (low + high) / 2


class RetrievalAccuracy(evaluate.Metric):
    """Share of answers that equal the reference, apart from surrounding white space, with its exact interval."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="predictions and references: the given and the correct answers, as strings.",
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        matches = [prediction.strip() == reference.strip() for prediction, reference in pairs]
        low, high = binomial_interval(sum(matches), len(matches))
        return {"accuracy": sum(matches) / len(matches), "low": low, "high": high, "samples": len(matches)}


class TokenLoss(evaluate.Metric):
    """Mean loss of all tokens with equal weights, its perplexity, and its bits per byte.

    Neighbouring tokens are not independent, so the interval is the normal one over the means of the groups (the text
    spots that the tokens are from). It is None with fewer than two groups.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="losses: one per token, in nats. groups: the index of each token's text spot.",
            features=Features({"losses": Value("float64"), "groups": Value("int64")}),
        )

    def _compute(
        self, losses: list[float], groups: list[int], bytes_per_token: float | None = None
    ) -> dict[str, float | None]:
        mean = math.fsum(losses) / len(losses)
        half = _half_width(losses, groups, mean)
        return {
            "loss": mean,
            "perplexity": math.exp(min(mean, 700.0)),
            "bits_per_byte": mean / math.log(2) / bytes_per_token if bytes_per_token else None,
            "low": None if half is None else mean - half,
            "high": None if half is None else mean + half,
            "tokens": len(losses),
        }


def _half_width(losses: list[float], groups: list[int], mean: float) -> float | None:
    """Return half the width of the normal interval of a ratio of sums, which weights groups by their tokens."""
    sums: dict[int, float] = {}
    for loss, group in zip(losses, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + loss - mean
    if len(sums) < 2:
        return None
    spread = math.fsum(value**2 for value in sums.values()) * len(sums) / (len(sums) - 1)
    return NORMAL_QUANTILE * math.sqrt(spread) / len(losses)
