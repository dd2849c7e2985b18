"""Metrics with confidence intervals. They are `evaluate.Metric` classes and need no script from the hub."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from scipy.special import betaincinv, stdtrit

CONFIDENCE = 0.95
SHUFFLES = 16
"""Orders of the scores over which `bounded_interval` averages, so that it does not depend on the given one."""
GRID = 1000
"""Steps of `bounded_interval` between 0 and 1. Its ends are rounded outwards to one of them."""


def binomial_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact interval of a proportion.

    The lower end is the p at which `successes` or more have the probability (1 - confidence) / 2. The upper end is the
    p at which `successes` or fewer have it. Both are quantiles of beta distributions.

    Raises:
        ValueError: The counts are not 0 <= successes <= trials with trials >= 1.

    Source: Clopper and Pearson, Biometrika 26, 1934.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"Need 0 <= successes <= trials and trials >= 1, got {successes} of {trials}.")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else betaincinv(successes, trials - successes + 1, tail)
    high = 1.0 if successes == trials else betaincinv(successes + 1, trials - successes, 1 - tail)
    return float(low), float(high)


def bounded_interval(scores: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return an interval of the mean of independent scores from 0 to 1 that holds for any number of them.

    A mean m is outside if someone who bets against m, with stakes set by the scores so far, multiplies the stake by
    1 / (1 - confidence). Unlike a bootstrap or a normal interval, this has its coverage for few scores, and a width for
    equal ones. The capital is averaged over `SHUFFLES` orders of the scores and over both directions of the bet.

    Source: Waudby-Smith and Ramdas, Journal of the Royal Statistical Society B 86, 2024, arXiv 2010.09686, theorem 3:
    hedged capital with the stakes of its equation 26, truncated at 3/4.
    """
    values, alpha = np.asarray(scores, dtype=np.float64), 1 - confidence
    rng, means = np.random.default_rng(0), np.arange(GRID + 1) / GRID
    capital = np.mean([_capital(rng.permutation(values), means, alpha) for _ in range(SHUFFLES)], axis=0)
    inside = np.flatnonzero(capital < 1 / alpha)
    mean = float(values.mean())
    low, high = (means[inside[0]], means[inside[-1]]) if len(inside) else (mean, mean)
    return max(0.0, min(float(low) - 1 / GRID, mean)), min(1.0, max(float(high) + 1 / GRID, mean))


def _capital(values: np.ndarray, means: np.ndarray, alpha: float) -> np.ndarray:
    """Return the capital [means] after betting against each mean, half of it upwards and half of it downwards.

    Args:
        values: Scores in the order of the bets [n].
        means: Means to bet against [means].
        alpha: 1 - confidence, which sets the stakes.
    """
    count = np.arange(1, len(values) + 1) + 1
    estimates = (0.5 + np.cumsum(values)) / count
    variances = (0.25 + np.cumsum((values - estimates) ** 2)) / count
    stakes = np.sqrt(2 * np.log(2 / alpha) / (len(values) * np.concatenate([[0.25], variances[:-1]])))
    gains = values - means[:, None]
    with np.errstate(divide="ignore"):
        up = 1 + np.minimum(stakes, 0.75 / means[:, None]) * gains
        down = 1 - np.minimum(stakes, 0.75 / (1 - means[:, None])) * gains
    return (up.prod(axis=1) + down.prod(axis=1)) / 2


def score_interval(scores: Sequence[float], groups: Sequence[Any] | None = None) -> tuple[float, float]:
    """Return the interval of a mean of scores from 0 to 1: exact if all scores are 0 or 1, else `bounded_interval`.

    Scores of one group (questions about one text) are not independent, so the groups' means take the place of the
    scores. If all scores are 0, or all are 1, the interval is the exact one with one trial per group.

    Args:
        scores: Score of each question.
        groups: Group of each question. None puts each question into a group of one.

    Raises:
        ValueError: There is no score, or one is not from 0 to 1.
    """
    if not len(scores) or not all(0 <= score <= 1 for score in scores):
        raise ValueError(f"Scores must be numbers from 0 to 1, got {list(scores)[:5]}.")
    if groups is None or len(set(groups)) == len(scores):
        exact = all(score in (0, 1) for score in scores)
        return binomial_interval(int(sum(scores)), len(scores)) if exact else bounded_interval(scores)
    by_group: dict[Any, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        by_group.setdefault(group, []).append(score)
    if len(set(scores)) == 1 and scores[0] in (0, 1):
        return binomial_interval(int(scores[0]) * len(by_group), len(by_group))
    # A group of more questions weighs more: sums over the largest size are from 0 to 1 too, and have the mean
    # score x mean size / largest size.
    largest, mean_size = max(map(len, by_group.values())), len(scores) / len(by_group)
    low, high = bounded_interval([sum(group) / largest for group in by_group.values()])
    return min(1.0, low * largest / mean_size), min(1.0, high * largest / mean_size)


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return the factor of the standard error in an interval of a mean: Student's t (Biometrika 6, 1908)."""
    return float(stdtrit(degrees, (1 + confidence) / 2))


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

    Neighbouring tokens are not independent, so the interval is Student's t over the means of the groups (the text spots
    that the tokens are from). It is None with fewer than two groups.
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
    """Return half the width of Student's interval of a ratio of sums, which weights groups by their tokens."""
    sums: dict[int, float] = {}
    for loss, group in zip(losses, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + loss - mean
    if len(sums) < 2:
        return None
    spread = math.fsum(value**2 for value in sums.values()) * len(sums) / (len(sums) - 1)
    return student_quantile(len(sums) - 1) * math.sqrt(spread) / len(losses)
