"""How predictions become scores: `evaluate.Metric` classes that need no script from the hub."""

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
    """Clopper and Pearson's exact interval for a proportion (Biometrika 26, 1934).

    Its lower end is the p at which `successes` or more have probability (1 - confidence) / 2, its upper end the p at
    which `successes` or fewer have it.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"Need 0 <= successes <= trials and trials >= 1, got {successes} of {trials}.")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _root(lambda p: 1 - _at_most(successes - 1, trials, p) - tail)
    high = 1.0 if successes == trials else _root(lambda p: tail - _at_most(successes, trials, p))
    return low, high


def bootstrap_interval(
    scores: Sequence[float], sizes: Sequence[int] | None = None, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The percentile interval of a mean (Efron 1979), from `RESAMPLES` draws that are the same every time.

    With `sizes`, scores are sums over so many questions, drawn as a whole.
    """
    values = np.asarray(scores, dtype=np.float64)
    counts = np.ones(len(values)) if sizes is None else np.asarray(sizes, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values[picks].sum(axis=1) / counts[picks].sum(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def score_interval(scores: Sequence[float], groups: Sequence[Any] | None = None) -> tuple[float, float]:
    """The interval of a mean of scores from 0 to 1: exact where each is right or wrong, else by the bootstrap.

    Scores of one group (questions about one text) are not independent: the groups' means are drawn then, each weighing
    by its size. Where all scores are the same the interval is the exact one of as many questions as there are groups.
    """
    if groups is None or len(set(groups)) == len(scores):
        exact = all(score in (0, 1) for score in scores)
        return binomial_interval(int(sum(scores)), len(scores)) if exact else bootstrap_interval(scores)
    sums: dict[Any, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        sums.setdefault(group, []).append(score)
    if len(set(scores)) == 1 and scores[0] in (0, 1):
        return binomial_interval(int(scores[0]) * len(sums), len(sums))
    return bootstrap_interval([sum(each) for each in sums.values()], sizes=[len(each) for each in sums.values()])


def _at_most(successes: int, trials: int, p: float) -> float:
    """P(X <= successes) for X binomial with 0 < p < 1, each term in logarithms so that large counts do not overflow."""
    total = math.lgamma(trials + 1)
    return math.fsum(
        math.exp(
            total - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * math.log(p) + (trials - k) * math.log1p(-p)
        )
        for k in range(successes + 1)
    )


def _root(rising: Any) -> float:
    """Where a function that rises over (0, 1) crosses zero, by bisection to 2^-50."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


class RetrievalAccuracy(evaluate.Metric):
    """The share of answers that equal the reference, apart from surrounding white space, with its exact interval."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="predictions and references: the answers given and the right ones, as strings.",
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        matches = [given.strip() == right.strip() for given, right in zip(predictions, references, strict=True)]
        low, high = binomial_interval(sum(matches), len(matches))
        return {"accuracy": sum(matches) / len(matches), "low": low, "high": high, "samples": len(matches)}


class TokenLoss(evaluate.Metric):
    """The mean loss of all tokens, every token counting once, with its perplexity and bits per byte.

    The interval is the normal one over the means of the groups (the spots of text the tokens were taken from), since
    neighbouring tokens are not independent. With fewer than two groups it is None.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="losses: one per token, in nats. groups: the index of the spot each token is from.",
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
    """Half of the normal interval of a ratio of sums: groups of unequal size weigh by their tokens."""
    sums: dict[int, float] = {}
    for loss, group in zip(losses, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + loss - mean
    if len(sums) < 2:
        return None
    spread = math.fsum(value**2 for value in sums.values()) * len(sums) / (len(sums) - 1)
    return NORMAL_QUANTILE * math.sqrt(spread) / len(losses)
