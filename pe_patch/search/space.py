"""Define the space of rescale factors: bounds, critical dimensions, starting candidates and variations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..core.scheme import AttentionShape
from ..errors import OptionError, unknown
from ..schemes.registry import SCHEMES

STEP = 100
"""Grid steps between two whole numbers, so that factors vary by 0.01."""
CHANCE = 0.3
"""The probability that a factor changes in a mutation, or comes from the other parent in a crossover."""
TRIES = 100
"""Attempts to find a new candidate before giving up."""
PERIODS = 10
"""The turns that LongRoPE2's earliest critical dimension makes inside the trained window."""
KNOWN = {"PI": "linear", "NTK": "ntk", "YaRN": "yarn"}
"""The names in the papers and the schemes here."""

Factors = tuple[float, ...]


@dataclass(frozen=True)
class Candidate:
    """Rescale factors lambda, one per rotated pair: w'_k = w_k / lambda_k.

    The search varies `genes`, the factors from the pair `critical` on. The factors before it follow from the first
    gene: lambda_k = lambda_c^(k / c), NTK-aware scaling up to the pair c.

    Source: Shang et al. 2025, arXiv 2502.20082, section 3.2.
    """

    critical: int
    genes: Factors
    origin: str
    """The source of the candidate: PI, NTK, YaRN, given, mutation or crossover."""

    @property
    def factors(self) -> Factors:
        """All factors, one per rotated pair."""
        return (*(self.genes[0] ** (k / self.critical) for k in range(self.critical)), *self.genes)


