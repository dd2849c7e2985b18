"""Fourier position embedding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.head_slices import SHARED
from ..core.positions import Positions
from ..core.scheme import at_least_float32, causal_distance
from .registry import register_scheme
from .rotary import Rotation

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine, Output


@register_scheme
class FoPE(Rotation):
    """Each pair of dimensions turns by a Fourier series instead of one frequency (Hua et al. 2024, arXiv 2412.17739).

    Frequencies that do not complete a turn within the trained window are set to zero, so their pairs do not rotate.
    For the others, cos and sin are sums over all kept frequencies w_m, with learned coefficients for each layer:
    cos_d(i) = sum_m A[m, d] cos(i w_m), sin_d(i) = sum_m B[m, d] sin(i w_m). The heads of a layer share them.

    A and B start as the identity, where the scheme is RoPE without its slow frequencies.
    """

    name = "fope"
    summary = "a learned Fourier series for each pair of dimensions, without the frequencies that were never trained"
    paper = "Hua et al. 2024, arXiv 2412.17739"
    shift_invariant = False
    head_sharded_attributes = SHARED

    def setup(self) -> None:
        super().setup()
        self.kept = max(1, int((self.plain_frequencies() > 2 * math.pi / self.trained_window).sum()))
        start = torch.eye(self.kept).repeat(self.shape.num_layers, 1, 1)
        self.cos_coefficients = nn.Parameter(start)
        self.sin_coefficients = nn.Parameter(start.clone())

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        inv_freq = self.plain_frequencies()
        inv_freq[self.kept :] = 0
        return inv_freq, 1.0

    def relative_position(self, length: int) -> Tensor:
        return causal_distance(length)

    @property
    def effective_window(self) -> int | None:
        return None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        query = self._turned(query, *self._series(positions.query, engine.layer))
        key = self._turned(key, *self._series(positions.key, engine.layer))
        return engine(query, key, value, positions)

    def _series(self, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin at positions `[batch | 1, length]`, each `[batch | 1, 1, length, r / 2]`."""
        inv_freq = self.plain_frequencies()[: self.kept].to(positions.device)
        angles = positions[:, None, :, None].float() * inv_freq
        of_cos, of_sin = (at_least_float32(each[layer]) for each in (self.cos_coefficients, self.sin_coefficients))
        cos, sin = angles.cos().to(of_cos.dtype) @ of_cos, angles.sin().to(of_sin.dtype) @ of_sin
        still = self.dim // 2 - self.kept
        return nn.functional.pad(cos, (0, still), value=1.0), nn.functional.pad(sin, (0, still))

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return queries or keys `[batch, heads, length, head]` after cos and sin."""
        start, stop = self.shape.rotary_start, self.shape.rotary_start + self.dim
        part = at_least_float32(x[..., start:stop])
        first, second = (part[..., 0::2], part[..., 1::2]) if self.shape.interleaved else part.chunk(2, -1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(turned, -1).flatten(-2) if self.shape.interleaved else torch.cat(turned, -1)
        return torch.cat((x[..., :start], joined.to(x.dtype), x[..., stop:]), -1)
