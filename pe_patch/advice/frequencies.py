"""Find the rotating pairs of a head that reach angles unseen in training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..schemes.rotary import Rotary


@dataclass(frozen=True)
class Pair:
    """One rotating pair of dimensions."""

    index: int
    wavelength: float
    """Tokens per full turn; infinite for a pair that does not rotate."""
    turns_trained: float
    """Turns over the trained window."""
    turns_target: float
    """Turns over the target length."""

    @property
    def leaves(self) -> bool:
        """True if the pair reaches unseen angles: it made less than one turn in training and makes more now."""
        return self.turns_trained < 1 and self.turns_target > self.turns_trained

    @property
    def trained_degrees(self) -> float:
        """Degrees of the circle that training covered."""
        return 360 * min(1.0, self.turns_trained)

    @property
    def unseen_degrees(self) -> float:
        """Degrees of the circle that are reached for the first time."""
        return 360 * min(1.0, self.turns_target) - self.trained_degrees


def pairs(rotation: Rotary, window: int, target: int) -> tuple[Pair, ...]:
    """Return the pairs of a rotation in the order of its frequencies, the fastest first.

    Args:
        rotation: the rotation of the unpatched model.
        window: the trained window in tokens; training covers every distance within it.
        target: the target length in tokens.
    """
    rotating = []
    for index, frequency in enumerate(rotation.frequencies(window)[0].double().tolist()):
        wavelength = math.inf if frequency == 0 else 2 * math.pi / frequency
        rotating.append(Pair(index, wavelength, window / wavelength, target / wavelength))
    return tuple(rotating)
