"""Which rescale factors may be tried: their bounds, the critical dimension, where a search starts, how they vary."""

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
"""Steps of the grid between two whole numbers: factors vary by 0.01."""
CHANCE = 0.3
"""How likely each factor is to change in a mutation, or to come from the other parent."""
TRIES = 100
"""Attempts at a candidate that is new, before the search does without."""
PERIODS = 10
"""LongRoPE2's earliest critical dimension makes so many turns inside the trained window."""
KNOWN = {"PI": "linear", "NTK": "ntk", "YaRN": "yarn"}
"""What papers call them, and their schemes here."""

Factors = tuple[float, ...]


@dataclass(frozen=True)
class Candidate:
    """Rescale factors lambda, one for each rotated pair: w'_k = w_k / lambda_k.

    `genes` are those from the pair `critical` on, which are searched. Those before it follow from the first gene:
    lambda_k = lambda_c^(k / c), NTK-aware scaling up to the pair c (Shang et al. 2025, arXiv 2502.20082, section 3.2).
    """

    critical: int
    genes: Factors
    origin: str
    """Where it comes from: PI, NTK, YaRN, given, mutation or crossover."""

    @property
    def factors(self) -> Factors:
        return (*(self.genes[0] ** (k / self.critical) for k in range(self.critical)), *self.genes)


@dataclass(frozen=True)
class Space:
    """All non-decreasing lists of factors whose searched part lies in [low, high].

    `criticals` are the pairs from which on factors may be searched; of LongRoPE it is 0, the fastest pair, alone.
    """

    pairs: int
    low: float
    high: float
    criticals: tuple[int, ...] = (0,)

    def fault(self, candidate: Candidate) -> str:
        """What is wrong with a candidate, or an empty string."""
        genes = candidate.genes
        if candidate.critical not in self.criticals or len(genes) != self.pairs - candidate.critical:
            return f"{len(genes)} searched factors of {self.pairs}; the searched part begins at one of {self.criticals}"
        for k, (one, other) in enumerate(pairwise(genes), candidate.critical):
            if not one <= other:
                return f"factor {k} is {one:g} and the next one {other:g}; factors must not decrease"
        if not self.low <= genes[0] <= genes[-1] <= self.high:
            return f"factors go from {genes[0]:g} to {genes[-1]:g}; allowed are {self.low:g} to {self.high:g}"
        return ""

    def mutated(self, parent: Candidate, rng: np.random.Generator) -> Candidate:
        """Each factor with a chance of 0.3 anywhere on the grid between its neighbours, and as often another d_rcd."""
        critical, genes = parent.critical, list(parent.genes)
        if len(self.criticals) > 1 and rng.random() < CHANCE:
            critical = int(rng.choice(self.criticals))
            # below the old critical pair nothing was searched yet: start from the lower bound
            genes = [self.low] * (parent.critical - critical) + genes[max(0, critical - parent.critical) :]
        for k in range(len(genes)):
            if rng.random() < CHANCE:
                below = genes[k - 1] if k else self.low
                above = genes[k + 1] if k + 1 < len(genes) else self.high
                genes[k] = _on_grid(below, above, rng, genes[k])
        return Candidate(critical, tuple(genes), "mutation")

    def crossed(self, one: Candidate, other: Candidate, rng: np.random.Generator) -> Candidate:
        """The first parent with each factor replaced, by a chance of 0.3, by the other's; either's critical pair."""
        critical = int(rng.choice([one.critical, other.critical]))
        genes = []
        for k in range(critical, self.pairs):
            takes = rng.random() < CHANCE
            parent = next(p for p in ((other, one) if takes else (one, other)) if k >= p.critical)
            genes.append(parent.genes[k - parent.critical])
        return Candidate(critical, tuple(genes), "crossover")

    def given(self, factors: Sequence[float]) -> Candidate:
        """A list of factors as a candidate; an `OptionError` where it lies outside the space."""
        listed = tuple(float(factor) for factor in factors)
        if len(listed) != self.pairs:
            raise OptionError(
                f"start has {len(listed)} factors; this attention rotates {self.pairs} pairs: give one each."
            )
        for critical in reversed(self.criticals):  # NTK's curve up to a later pair holds for those before
            candidate = Candidate(critical, listed[critical:], "given")
            if np.allclose(candidate.factors, listed, rtol=1e-5, atol=0) and not self.fault(candidate):
                return candidate
        fault = self.fault(Candidate(self.criticals[0], listed[self.criticals[0] :], "given"))
        reason = fault or "factors below the critical dimension are not lambda_c^(k / c)"
        raise OptionError(f"start cannot be searched from: {reason}.")


