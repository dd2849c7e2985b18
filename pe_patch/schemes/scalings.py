"""RoPE and its scalings, other than YaRN's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.checks import LARGEST_FACTOR, check_length, check_list, check_number, check_order, check_width
from ..errors import OptionValueError
from .registry import register_scheme
from .rotary import Rotary, Scaled, to_rope_parameters


@register_scheme
class RoPE(Rotary):
    """Rotary position embedding: pair k rotates by p theta^(-2k / r) (Su et al. 2021, arXiv 2104.09864, eq. 15)."""

    name = "rope"
    summary = "rotates queries and keys by position times frequency, unscaled"
    paper = "Su et al. 2021, arXiv 2104.09864"
    training_free = True

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        return self.plain_frequencies(), 1.0

    def native(self) -> dict[str, object] | None:
        return to_rope_parameters(self, "default")


@register_scheme
class Linear(Scaled):
    """Position Interpolation: every frequency over s, w' = w / s (Chen et al. 2023, arXiv 2306.15595, equation 4)."""

    name = "linear"
    summary = "divides every frequency by the factor; wants a short fine-tune"
    paper = "Chen et al. 2023, arXiv 2306.15595"

    def scaled(self, factor: float) -> tuple[Tensor, float]:
        return self.plain_frequencies() / factor, 1.0

    def native_scaled(self, factor: float) -> dict[str, object] | None:
        return to_rope_parameters(self, "linear", factor=factor)


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
        return {**to_rope_parameters(self, "default"), "rope_theta": self.scaled_theta(factor)}


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
        return to_rope_parameters(
            self,
            "llama3",
            factor=factor,
            low_freq_factor=self.low,
            high_freq_factor=self.high,
            original_max_position_embeddings=self.trained_window,
        )


