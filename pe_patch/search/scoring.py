"""Scores, each of them measured once."""

from __future__ import annotations

import time
from typing import Any

from ..evaluation.journal import Journal, key_of
from .objective import Objective
from .progress import Progress
from .space import Candidate
from .target import Target


class Scorer:
    """The score of a candidate under `longrope`; one that the journal holds is not measured again."""

    def __init__(self, objective: Objective, journal: Journal, target: Target, bar: Progress) -> None:
        self.objective, self.journal, self.target, self.bar = objective, journal, target, bar

    def __call__(self, candidate: Candidate, generation: int) -> float:
        factors = list(candidate.factors)
        told = {"factors": factors, "critical": candidate.critical, "origin": candidate.origin}
        # with expected_length the long list is in force throughout, and keys can be rotated before the scores
        options = {**self.target.options(factors), "expected_length": self.target.length}
        return self._score(key_of(factors=factors), {**told, "generation": generation}, "longrope", options)

    def baseline(self, paper: str, scheme: str) -> float:
        """The score of a scheme as it is, with its own attention factor."""
        options = {"factor": self.target.factor, "original_max_position_embeddings": self.target.window}
        return self._score(paper, {"baseline": scheme}, scheme, options)

    def _score(self, key: str, told: dict[str, Any], scheme: str, options: dict[str, Any]) -> float:
        entry, seconds = self.journal.get(key), None
        if entry is None:
            started = time.perf_counter()
            entry = {**told, "score": self.objective(scheme, **options)}
            seconds = time.perf_counter() - started
            self.journal.put(key, entry)
        self.bar.advance(entry["score"], told.get("generation"), seconds)
        return entry["score"]
