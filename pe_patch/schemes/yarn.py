"""YaRN, with a fixed factor and with one that follows the length."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.checks import LARGEST_FACTOR, check_flag, check_length, check_number, check_order
from ..core.scheme import AttentionShape
from ..errors import OptionValueError
from .config_formats import yarn_temperature
from .registry import register_scheme
from .rope import Rotary
from .scaling import Scaled, native_parameters


@register_scheme
class YaRN(Scaled):
    """YaRN: slow frequencies interpolated, fast ones kept, with a ramp over the pair index between D(beta_fast) and
    D(beta_slow), D(n) = r ln(L / 2 pi n) / (2 ln theta), and cos and sin times 0.1 ln s + 1 (Peng et al. 2023, arXiv
    2309.00071, definition 3 and equation 22; the ramp over the index is the authors' code).

    Options:
        factor: s >= 1, or "auto".
        beta_fast, beta_slow: turns inside the window at which the ramp begins and ends.
        attention_factor: what cos and sin are multiplied by, instead of the formula.
        mscale, mscale_all_dim: both given, the factor is (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1). The
            families of DeepSeek also multiply their softmax scale by (0.1 mscale_all_dim ln s + 1)^2.
        truncate: round the ends of the ramp outwards to whole pairs.
    """

    name = "yarn"
    summary = "interpolates slow frequencies, keeps fast ones and sharpens the scores"
    paper = "Peng et al. 2023, arXiv 2309.00071"
    training_free = True

    def __init__(
        self,
        shape: AttentionShape,
        *,
        beta_fast: float = 32,
        beta_slow: float = 1,
        attention_factor: float | None = None,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        truncate: bool = True,
        **shared: Any,
    ) -> None:
        super().__init__(shape, **shared)
        self.beta_fast = check_number(self.name, "beta_fast", beta_fast, 0.0, exclusive=True)
        self.beta_slow = check_number(self.name, "beta_slow", beta_slow, 0.0, exclusive=True)
        check_order(self.name, ("beta_slow", self.beta_slow), ("beta_fast", self.beta_fast))
        given = {"attention_factor": attention_factor, "mscale": mscale, "mscale_all_dim": mscale_all_dim}
        self.given = {
            option: check_number(self.name, option, value, 0.0, LARGEST_FACTOR)
            for option, value in given.items()
            if value is not None
        }
        self.truncate = check_flag(self.name, "truncate", truncate)

    def attention_factor_at(self, factor: float) -> float:
        """What cos and sin are multiplied by at s = `factor`."""
        if "attention_factor" in self.given:
            return self.given["attention_factor"]
        mscale, all_dim = self.given.get("mscale"), self.given.get("mscale_all_dim")
        if mscale and all_dim:
            return yarn_temperature(factor, mscale) / yarn_temperature(factor, all_dim)
        return yarn_temperature(factor)

    @property
    def softmax_factor(self) -> float:
        """0.1 mscale_all_dim ln s + 1, whatever the factor on cos and sin (DeepSeek-AI 2024, arXiv 2405.04434, whose
        code multiplies the softmax scale by its square)."""
        all_dim = self.given.get("mscale_all_dim")
        if not all_dim:
            return 1.0
        if self.factor is None:
            raise OptionValueError(
                f"{self.name!r} got mscale_all_dim={all_dim:g}, by which this family multiplies its softmax scale, and "
                "a factor that follows the length; give a fixed factor, or leave mscale and mscale_all_dim out."
            )
        return yarn_temperature(self.factor, all_dim)

    def unscaled(self) -> tuple[Tensor, float]:
        return self.plain_frequencies(), 1.0 if self.length_dependent else self.attention_factor_at(1.0)

    def ramp(self) -> Tensor:
        """How far each pair is interpolated, 0 (kept) to 1 (divided by s), `[rotary_dim / 2]`."""

        def pair_of(turns: float) -> float:
            return (self.dim * math.log(self.window / (turns * 2 * math.pi))) / (2 * math.log(self.theta))

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
        kept = 1 - self.ramp()
        return slowed * (1 - kept) + plain * kept, self.attention_factor_at(factor)

    def native_scaled(self, factor: float) -> dict[str, Any] | None:
        values = {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate, **self.given}
        values.setdefault("attention_factor", self.attention_factor_at(factor))
        return native_parameters(self, "yarn", factor=factor, original_max_position_embeddings=self.window, **values)


@register_scheme
class DynamicYaRN(YaRN):
    """YaRN with s = N / L at N tokens, and plain RoPE within the window (Peng et al. 2023, arXiv 2309.00071, sections
    3.3 and 3.4).

    Options:
        factor: the largest s; None sets no limit.
        expected_length: N in tokens for which shorter sequences are encoded too.
        and those of `YaRN`.
    """

    name = "dynamic_yarn"
    summary = "YaRN whose factor follows the length of the sequence"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        factor: float | None = None,
        expected_length: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(shape, factor="auto", **shared)
        remedy = "It is the largest scaling; leave it out for none."
        self.cap = math.inf if factor is None else check_number(self.name, "factor", factor, 1.0, do=remedy)
        self.expected_length = check_length(self.name, "expected_length", expected_length)

    def factor_at(self, length: int | None) -> float:
        return min(max(length or 0, self.window) / self.window, self.cap)

    def regime(self, length: int) -> int:
        return Rotary.regime(self, length)

    @property
    def effective_window(self) -> int | None:
        if math.isinf(self.cap):
            return self.expected_length
        return max(int(self.cap * self.window), self.expected_length or 0)

    @property
    def native_window(self) -> int | None:
        return self.window
