"""Run the evolution on scores with a known optimum."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from pe_patch.errors import OptionError
from pe_patch.search.evolution import Schedule, evolve
from pe_patch.search.space import make_space

from .cases import shape

ATTENTION = shape(32, 10000.0, 256)
FACTOR = 8.0
BOUNDS = {"longrope": (1.0, 10.0), "longrope2": (8.0, 16.0)}
CRITICAL = 5


def optimum(method):
    """Return factors inside the space that differ from all starts."""
    if method == "longrope":
        return np.array([1, 1, 1.2, 1.6, 2, 2, 3.1, 4, 4.5, 5, 6.3, 7, 7, 8.8, 9, 9.7])
    tail = np.array([8.5, 8.5, 9, 9.2, 9.2, 10, 11, 11, 12.4, 13, 15])
    return np.concatenate([tail[0] ** (np.arange(CRITICAL) / CRITICAL), tail])


def distance(factors, best):
    return float(np.sum(np.log(np.asarray(factors) / best) ** 2))


def evolved(method, schedule, seed, score):
    space, starts = make_space(method, ATTENTION, FACTOR)
    return list(evolve(space, starts, schedule, seed, score)), starts


@pytest.mark.parametrize("method", BOUNDS)
def test_it_finds_an_optimum_that_random_candidates_miss(method):
    best, rng = optimum(method), np.random.default_rng(0)
    generations, starts = evolved(method, Schedule(), 0, lambda candidate, _: distance(candidate.factors, best))
    found = min(chain.from_iterable(generations), key=lambda scored: scored.score)
    assert found.score == distance(found.factors, best)

    low, high = BOUNDS[method]
    cuts = [0] if method == "longrope" else [3, 4, 5, 6, 7]
    scores = []
    for _ in range(Schedule().candidates):
        cut = int(rng.choice(cuts))
        genes = np.sort(rng.uniform(low, high, 16 - cut))
        scores.append(distance([*genes[0] ** (np.arange(cut) / max(1, cut)), *genes], best))
    assert found.score < 0.5 * min(min(scores), *(distance(entry.factors, best) for entry in starts))
    assert np.max(np.abs(np.array(found.factors) / best - 1)) < 0.12
    if method == "longrope2":
        assert found.candidate.critical == CRITICAL


def test_it_follows_the_schedule_and_scores_nothing_twice():
    schedule = Schedule(population=12, iterations=5, mutations=3, crossovers=4, parents=6)
    scored = []

    def score(candidate, generation):
        scored.append((candidate.factors, generation))
        return distance(candidate.factors, optimum("longrope"))

    generations, _ = evolved("longrope", schedule, 3, score)
    assert [len(born) for born in generations] == [12, 7, 7, 7, 7, 7] and len(scored) == schedule.candidates == 47
    assert len({factors for factors, _ in scored}) == len(scored)
    assert [entry.candidate.origin for entry in generations[0]] == ["PI", "NTK", "YaRN"] + ["mutation"] * 9
    assert {entry.candidate.origin for born in generations[1:] for entry in born} == {"mutation", "crossover"}
    assert [entry.generation for born in generations for entry in born] == [generation for _, generation in scored]


def test_children_are_bred_from_the_best():
    """Check that a crossover has only factors of the best `parents` so far, with factors marked by their scores."""
    schedule = Schedule(population=20, iterations=1, mutations=0, crossovers=15, parents=3)
    generations, _ = evolved(
        "longrope", schedule, 1, lambda candidate, _: distance(candidate.factors, optimum("longrope"))
    )
    best = sorted(generations[0], key=lambda entry: entry.score)[:3]
    for child in generations[1]:
        if child.candidate.origin == "crossover":
            genes = zip(child.factors, *(parent.factors for parent in best), strict=True)
            assert all(gene in parents for gene, *parents in genes)
    assert any(child.candidate.origin == "crossover" for child in generations[1])


def test_seeds_differ_and_repeat():
    schedule = Schedule(population=12, iterations=3, mutations=3, crossovers=3, parents=6)
    runs = [
        [
            entry.factors
            for born in evolved("longrope2", schedule, seed, lambda candidate, _: candidate.factors[-1])[0]
            for entry in born
        ]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"population": 8, "parents": 9}, "population=8 is below parents=9"),
        ({"population": 2, "parents": 2}, "population=2; it must be at least 3"),
        ({"parents": 1}, "parents=1; it must be at least 2"),
        ({"iterations": -1}, "iterations=-1"),
        ({"mutations": 0, "crossovers": 0}, "both 0"),
    ],
)
def test_contradictory_schedules_are_refused(numbers, message):
    with pytest.raises(OptionError, match=message):
        evolved("longrope", Schedule(**numbers), 0, lambda *_: 0.0)