@register_scheme
class Proportional(Scaled):
    """p-RoPE: the int(p r / 2) fastest frequencies rotate, the others do not, w' = 0 (Barbero et al. 2024, arXiv
    2410.06205, section 6). Pairs are those of the whole width, unlike a rotation of a part of the head.
    """

    name = "proportional"
    summary = "turns the fastest frequencies only and leaves the slow dimensions without position"
    paper = "Barbero et al. 2024, arXiv 2410.06205"
    examples = MappingProxyType({"partial_rotary_factor": "partial_rotary_factor=0.5"})
    auto_allowed: ClassVar[bool] = False

    partial_rotary_factor: float
    """p in (0, 1]."""
    factor: float = 1
    """s >= 1, the divisor of the frequencies that rotate."""

    def setup(self) -> None:
        super().setup()
        self.proportion = check_number(
            self.name, "partial_rotary_factor", self.partial_rotary_factor, 0.0, 1.0, exclusive=True
        )
        self.turning = int(self.proportion * self.dim // 2)
        if self.turning == 0:
            raise OptionValueError(
                f"{self.name!r} got partial_rotary_factor={self.proportion:g}, by which none of {self.dim // 2} pairs "
                f"would turn; give at least {2 / self.dim:g}, or use 'nope'."
            )

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        turning = self.plain_frequencies(pairs=self.turning) / self.factor_at(length)
        return nn.functional.pad(turning, (0, self.dim // 2 - self.turning)), 1.0

    def native(self) -> dict[str, object] | None:
        if self.dim != self.shape.head_dim or self.fixed_factor is None:
            return None  # Transformers counts the proportion of the whole head
        return to_rope_parameters(self, "proportional", partial_rotary_factor=self.proportion, factor=self.fixed_factor)


@register_scheme
class DynamicNTK(Rotary):
    """Dynamic NTK: beyond the window, theta' = theta (f N / L - (f - 1))^(r / (r - 2)) at N tokens
    (emozilla 2023; in Peng et al. 2023, arXiv 2309.00071, section 3.3).
    """

    name = "dynamic_ntk"
    summary = "raises the base with the length of the sequence, and not at all within the window"
    paper = "emozilla 2023, in Peng et al. 2023, arXiv 2309.00071"
    training_free = True

    factor: float = 1
    """f >= 1; 1 is the plain form."""
    expected_length: int | None = None
    """Length N in tokens by which shorter sequences are encoded too."""

    def setup(self) -> None:
        super().setup()
        self.factor = self.extension = check_number(
            self.name, "factor", self.factor, 1.0, remedy="1 is the plain form."
        )
        self.longest_expected = check_length(self.name, "expected_length", self.expected_length)
        check_width(self.name, self.dim)

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        if length is None or length <= self.trained_window:
            return self.plain_frequencies(), 1.0
        growth = (self.factor * length / self.trained_window) - (self.factor - 1)
        return self.plain_frequencies(self.base * growth ** (self.dim / (self.dim - 2))), 1.0

    @property
    def length_dependent(self) -> bool:
        return True

    @property
    def effective_window(self) -> int | None:
        if self.factor == 1 and self.expected_length is None:
            return None  # unbounded: the base grows with the length beyond the window
        return max(int(self.factor * self.trained_window), self.longest_expected or 0)

    @property
    def native_window(self) -> int | None:
        return self.trained_window  # Transformers takes L from max_position_embeddings

    def native(self) -> dict[str, object] | None:
        if self.regime_start > self.trained_window:
            return None
        return to_rope_parameters(self, "dynamic", factor=self.factor)


@register_scheme
class LongRoPE(Rotary):
    """LongRoPE: w'_k = w_k / lambda_k with searched lambda, one list for sequences longer than the window and one for
    the others; cos and sin times sqrt(1 + ln s / ln L) (Ding et al. 2024, arXiv 2402.13753, equation 2).

    Without `factor` nothing says how far the lists reach: the attention factor is then 1 and the effective window the
    trained one, or `expected_length`. An `expected_length` beyond the window uses the long list throughout.
    """

    name = "longrope"
    summary = "divides each frequency by its searched factor, and beyond the window by another list"
    paper = "Ding et al. 2024, arXiv 2402.13753"
    examples = MappingProxyType({"long_factor": "long_factor=[1.0, 1.2, 1.5, ...] (one number for each rotated pair)"})
    training_free = True

    long_factor: Sequence[float]
    """lambda beyond the window, one for each pair."""
    short_factor: Sequence[float] | None = None
    """lambda within the window; None for ones."""
    factor: float | None = None
    """s >= 1, the target window over the trained one."""
    attention_factor: float | None = None
    """Factor on cos and sin, instead of the formula."""
    expected_length: int | None = None
    """Length N in tokens by which shorter sequences are encoded too."""

    def setup(self) -> None:
        super().setup()
        pairs = self.dim // 2
        self.long = check_list(self.name, "long_factor", self.long_factor, pairs)
        self.short = [1.0] * pairs
        if self.short_factor is not None:
            self.short = check_list(self.name, "short_factor", self.short_factor, pairs)
        remedy = "Give the target window over the trained one, or leave it out."
        given = self.factor
        self.extension = 1.0 if given is None else check_number(self.name, "factor", given, 1.0, remedy=remedy)
        self.longest_expected = check_length(self.name, "expected_length", self.expected_length)
        if self.attention_factor is not None:
            self.scale = check_number(self.name, "attention_factor", self.attention_factor, 0.0, LARGEST_FACTOR)
        elif self.extension == 1:
            self.scale = 1.0
        else:
            self.scale = math.sqrt(1 + math.log(self.extension) / math.log(max(self.trained_window, 2)))

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        stretch = self.long if length is not None and length > self.trained_window else self.short
        return self.plain_frequencies(stretch=torch.tensor(stretch, dtype=torch.float32, device="cpu")), self.scale

    @property
    def length_dependent(self) -> bool:
        return self.long != self.short and self.regime_start == self.trained_window

    @property
    def effective_window(self) -> int | None:
        return max(int(self.extension * self.trained_window), self.longest_expected or 0)

    def native(self) -> dict[str, object] | None:
        return to_rope_parameters(
            self,
            "longrope",
            long_factor=self.long,
            short_factor=self.short if self.regime_start == self.trained_window else self.long,
            factor=self.extension,
            attention_factor=self.scale,
            original_max_position_embeddings=self.trained_window,
        )
