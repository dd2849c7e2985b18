"""Scalings of the frequencies by one factor."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.checks import check_number, check_order, check_width
from .registry import register_scheme
from .rope import GROWTH, Rotary

Factor = float | Literal["auto"]


def native_parameters(scheme: Rotary, rope_type: str, **values: Any) -> dict[str, Any]:
    """Return Transformers' `rope_parameters` with the base and, if only a part of each head rotates, its share."""
    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": scheme.base, **values}
    width, head = scheme.shape.rotary_dim, scheme.shape.head_dim
    if width < head and scheme.shape.rotary_start == 0:  # DeepSeek's config counts its trailing slice as a whole head
        part = width / head
        # Transformers truncates head x part, which may fall just short of a whole number
        parameters["partial_rotary_factor"] = part if int(head * part) == width else math.nextafter(part, 1.0)
    return parameters


class Scaled(Rotary):
    """A scaling by one factor s, the target window over the trained one.

    A subclass overrides `scaled(factor)` for s > 1. At s = 1 the frequencies are the plain ones, bit for bit. With
    `factor="auto"` s follows the length of the sequence in powers of two of the trained window, so decoding rarely
    changes the regime.

    """

    auto_allowed: ClassVar[bool] = True

    factor: Factor
    """s >= 1, the target window over the trained one; or "auto"."""

    def setup(self) -> None:
        super().setup()
        self.fixed_factor = self.read_factor()
        self.auto = self.fixed_factor is None

    def read_factor(self) -> float | None:
        """Check the option `factor` and return it, or None if s follows the length of the sequence."""
        if self.auto_allowed and isinstance(self.factor, str) and self.factor == "auto":
            return None
        remedy = "Give the target window over the trained one" + (', or "auto".' if self.auto_allowed else ".")
        return check_number(self.name, "factor", self.factor, 1.0, do=remedy)

    def scaled(self, factor: float) -> tuple[Tensor, float]:
        """Return inverse frequencies and attention factor for s = `factor` > 1."""
        raise NotImplementedError

    def unscaled(self) -> tuple[Tensor, float]:
        """Return inverse frequencies and attention factor for s = 1."""
        return self.plain_frequencies(), 1.0

    def factor_at(self, length: int | None) -> float:
        """Return s for a sequence of `length` tokens."""
        return (
            self.regime(length or self.trained_window) / self.trained_window
            if self.fixed_factor is None
            else self.fixed_factor
        )

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        factor = self.factor_at(length)
        return self.scaled(factor) if factor > 1 else self.unscaled()

    def regime(self, length: int) -> int:
        if not self.auto:
            return super().regime(length)
        reached = self.regime_start
        while reached < length:
            reached = int(reached * GROWTH)
        return reached

    @property
    def length_dependent(self) -> bool:
        return self.auto

    @property
    def effective_window(self) -> int | None:
        return None if self.fixed_factor is None else int(self.fixed_factor * self.trained_window)

    def native(self) -> dict[str, object] | None:
        if self.fixed_factor is None:
            return None
        if self.fixed_factor == 1 and self.unscaled()[1] == 1:
            return native_parameters(self, "default")
        return self.native_scaled(self.fixed_factor)

    def native_scaled(self, factor: float) -> dict[str, object] | None:
        """Return Transformers' `rope_parameters` for a fixed s > 1, or None if it has no such type."""
        return None


@register_scheme
class Linear(Scaled):
    """Position Interpolation: every frequency over s, w' = w / s (Chen et al. 2023, arXiv 2306.15595, equation 4)."""

    name = "linear"
    summary = "divides every frequency by the factor; wants a short fine-tune"
    paper = "Chen et al. 2023, arXiv 2306.15595"

    def scaled(self, factor: float) -> tuple[Tensor, float]:
        return self.plain_frequencies() / factor, 1.0

    def native_scaled(self, factor: float) -> dict[str, object] | None:
        return native_parameters(self, "linear", factor=factor)


