"""Which pairs of a head meet angles at a target length that training never showed them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..schemes.rope import Rotary


@dataclass(frozen=True)
class Pair:
    """One rotating pair of dimensions."""

    index: int
    wavelength: float
    """Tokens for a whole turn; infinite for a pair that stands still."""
    turns_trained: float
    """Turns between the ends of the trained window."""
    turns_target: float
    """Turns between two tokens that lie as far apart as they can at the target."""

    @property
    def leaves(self) -> bool:
        """Whether it meets angles that it was never trained on: it made less than a turn, and now goes further."""
        return self.turns_trained < 1 and self.turns_target > self.turns_trained

    @property
    def trained_degrees(self) -> float:
        return 360 * min(1.0, self.turns_trained)

    @property
    def unseen_degrees(self) -> float:
        """How much of the circle it meets for the first time."""
        return 360 * min(1.0, self.turns_target) - self.trained_degrees


def pairs(rotation: Rotary, window: int, farthest: int) -> tuple[Pair, ...]:
    """The pairs of a rotation, the fastest first.

    Args:
        window: the trained window in tokens, all of whose distances were seen.
        farthest: the greatest distance at the target, in tokens.
    """
    found = []
    for index, frequency in enumerate(rotation.frequencies(window)[0].double().tolist()):
        wavelength = math.inf if frequency == 0 else 2 * math.pi / frequency
        found.append(Pair(index, wavelength, window / wavelength, farthest / wavelength))
    return tuple(found)
