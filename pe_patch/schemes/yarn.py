"""YaRN, with a fixed factor and with one that follows the length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.checks import LARGEST_FACTOR, check_flag, check_length, check_number, check_order
from ..errors import OptionValueError
from .config_formats import yarn_temperature
from .registry import register_scheme
from .rotary import Rotary, Scaled, to_rope_parameters


@register_scheme
class YaRN(Scaled):
    """YaRN: divide slow frequencies by s, keep fast ones, and join them by a ramp over the index of the pair (`ramp`).

    The ramp lies between D(beta_fast) and D(beta_slow), where D(n) = r ln(L / 2 pi n) / (2 ln theta) is the pair that
    makes n turns inside the trained window L, r is the number of rotary dimensions and theta the base. cos and sin are
    multiplied by 0.1 ln s + 1 (`attention_factor_at`).

    Source: Peng et al. 2023, arXiv 2309.00071, definition 3 and equation 22; the ramp over the index is the authors'
    code.
    """

    name = "yarn"
    summary = "interpolates slow frequencies, keeps fast ones and sharpens the scores"
    paper = "Peng et al. 2023, arXiv 2309.00071"
    training_free = True

    beta_fast: float = 32
    """Turns inside the window above which a frequency is kept."""
    beta_slow: float = 1
    """Turns inside the window below which a frequency is divided by s."""
    attention_factor: float | None = None
    """Factor on cos and sin, instead of the formula."""
    mscale: float | None = None
    """With `mscale_all_dim`, the factor on cos and sin is (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1)."""
    mscale_all_dim: float | None = None
    """DeepSeek's families also multiply their softmax scale by (0.1 mscale_all_dim ln s + 1)^2."""
    truncate: bool = True
    """Round the ends of the ramp outwards to whole pairs."""

    def setup(self) -> None:
        super().setup()
        self.beta_fast = check_number(self.name, "beta_fast", self.beta_fast, 0.0, exclusive=True)
        self.beta_slow = check_number(self.name, "beta_slow", self.beta_slow, 0.0, exclusive=True)
        check_order(self.name, ("beta_slow", self.beta_slow), ("beta_fast", self.beta_fast))
        given = {
            "attention_factor": self.attention_factor, "mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim
        }  # fmt: skip
        self.given = {
            option: check_number(self.name, option, value, 0.0, LARGEST_FACTOR)
            for option, value in given.items()
            if value is not None
        }
        self.truncate = check_flag(self.name, "truncate", self.truncate)

    def attention_factor_at(self, factor: float) -> float:
        """Return the factor on cos and sin at s = `factor`."""
        if "attention_factor" in self.given:
            return self.given["attention_factor"]
        mscale, all_dim = self.given.get("mscale"), self.given.get("mscale_all_dim")
        if mscale and all_dim:
            return yarn_temperature(factor, mscale) / yarn_temperature(factor, all_dim)
        return yarn_temperature(factor)

    @property
    def softmax_factor(self) -> float:
        """Return 0.1 mscale_all_dim ln s + 1, whatever the factor on cos and sin.

        Source: DeepSeek-AI 2024, arXiv 2405.04434, whose code multiplies the softmax scale by its square.
        """
        all_dim = self.given.get("mscale_all_dim")
        if not all_dim:
            return 1.0
        if self.fixed_factor is None:
            raise OptionValueError(
                f"{self.name!r} got mscale_all_dim={all_dim:g}, by which this family multiplies its softmax scale, and "
                "a factor that follows the length; give a fixed factor, or leave mscale and mscale_all_dim out."
            )
        return yarn_temperature(self.fixed_factor, all_dim)

    def unscaled(self) -> tuple[Tensor, float]:
        return self.plain_frequencies(), 1.0 if self.length_dependent else self.attention_factor_at(1.0)

    def ramp(self) -> Tensor:
        """Return how far each pair is interpolated, from 0 (kept) to 1 (divided by s), `[rotary_dim / 2]`."""

        def pair_of(turns: float) -> float:
            return (self.dim * math.log(self.trained_window / (turns * 2 * math.pi))) / (2 * math.log(self.base))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)  # r - 1 rather than r/2 - 1, as in the authors' code
        if low == high:
            high += 0.001
        index = torch.arange(self.dim // 2, dtype=torch.float32, device="cpu")
        return ((index - low) / (high - low)).clamp(0, 1)

    def scaled(self, factor: float) -> tuple[Tensor, float]:
        plain = self.plain_frequencies()
        slowed = self.plain_frequencies(stretch=factor)
        kept = 1 - self.ramp()  # the order of operations is Transformers', for equal bits
        return slowed * (1 - kept) + plain * kept, self.attention_factor_at(factor)

    def native_scaled(self, factor: float) -> dict[str, object] | None:
        values = {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate, **self.given}
        values.setdefault("attention_factor", self.attention_factor_at(factor))
        return to_rope_parameters(
            self, "yarn", factor=factor, original_max_position_embeddings=self.trained_window, **values
        )


@register_scheme
class DynamicYaRN(YaRN):
    """YaRN with s = N / L at N tokens, and plain RoPE within the window (Peng et al. 2023, arXiv 2309.00071, sections
    3.3 and 3.4).
    """

    name = "dynamic_yarn"
    summary = "YaRN whose factor follows the length of the sequence"

    factor: float | None = None
    """The largest s; None for no limit."""
    expected_length: int | None = None
    """Length N in tokens by which shorter sequences are encoded too."""

    def setup(self) -> None:
        super().setup()
        self.longest_expected = check_length(self.name, "expected_length", self.expected_length)

    def read_factor(self) -> float | None:
        remedy = "It is the largest scaling; leave it out for none."
        self.cap = (
            math.inf if self.factor is None else check_number(self.name, "factor", self.factor, 1.0, remedy=remedy)
        )
        return None

    @property
    def changes_nothing(self) -> bool:
        return self.cap == 1 and not self.given and self.base == self.shape.rope_theta

    def factor_at(self, length: int | None) -> float:
        return min(max(length or 0, self.trained_window) / self.trained_window, self.cap)

    def regime(self, length: int) -> int:
        return Rotary.regime(self, length)

    @property
    def effective_window(self) -> int | None:
        if math.isinf(self.cap):
            return self.longest_expected
        return max(int(self.cap * self.trained_window), self.longest_expected or 0)

    @property
    def native_window(self) -> int | None:
        return self.trained_window
