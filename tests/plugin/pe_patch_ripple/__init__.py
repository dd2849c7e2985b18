"""A rotary scheme whose wavelengths shrink by one factor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pe_patch import Rotary, register_scheme


@register_scheme
@dataclass
class Ripple(Rotary):
    """Rotate every pair `speed` times as fast as RoPE."""

    name = "ripple"
    summary = "rotates every pair faster by one factor"
    paper = "an example"

    speed: float = 2.0
    """Factor on all frequencies."""

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        return self.speed * self.plain_frequencies(), 1.0
