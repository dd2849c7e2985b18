"""A softmax whose sharpness depends on the position of the query, beside a rotation."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..core.checks import LARGEST_FACTOR, LARGEST_LENGTH, check_choice, check_number
from ..core.head_slices import SHARED
from ..core.positions import Positions
from ..core.scheme import Scheme, check_causal
from .frequency_wrappers import FrequencyWrapper
from .registry import register_scheme

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine, Output

KINDS = ("ssmax", "temperature")


class QueryFactor(Scheme):
    """Multiply each query by a factor that depends on its position, which sharpens its softmax."""

    name = "softmax_scaling"
    shift_invariant = False

    def factor(self, positions: Tensor, layer: int) -> Tensor:
        """Return the factor for query positions `[batch | 1, query]`, `[batch | 1, heads | 1, query]`."""
        raise NotImplementedError

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        check_causal(self, engine)
        factor = self.factor(positions.query, engine.layer)[..., None]
        return engine(query * factor.to(query.dtype), key, value, positions)


class ScalableSoftmax(QueryFactor):
    """SSMax: the factor s log n, n the number of keys that a query sees, and s learned for each head of each layer."""

    head_sharded_attributes = MappingProxyType({"scale": 1})

    start: float = 1.0

    def setup(self) -> None:
        super().setup()
        self.scale = nn.Parameter(torch.full((self.shape.num_layers, self.shape.num_heads), self.start))

    def factor(self, positions: Tensor, layer: int) -> Tensor:
        return self.scale[layer].float()[:, None] * torch.log(positions[:, None].float() + 1)


class Temperature(QueryFactor):
    """Llama 4's factor 1 + a log(1 + floor((i + 1) / f)) for the query at position i."""

    head_sharded_attributes = SHARED

    slope: float = 0.1
    floor: float = 8192

    def factor(self, positions: Tensor, layer: int) -> Tensor:
        steps = torch.floor((positions[:, None].float() + 1) / self.floor)
        return 1 + self.slope * torch.log1p(steps)


@register_scheme
class SoftmaxScaling(FrequencyWrapper):
    """A factor on the scores that grows with the position of the query, beside any rotary scheme.

    `ssmax` is Scalable-Softmax (Nakanishi 2025, arXiv 2501.19399, equation 2): the factor s log n for a query that sees
    n keys. The number s is learned for each head of each layer. `temperature` is that of Llama 4 (Meta 2025, as in
    Transformers' `modeling_llama4`), which has nothing to learn.
    """

    name = "softmax_scaling"
    summary = "a softmax that sharpens with the number of keys, beside any rotary scheme"
    paper = "Nakanishi 2025, arXiv 2501.19399, and Llama 4"
    shift_invariant = False

    kind: Literal["ssmax", "temperature"] = "ssmax"
    """The formula."""
    scale: float | None = None
    """First value of s. None for 1 / (mean of log n for n from 1 to the trained window), so that the mean factor in a
    text of that length is 1."""
    slope: float = 0.1
    """a of `temperature`; Llama 4's 0.1."""
    floor: float = 8192
    """f of `temperature` in tokens: texts up to f - 1 tokens do not change. Llama 4's 8,192."""

    def setup(self) -> None:
        super().setup()
        check_choice(self.name, "kind", self.kind, KINDS)
        if self.kind == "ssmax":
            given = self.neutral_scale if self.scale is None else self.scale
            start = check_number(self.name, "scale", given, 0.0, LARGEST_FACTOR, exclusive=True)
            self.sharpening: QueryFactor = ScalableSoftmax(self.shape, start=start)
        else:
            slope = check_number(self.name, "slope", self.slope, 0.0, LARGEST_FACTOR)
            floor = check_number(self.name, "floor", self.floor, 1.0, LARGEST_LENGTH)
            self.sharpening = Temperature(self.shape, slope=slope, floor=floor)

    @property
    def neutral_scale(self) -> float:
        """1 / (mean of log n for n from 1 to the trained window)."""
        window = max(self.trained_window, 2)
        return window / math.lgamma(window + 1)  # the sum of the logarithms is log(window!)

    @property
    def scorer(self) -> Scheme | None:
        return self.sharpening

    def change_frequencies(self, inv_freq: Tensor) -> Tensor:
        return inv_freq
