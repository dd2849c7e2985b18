"""A model and a target length, and the ratio between its window and that target."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .model_facts import ModelFacts

FARTHEST_UNTRAINED, FARTHEST_TRAINED = 20, 512
"""Multiples of the trained window: DCA's 160k of 8k (arXiv 2402.17463), LongRoPE's 2048k of 4k (arXiv 2402.13753)."""


@dataclass(frozen=True)
class Case:
    """A model, the length that it must reach, the training budget, and what must load the result."""

    facts: ModelFacts
    target: int
    """The target length in tokens."""
    train_tokens: int | None = None
    """The training budget in tokens; None if unknown."""
    served_by: tuple[str, ...] = ()
    """Export targets that must be able to express the scheme."""

    @property
    def ratio(self) -> float:
        """The target over the model's current window."""
        return self.target / self.facts.window

    @property
    def needed(self) -> bool:
        """True if the target has positions that the model was not trained for."""
        return self.target > self.facts.window and not self.only_near_layers_rotate

    @property
    def only_near_layers_rotate(self) -> bool:
        """True if layers with full attention have no positions, and the others slide within the trained window."""
        facts = self.facts
        return not facts.all_slide and 0 < facts.rotation_slides <= facts.window

    @property
    def too_far(self) -> bool:
        """True if no paper extends a rotary or learned window by this ratio."""
        return self.facts.positions != "alibi" and self.ratio > FARTHEST_TRAINED

    @property
    def factor(self) -> float:
        """The target over the window before any scaling, rounded up by `round_factor`."""
        return round_factor(self.target / self.facts.original)

    @property
    def composed_factor(self) -> float:
        """The target over the current window, rounded up: the factor of a scheme on top of the model's scaling."""
        return round_factor(self.ratio)


def round_factor(ratio: float) -> float:
    """Round a ratio up to a multiple of 0.25 and to at least 1, so that the target is reached."""
    quarters = math.ceil(max(1.0, ratio) * 4)
    return quarters // 4 if quarters % 4 == 0 else quarters / 4