@register_scheme
class NTK(Scaled):
    """NTK-aware scaling: theta' = theta s^(r / (r - 2)); the slowest frequency is divided by s, the fastest kept
    (bloc97 2023; in Peng et al. 2023, arXiv 2309.00071, definition 1)."""

    name = "ntk"
    summary = "raises the base so that the slowest frequency shrinks by the factor and the fastest stays"
    paper = "bloc97 2023, in Peng et al. 2023, arXiv 2309.00071"
    training_free = True

    def setup(self) -> None:
        super().setup()
        check_width(self.name, self.dim)

    def scaled_theta(self, factor: float) -> float:
        return self.base * factor ** (self.dim / (self.dim - 2))

    def scaled(self, factor: float) -> tuple[Tensor, float]:
        return self.plain_frequencies(self.scaled_theta(factor)), 1.0

    def native_scaled(self, factor: float) -> dict[str, object] | None:
        return {**native_parameters(self, "default"), "rope_theta": self.scaled_theta(factor)}


def scale_by_rotations(scheme: Rotary, factor: float, low: float, high: float) -> Tensor:
    """Divide frequencies with fewer than `low` turns inside the window by `factor`, and keep those above `high`.

    Between, rho = L w / 2 pi turns give t = (rho - low) / (high - low) and w' = (1 - t) w / s + t w. With low == high
    it is a step. The order of operations is Transformers' for `llama3`.
    """
    inv_freq, window = scheme.plain_frequencies(), scheme.trained_window
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > window / low, inv_freq / factor, inv_freq)
    if low == high:
        return scaled
    kept = (window / wavelength - low) / (high - low)
    blended = (1 - kept) * scaled / factor + kept * scaled
    between = ~(wavelength < window / high) * ~(wavelength > window / low)
    return torch.where(between, blended, scaled)


@register_scheme
class NTKByParts(Scaled):
    """NTK-by-parts: slow frequencies are interpolated, fast ones kept, with a ramp linear in the number of turns inside
    the window; no temperature (Peng et al. 2023, arXiv 2309.00071, definition 2).
    """

    name = "ntk_by_parts"
    summary = "interpolates slow frequencies and keeps fast ones, by their turns inside the window"
    paper = "Peng et al. 2023, arXiv 2309.00071"
    training_free = True

    alpha: float = 1
    """Turns inside the window below which a frequency is divided by s."""
    beta: float = 32
    """Turns inside the window above which a frequency is kept."""

    def setup(self) -> None:
        super().setup()
        self.alpha = check_number(self.name, "alpha", self.alpha, 0.0, exclusive=True)
        self.beta = check_number(self.name, "beta", self.beta, 0.0, exclusive=True)
        check_order(self.name, ("alpha", self.alpha), ("beta", self.beta))

    def scaled(self, factor: float) -> tuple[Tensor, float]:
        return scale_by_rotations(self, factor, self.alpha, self.beta), 1.0


@register_scheme
class Llama3(Scaled):
    """Llama 3.1's scaling: the ramp of NTK-by-parts between `low_freq_factor` and `high_freq_factor` turns
    (Grattafiori et al. 2024, arXiv 2407.21783; the rule is in Meta's reference code).
    """

    name = "llama3"
    summary = "interpolates slow frequencies and keeps fast ones, as Llama 3.1 does; meant for training"
    paper = "Grattafiori et al. 2024, arXiv 2407.21783"

    low_freq_factor: float = 1
    """Turns inside the window below which a frequency is divided by s."""
    high_freq_factor: float = 4
    """Turns inside the window above which a frequency is kept. Equal to `low_freq_factor` (Llama 4 Scout), it makes a
    step."""

    def setup(self) -> None:
        super().setup()
        self.low = check_number(self.name, "low_freq_factor", self.low_freq_factor, 0.0, exclusive=True)
        self.high = check_number(self.name, "high_freq_factor", self.high_freq_factor, 0.0, exclusive=True)
        check_order(self.name, ("low_freq_factor", self.low), ("high_freq_factor", self.high))

    def scaled(self, factor: float) -> tuple[Tensor, float]:
        return scale_by_rotations(self, factor, self.low, self.high), 1.0

    def native_scaled(self, factor: float) -> dict[str, object] | None:
        return native_parameters(
            self,
            "llama3",
            factor=factor,
            low_freq_factor=self.low,
            high_freq_factor=self.high,
            original_max_position_embeddings=self.trained_window,
        )
