"""The evolution itself: which candidates come next, given the scores of those before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import OptionError
from .space import TRIES, Candidate, Factors, Space


@dataclass(frozen=True)
class Schedule:
    """How many candidates; the defaults are LongRoPE's (Ding et al. 2024, arXiv 2402.13753, appendix A.1)."""

    population: int = 64
    iterations: int = 40
    mutations: int = 16
    crossovers: int = 16
    parents: int = 32

    def check(self, starts: int) -> None:
        """Raise `OptionError` where the numbers contradict each other or leave no room for the starts."""
        least = {"population": starts, "iterations": 0, "mutations": 0, "crossovers": 0, "parents": 2}
        for name, bound in least.items():
            if (value := getattr(self, name)) < bound:
                reason = ", the number of candidates that this search starts from" if name == "population" else ""
                raise OptionError(f"{name}={value}; it must be at least {bound}{reason}.")
        if self.population < self.parents:
            raise OptionError(
                f"population={self.population} is below parents={self.parents}; parents are the best of a population, "
                "so give a greater population or fewer parents."
            )
        if self.iterations and not self.mutations + self.crossovers:
            raise OptionError("mutations and crossovers are both 0, so no iteration would try anything new.")

    @property
    def candidates(self) -> int:
        """How many are scored at most: the first population and every child."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


@dataclass(frozen=True)
class Scored:
    """A candidate with its score, the less the better, and the generation that it was born in (0: the first)."""

    candidate: Candidate
    score: float
    generation: int

    @property
    def factors(self) -> Factors:
        return self.candidate.factors


Score = Callable[[Candidate, int], float]
"""The score of a candidate of a generation."""


def evolve(
    space: Space, starts: Sequence[Candidate], schedule: Schedule, seed: int, score: Score
) -> Iterator[list[Scored]]:
    """Each generation's newly scored candidates, the first population at first.

    The best `parents` of a population go on to the next one with `mutations` and `crossovers` of them. What a
    generation tries is a function of the seed, its number and the scores before it, so that a search whose scores are
    remembered can be repeated exactly. No candidate is scored twice. A space that has nothing new left yields
    smaller generations.
    """
    schedule.check(len(starts))
    seen: set[Factors] = set()
    first = [one for one in starts if _is_new(one, space, seen)]
    rng = np.random.default_rng([seed, 0])
    while len(first) < schedule.population and (one := _mutation(space, starts, rng, seen)) is not None:
        first.append(one)
    population = [Scored(one, score(one, 0), 0) for one in first]
    yield population
    for generation in range(1, schedule.iterations + 1):
        # sorted() is stable: of equal scores the older candidate goes first
        parents = sorted(population, key=lambda scored: scored.score)[: schedule.parents]
        children = _children(space, [scored.candidate for scored in parents], schedule, [seed, generation], seen)
        born = [Scored(one, score(one, generation), generation) for one in children]
        population = [*parents, *born]
        yield born


def _children(
    space: Space, parents: Sequence[Candidate], schedule: Schedule, seed: list[int], seen: set[Factors]
) -> list[Candidate]:
    rng = np.random.default_rng(seed)
    mutations = (_mutation(space, parents, rng, seen) for _ in range(schedule.mutations))
    found = [one for one in mutations if one is not None]
    for _ in range(schedule.crossovers if len(parents) > 1 else 0):
        first, second = (parents[i] for i in sorted(rng.choice(len(parents), 2, replace=False)))
        tried = (space.crossed(first, second, rng) for _ in range(TRIES // 5))
        child = next((one for one in tried if _is_new(one, space, seen)), None)
        child = child or _mutation(space, [first], rng, seen)
        if child is not None:
            found.append(child)
    return found


def _mutation(
    space: Space, parents: Sequence[Candidate], rng: np.random.Generator, seen: set[Factors]
) -> Candidate | None:
    """A new mutation of one of the parents; None where so many attempts gave nothing new."""
    tried = (space.mutated(parents[int(rng.integers(len(parents)))], rng) for _ in range(TRIES))
    return next((one for one in tried if _is_new(one, space, seen)), None)


def _is_new(candidate: Candidate, space: Space, seen: set[Factors]) -> bool:
    if space.fault(candidate) or candidate.factors in seen:
        return False
    seen.add(candidate.factors)
    return True
