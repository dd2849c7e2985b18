"""FIRE: a small network of the distance relative to the position of the query."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..attention.kernels.fire import Network
from ..core.checks import LARGEST_LENGTH, LARGEST_TABLE, check_count, check_number
from ..core.positions import Positions
from ..core.scheme import Scheme, at_least_float32, causal_distance, check_causal, check_heads
from .registry import register_scheme

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine, Output

EPSILON = 1e-6


@register_scheme
class FIRE(Scheme):
    """A learned function of the progressive distance (Li et al. 2023, arXiv 2310.04418).

    bias = MLP(psi(i - j) / psi(max(i, |m| L))) with psi(x) = ln(|c x| + 1); the MLP goes from one number through
    `width` rectified units to the heads. c, m and the MLP are learned, for each layer; its last weights start as zeros.
    The denominator depends on the query's position, so it cannot be cached with the keys.
    """

    name = "fire"
    mechanism = "distance bias"
    summary = "a small network of the distance relative to the query's position"
    paper = "Li et al. 2023, arXiv 2310.04418"
    per_layer = True
    shift_invariant = False
    head_sharded_attributes = MappingProxyType({"weight_out": 0, "bias_out": 0})

    width: int = 32
    """Hidden units."""
    threshold: float = 512
    """L in tokens, below which the denominator stays constant."""

    def setup(self) -> None:
        super().setup()
        heads = self.shape.num_heads
        units = check_count("fire", "width", self.width, 1, LARGEST_TABLE // max(heads, 1))
        self.threshold = check_number("fire", "threshold", self.threshold, 0.0, LARGEST_LENGTH, exclusive=True)
        self.c = nn.Parameter(torch.tensor([0.1]))  # of one dimension: shards and DeepSpeed know none without
        self.multiplier = nn.Parameter(torch.tensor([1.0]))
        first = nn.Linear(1, units)
        self.weight_in = nn.Parameter(first.weight.detach()[:, 0].clone())
        self.bias_in = nn.Parameter(first.bias.detach().clone())
        self.weight_out = nn.Parameter(torch.zeros(heads, units))
        self.bias_out = nn.Parameter(torch.zeros(heads))

    def relative_position(self, length: int) -> Tensor:
        return causal_distance(length)

    def _psi(self, x: Tensor) -> Tensor:
        return torch.log1p((at_least_float32(self.c) * x).abs())

    def _denominator(self, position: Tensor) -> Tensor:
        """Return psi of the larger of each query's position and the threshold."""
        least = (at_least_float32(self.multiplier) * self.threshold).abs()
        return self._psi(torch.maximum(position.to(least.dtype), least)) + EPSILON

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor | None:
        denominator = self._denominator(positions.query)
        relative = self._psi(positions.distance.to(denominator.dtype)) / denominator[:, :, None]
        hidden = torch.relu(relative[..., None] * at_least_float32(self.weight_in) + at_least_float32(self.bias_in))
        return (hidden @ at_least_float32(self.weight_out).T + at_least_float32(self.bias_out)).permute(0, 3, 1, 2)

    def bias_block(self, query: Tensor, key: Tensor) -> Tensor:
        """Return `bias` for query positions `[q]` and key positions `[k]`, `[heads, q, k]`, without a hidden layer in
        memory."""
        layers = (self.weight_in, self.bias_in, self.weight_out, self.bias_out)
        result = Network.apply(
            query, key, at_least_float32(self.c), self._denominator(query), *(at_least_float32(one) for one in layers)
        )
        assert isinstance(result, Tensor)
        return result

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        check_heads(self, query)
        check_causal(self, engine)
        return engine(query, key, value, positions, bias=self)
