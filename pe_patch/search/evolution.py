"""Generate the candidates of each generation from the scores of the previous ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import OptionError
from .space import TRIES, Candidate, Factors, Space


@dataclass(frozen=True)
class Schedule:
    """The numbers of candidates.

    Source: the defaults are LongRoPE's (Ding et al. 2024, arXiv 2402.13753, appendix A.1).
    """

    population: int = 64
    """Candidates in the first generation."""
    iterations: int = 40
    """Generations after the first."""
    mutations: int = 16
    """Mutated children per generation."""
    crossovers: int = 16
    """Children with two parents per generation."""
    parents: int = 32
    """The best candidates that go on to the next generation."""

    def check(self, starts: int) -> None:
        """Raise `OptionError` if the numbers contradict each other or the population cannot hold the starts."""
        minimums = {"population": starts, "iterations": 0, "mutations": 0, "crossovers": 0, "parents": 2}
        for name, minimum in minimums.items():
            if (value := getattr(self, name)) < minimum:
                reason = ", the number of starting candidates" if name == "population" else ""
                raise OptionError(f"{name}={value}; it must be at least {minimum}{reason}.")
        if self.population < self.parents:
            raise OptionError(
                f"population={self.population} is below parents={self.parents}; parents are the best of a population. "
                "Give a larger population or fewer parents."
            )
        if self.iterations and not self.mutations + self.crossovers:
            raise OptionError("mutations and crossovers are both 0, so no iteration tries anything new. Raise one.")

    @property
    def candidates(self) -> int:
        """The largest number of scored candidates: the first population and every child."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


@dataclass(frozen=True)
class Scored:
    """A candidate with its score."""

    candidate: Candidate
    score: float
    """Lower is better."""
    generation: int
    """The generation that first scored the candidate; 0 is the first."""

    @property
    def factors(self) -> Factors:
        """The rescale factors, one per rotated pair."""
        return self.candidate.factors


Score = Callable[[Candidate, int], float]
"""A function from a candidate and its generation to a score."""


def evolve(
    space: Space, starts: Sequence[Candidate], schedule: Schedule, seed: int, score: Score
) -> Iterator[list[Scored]]:
    """Yield the newly scored candidates of each generation, beginning with the first population.

    The best `parents` of a population form the next one together with their mutations and crossovers. The candidates of
    a generation depend only on the seed, its number and the earlier scores, so a search with stored scores repeats
    exactly. No candidate is scored twice. If the space has nothing new left, generations get smaller.
    """
    schedule.check(len(starts))
    seen: set[Factors] = set()
    first = [candidate for candidate in starts if _is_new(candidate, space, seen)]
    rng = np.random.default_rng([seed, 0])
    while len(first) < schedule.population and (mutation := _mutation(space, starts, rng, seen)) is not None:
        first.append(mutation)
    population = [Scored(candidate, score(candidate, 0), 0) for candidate in first]
    yield population
    for generation in range(1, schedule.iterations + 1):
        # sorted() is stable, so of equal scores the older candidate comes first.
        parents = sorted(population, key=lambda scored: scored.score)[: schedule.parents]
        children = _children(space, [scored.candidate for scored in parents], schedule, [seed, generation], seen)
        scored_children = [Scored(child, score(child, generation), generation) for child in children]
        population = [*parents, *scored_children]
        yield scored_children


def _children(
    space: Space, parents: Sequence[Candidate], schedule: Schedule, seed: list[int], seen: set[Factors]
) -> list[Candidate]:
    rng = np.random.default_rng(seed)
    """Return new mutations and crossovers of the parents; a mutation replaces a crossover that finds nothing new."""
    mutations = (_mutation(space, parents, rng, seen) for _ in range(schedule.mutations))
    children = [mutation for mutation in mutations if mutation is not None]
    for _ in range(schedule.crossovers if len(parents) > 1 else 0):
        first, second = (parents[i] for i in sorted(rng.choice(len(parents), 2, replace=False)))
        attempts = (space.crossed(first, second, rng) for _ in range(TRIES // 5))
        child = next((attempt for attempt in attempts if _is_new(attempt, space, seen)), None)
        child = child or _mutation(space, [first], rng, seen)
        if child is not None:
            children.append(child)
    return children


def _mutation(
    space: Space, parents: Sequence[Candidate], rng: np.random.Generator, seen: set[Factors]
) -> Candidate | None:
    """Return a new mutation of a random parent, or None if `TRIES` attempts give nothing new."""
    attempts = (space.mutated(parents[int(rng.integers(len(parents)))], rng) for _ in range(TRIES))
    return next((attempt for attempt in attempts if _is_new(attempt, space, seen)), None)


def _is_new(candidate: Candidate, space: Space, seen: set[Factors]) -> bool:
    """Return whether a candidate lies in the space and is not in `seen`, and add it there."""
    if space.fault(candidate) or candidate.factors in seen:
        return False
    seen.add(candidate.factors)
    return True