def _on_grid(below: float, above: float, rng: np.random.Generator, kept: float) -> float:
    """A multiple of 0.01 in [below, above], each equally likely; `kept` where there is none."""
    first, last = math.ceil(round(below * STEP, 6)), math.floor(round(above * STEP, 6))
    return min(max(int(rng.integers(first, last + 1)) / STEP, below), above) if first <= last else kept


def known_factors(shape: AttentionShape, factor: float) -> dict[str, Factors]:
    """The rescale factors of PI, NTK-aware scaling and YaRN at s = `factor`; to six decimals, for float32's sake."""
    found = {}
    for paper, name in KNOWN.items():
        cls: Any = SCHEMES[name]
        scheme = cls(shape, factor=factor)
        ratio = (scheme.plain_frequencies().double() / scheme.inv_freq.double()).tolist()
        found[paper] = tuple(round(value, 6) for value in ratio)
    return found


def pair_of(shape: AttentionShape, turns: float) -> int:
    """The first pair that makes fewer than so many turns inside the trained window, ceil(r / 2 log_theta(L / 2 pi n));
    n = 1 is the theoretical critical dimension (Liu et al. 2023, arXiv 2310.05209, theorem 1)."""
    place = shape.rotary_dim / 2 * math.log(shape.trained_length / (2 * math.pi * turns), shape.rope_theta)
    return min(max(math.ceil(place), 1), shape.rotary_dim // 2 - 1)


def longrope(shape: AttentionShape, factor: float) -> tuple[Space, list[Candidate]]:
    """Every factor from 1 to 1.25 s (Ding et al. 2024, arXiv 2402.13753, table 4); starts are PI, NTK and YaRN."""
    starts = [Candidate(0, factors, name) for name, factors in known_factors(shape, factor).items()]
    return Space(shape.rotary_dim // 2, 1.0, 1.25 * factor), starts


def longrope2(shape: AttentionShape, factor: float) -> tuple[Space, list[Candidate]]:
    """Factors from s to 2 s, from a critical dimension on that is searched too: between the pair that makes ten turns
    inside the trained window and the one that makes a single one (arXiv 2502.20082, section 3.2).

    Starts are PI's and YaRN's factor s from each critical dimension on, and NTK's by the theoretical one, at most 2 s.
    """
    pairs, last = shape.rotary_dim // 2, pair_of(shape, 1)
    criticals = tuple(range(pair_of(shape, PERIODS), last + 1))
    starts = [Candidate(c, (factor,) * (pairs - c), "PI") for c in criticals]
    ntk = tuple(round(min(factor ** (k / last), 2 * factor), 6) for k in range(last, pairs))
    return Space(pairs, factor, 2 * factor, criticals), [*starts, Candidate(last, ntk, "NTK")]


METHODS = {"longrope": longrope, "longrope2": longrope2}


def make_space(method: str, shape: AttentionShape, factor: float) -> tuple[Space, list[Candidate]]:
    """The space of a method, and the candidates that its search starts from."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if shape.rotary_dim < 4:
        raise OptionError(f"A search needs at least two rotated pairs; this attention rotates {shape.rotary_dim // 2}.")
    return METHODS[method](shape, factor)
