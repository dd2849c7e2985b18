"""Score candidates and baselines, each once."""

from __future__ import annotations

import time
from typing import Any

from ..evaluation.journal import Journal, key_of
from .objective import Objective
from .progress import Progress
from .space import Candidate
from .target import Target


class Scorer:
    """A callable that scores a candidate under `longrope`, or returns its score from the journal."""

    def __init__(self, objective: Objective, journal: Journal, target: Target, bar: Progress) -> None:
        self.objective, self.journal, self.target, self.bar = objective, journal, target, bar

    def __call__(self, candidate: Candidate, generation: int) -> float:
        factors = list(candidate.factors)
        description = {"factors": factors, "critical": candidate.critical, "origin": candidate.origin}
        # With expected_length the long factors apply at every length, so keys can be rotated before the scores.
        options = {**self.target.options(factors), "expected_length": self.target.length}
        return self._score(key_of(factors=factors), {**description, "generation": generation}, "longrope", options)

    def baseline(self, paper: str, scheme: str) -> float:
        """Return the score of an unsearched scheme with its own attention factor."""
        options = {"factor": self.target.factor, "original_max_position_embeddings": self.target.window}
        return self._score(paper, {"baseline": scheme}, scheme, options)

    def _score(self, key: str, description: dict[str, Any], scheme: str, options: dict[str, Any]) -> float:
        seconds = None
        if key not in self.journal:
            started = time.perf_counter()
            entry = {**description, "score": self.objective(scheme, **options)}
            seconds = time.perf_counter() - started
            self.journal.put(key, entry)
        score = self.journal.value(key, "score")
        self.bar.advance(score, description.get("generation"), seconds)
        return score