@dataclass(frozen=True)
class Space:
    """All non-decreasing lists of factors whose searched part lies in [low, high]."""

    pairs: int
    """The number of rotated pairs."""
    low: float
    high: float
    criticals: tuple[int, ...] = (0,)
    """The pairs at which the searched part may begin; LongRoPE always begins at 0, the fastest pair."""

    def fault(self, candidate: Candidate) -> str:
        """Return the reason why a candidate lies outside the space, or an empty string."""
        genes = candidate.genes
        if candidate.critical not in self.criticals or len(genes) != self.pairs - candidate.critical:
            return f"{len(genes)} searched factors of {self.pairs}; the searched part begins at one of {self.criticals}"
        for k, (gene, following) in enumerate(pairwise(genes), candidate.critical):
            if not gene <= following:
                return f"factor {k} is {gene:g} and the next one {following:g}; factors must not decrease"
        if not self.low <= genes[0] <= genes[-1] <= self.high:
            return f"factors go from {genes[0]:g} to {genes[-1]:g}; allowed are {self.low:g} to {self.high:g}"
        return ""

    def mutated(self, parent: Candidate, rng: np.random.Generator) -> Candidate:
        """Return a mutation of a candidate.

        With probability `CHANCE`, each factor moves to a random grid point between its neighbours. If the space has
        several critical dimensions, the candidate gets a random one with the same probability.
        """
        critical, genes = parent.critical, list(parent.genes)
        if len(self.criticals) > 1 and rng.random() < CHANCE:
            critical = int(rng.choice(self.criticals))
            # The parent has no genes below its critical pair, so these start from the lower bound.
            genes = [self.low] * (parent.critical - critical) + genes[max(0, critical - parent.critical) :]
        for k in range(len(genes)):
            if rng.random() < CHANCE:
                below = genes[k - 1] if k else self.low
                above = genes[k + 1] if k + 1 < len(genes) else self.high
                genes[k] = _on_grid(below, above, rng, genes[k])
        return Candidate(critical, tuple(genes), "mutation")

    def crossed(self, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate:
        """Return a crossover of two candidates.

        Each factor comes from `second` with probability `CHANCE`, otherwise from `first`, or from the parent that has a
        gene there. The critical dimension comes from a random parent.
        """
        critical = int(rng.choice([first.critical, second.critical]))
        genes = []
        for k in range(critical, self.pairs):
            from_second = rng.random() < CHANCE
            order = (second, first) if from_second else (first, second)
            parent = next(candidate for candidate in order if k >= candidate.critical)
            genes.append(parent.genes[k - parent.critical])
        return Candidate(critical, tuple(genes), "crossover")

    def given(self, factors: Sequence[float]) -> Candidate:
        """Return a user's list of factors as a candidate.

        Raises:
            OptionError: if the list has another length or lies outside the space.
        """
        listed = tuple(float(factor) for factor in factors)
        if len(listed) != self.pairs:
            raise OptionError(
                f"start has {len(listed)} factors; this attention rotates {self.pairs} pairs. Give one factor per pair."
            )
        for critical in reversed(self.criticals):  # factors that follow NTK's curve up to a later pair need fewer genes
            candidate = Candidate(critical, listed[critical:], "given")
            if np.allclose(candidate.factors, listed, rtol=1e-5, atol=0) and not self.fault(candidate):
                return candidate
        fault = self.fault(Candidate(self.criticals[0], listed[self.criticals[0] :], "given"))
        reason = fault or "factors below the critical dimension are not lambda_c^(k / c)"
        raise OptionError(f"start is not in the searched space: {reason}.")


def _on_grid(below: float, above: float, rng: np.random.Generator, default: float) -> float:
    """Return a random multiple of 0.01 in [below, above], or `default` if there is none."""
    first, last = math.ceil(round(below * STEP, 6)), math.floor(round(above * STEP, 6))
    return min(max(int(rng.integers(first, last + 1)) / STEP, below), above) if first <= last else default


def known_factors(shape: AttentionShape, factor: float) -> dict[str, Factors]:
    """Return the rescale factors of PI, NTK-aware scaling and YaRN at s = `factor`.

    The factors are rounded to six decimals, because float32 frequencies do not determine more.
    """
    factors_of = {}
    for paper, name in KNOWN.items():
        cls: Any = SCHEMES[name]
        scheme = cls(shape, factor=factor)
        ratio = (scheme.plain_frequencies().double() / scheme.inv_freq.double()).tolist()
        factors_of[paper] = tuple(round(value, 6) for value in ratio)
    return factors_of


def pair_of(shape: AttentionShape, turns: float) -> int:
    """Return the first pair that makes fewer than n = `turns` turns in the trained window, at least pair 1.

    The pair is ceil(r / 2 log_theta(L / 2 pi n)); n = 1 gives the theoretical critical dimension.

    Source: Liu et al. 2023, arXiv 2310.05209, theorem 1.
    """
    pair = shape.rotary_dim / 2 * math.log(shape.trained_length / (2 * math.pi * turns), shape.rope_theta)
    return min(max(math.ceil(pair), 1), shape.rotary_dim // 2 - 1)


def longrope(shape: AttentionShape, factor: float) -> tuple[Space, list[Candidate]]:
    """Return the space of LongRoPE, every factor from 1 to 1.25 s, and its starts: PI, NTK and YaRN.

    Source: Ding et al. 2024, arXiv 2402.13753, table 4.
    """
    starts = [Candidate(0, factors, name) for name, factors in known_factors(shape, factor).items()]
    return Space(shape.rotary_dim // 2, 1.0, 1.25 * factor), starts


def longrope2(shape: AttentionShape, factor: float) -> tuple[Space, list[Candidate]]:
    """Return the space of LongRoPE2 and its starts.

    The searched factors lie between s and 2 s. The critical dimension at which they begin is searched too, between the
    pair that makes ten turns in the trained window and the pair that makes one. The starts are factor s from each
    critical dimension on, as in PI and YaRN, and NTK's factors from the theoretical one on, at most 2 s.

    Source: Shang et al. 2025, arXiv 2502.20082, section 3.2.
    """
    pairs, last = shape.rotary_dim // 2, pair_of(shape, 1)
    criticals = tuple(range(pair_of(shape, PERIODS), last + 1))
    starts = [Candidate(c, (factor,) * (pairs - c), "PI") for c in criticals]
    ntk = tuple(round(min(factor ** (k / last), 2 * factor), 6) for k in range(last, pairs))
    return Space(pairs, factor, 2 * factor, criticals), [*starts, Candidate(last, ntk, "NTK")]


METHODS = {"longrope": longrope, "longrope2": longrope2}


def make_space(method: str, shape: AttentionShape, factor: float) -> tuple[Space, list[Candidate]]:
    """Return the search space of a method and its starting candidates.

    Raises:
        UnknownNameError: if the method does not exist.
        OptionError: if the attention rotates fewer than two pairs.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if shape.rotary_dim < 4:
        raise OptionError(f"A search needs at least two rotated pairs; this attention rotates {shape.rotary_dim // 2}.")
    return METHODS[method](shape, factor)
