"""A model and a target: by how much the window is to grow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .model_facts import ModelFacts

FARTHEST_UNTRAINED, FARTHEST_TRAINED = 20, 512
"""Times the trained window: DCA's 160k of 8k (arXiv 2402.17463), LongRoPE's 2048k of 4k (arXiv 2402.13753)."""


@dataclass(frozen=True)
class Case:
    """What advice is asked for."""

    facts: ModelFacts
    target: int
    """Tokens."""
    train_tokens: int | None = None
    """What may be trained on; None where nothing is said."""

    @property
    def ratio(self) -> float:
        """The target over the window that the model has now."""
        return self.target / self.facts.window

    @property
    def needed(self) -> bool:
        """Whether positions at the target are none that the model was trained for."""
        return self.target > self.facts.window and not self.rests

    @property
    def rests(self) -> bool:
        """Whether layers look far that have no positions, and those that rotate slide within the trained window."""
        facts = self.facts
        return not facts.all_slide and 0 < facts.rotation_slides <= facts.window

    @property
    def too_far(self) -> bool:
        """Whether no paper has come so far with a model whose positions have a window."""
        return self.facts.positions != "alibi" and self.ratio > FARTHEST_TRAINED

    @property
    def factor(self) -> float:
        """The target over the window before any scaling, as an option is given: see `round_factor`."""
        return round_factor(self.target / self.facts.original)

    @property
    def composed_factor(self) -> float:
        """The target over the window that a scheme over the model's own scaling extends from."""
        return round_factor(self.ratio)


def round_factor(ratio: float) -> float:
    """At least 1; a whole number as it is, else the next quarter above, so that the target is reached for certain."""
    quarters = math.ceil(max(1.0, ratio) * 4)
    return quarters // 4 if quarters % 4 == 0 else quarters / 4
