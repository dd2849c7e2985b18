"""Rotations with a decay by distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.checks import LARGEST_LENGTH, check_number
from ..core.head_slices import SHARED
from ..core.positions import Positions
from ..core.ranges import Range
from ..core.scheme import Scheme, causal_distance, check_causal
from .bias import LARGEST_SLOPE, ALiBi, alibi_slopes
from .frequency_wrappers import FrequencyWrapper
from .registry import register_scheme
from .rotary import Rotation

if TYPE_CHECKING:
    from ..core.encoded_keys import EncodedPass
    from ..core.engine import AttentionEngine, Output

MOST_BLOCKS = 16
"""Blocks of keys that a decoding step reads one after the other, at most; beyond them it encodes all keys."""
ROWS = 256
"""Number of queries that share one centre."""


@dataclass(frozen=True)
class Growth:
    """The factors on rotated queries around one centre, as a `PositionTransform`."""

    grown: Callable[[Tensor, Tensor], Tensor]
    exponents: Tensor
    """`[batch | 1, length, r]`."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.grown(x, self.exponents)

    def back(self, grad: Tensor) -> Tensor:
        return self.grown(grad, self.exponents)

    def slice_tokens(self, start: int, stop: int) -> Growth:
        return Growth(self.grown, self.exponents[:, start:stop])


@register_scheme
class XPos(Rotation):
    """xPos: rotation, and pair k of a score times zeta_k^((i - j) / B), zeta_k = (2 k / r + 0.4) / 1.4 (Sun et al.
    2022, arXiv 2212.10554, section 3.2).

    The factor is split between query and key around a centre c, zeta^((i - c) / B) and zeta^((c - j) / B). Far from c
    it would overflow, so each block of queries has its own centre. Underflow is harmless: the product underflows too.
    """

    name = "xpos"
    summary = "rotates, and lets every pair of dimensions decay with the distance, the fast ones sooner"
    paper = "Sun et al. 2022, arXiv 2212.10554"
    own_scores = "rows"
    head_sharded_attributes = SHARED

    scale_base: float = 512
    """B in tokens, at least 0.25; a larger one is a slower decay."""

    def setup(self) -> None:
        super().setup()
        self.scale_base = check_number(self.name, "scale_base", self.scale_base, 0.25, LARGEST_LENGTH)

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        return self.plain_frequencies(), 1.0

    def relative_position(self, length: int) -> Tensor:
        return causal_distance(length)

    @property
    def zeta(self) -> Tensor:
        """Return the factor on each pair of dimensions per `scale_base` tokens, `[rotary_dim / 2]`, float64."""
        return (torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu") / self.dim + 0.4) / 1.4

    def _rates(self) -> Tensor:
        rates = self.zeta.log() / self.scale_base
        return rates.repeat_interleave(2) if self.shape.interleaved else torch.cat((rates, rates))

    def prepare(self, positions: Positions) -> tuple[Tensor, ...]:
        """Return cos and sin of queries and keys, and whether the positions of the queries have gaps.

        If encoded keys are reused, those of the keys are left out.
        """
        jumps = False
        if positions.query.shape[1] > 1 and not torch.compiler.is_compiling():
            jumps = bool((positions.query.diff(dim=-1).abs() > 1).any())
        key = () if positions.encoded is not None else self.cos_sin(positions.key)
        return (*self.cos_sin(positions.query), *key, torch.tensor(jumps, device="cpu"))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        check_causal(self, engine)
        cos_query, sin_query, *of_key, _ = positions.prepared
        query = self.rotate(query, cos_query, sin_query)
        if positions.encoded is not None:
            found = self._decode(query, key, value, positions, positions.encoded, engine)
            if found is not None:
                return found
            of_key = list(self.cos_sin(positions.key))
        elif positions.kept is not None:
            of_key = [table[:, positions.kept] for table in of_key]
        key = self.rotate(key, *of_key)
        fast = engine.blocks(query, key, value, positions, 2 * self._span, self._around)
        return engine.rows(query, key, value, positions, self._scores) if fast is None else fast

    @property
    def key_copies(self) -> int:
        return 1

    def _decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        encoded: EncodedPass,
        engine: AttentionEngine,
    ) -> Output | None:
        """Compute attention of one rotated query, with keys that earlier passes rotated and scaled.

        Each block of positions has a centre. A key is scaled relative to the centre of its block, which never changes,
        so its copy remains valid. The query is scaled once for each block. Return None if there are too many blocks, or
        a key is ahead of the query.
        """
        if query.shape[2] != 1 or engine.is_specification or torch.compiler.is_compiling():
            return None
        rates = self.constant("rates", query.device, lambda: self._rates().float())
        width = 2 * self._span

        def encode(new: Tensor, start: int) -> Tensor:
            def tables() -> tuple[Tensor, Tensor, Tensor]:
                at = positions.key[:, start:]
                return *self.cos_sin(at), (width // 2 - at % width).float()[..., None] * rates

            name = (id(self), start, positions.key.shape[1], positions.key.device)
            cos, sin, exponents = encoded.once(name, tables, self)
            return self._grown(self.rotate(new, cos, sin), exponents)

        def blocks() -> tuple[Tensor, Tensor, list[tuple[int, Tensor]]]:
            of_query, of_key = positions.query // width, positions.key // width
            farthest = int((of_query - of_key.amin(-1, keepdim=True)).max())
            most = MOST_BLOCKS if query.device.type == "cpu" else 2  # elsewhere each block computes all scores
            if farthest >= most or bool((positions.key > positions.query).any()):
                return of_query, of_key, []
            distances = range(farthest + 1)
            centres = ((of_query - distance) * width + width // 2 for distance in distances)
            exponents = [(positions.query - centre).clamp(min=-width).float()[..., None] * rates for centre in centres]
            return of_query, of_key, list(zip(distances, exponents, strict=True))

        name = ("blocks", id(self), positions.key.shape[1], positions.key.device)
        of_query, of_key, scaled = encoded.once(name, blocks, self)
        if not scaled:
            return None
        keys = encoded.keys(key, engine.cache_layer, "scaled", None, encode)
        ranges = [
            Range(distance, distance + 1, of_query, of_key, None, Growth(self._grown, exponents), keys=keys)
            for distance, exponents in scaled
        ]
        return engine.ranges(query, key, value, positions, ranges)

    def _around(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Scale queries and keys by their distance to one centre among the queries."""
        rates = self.constant("rates", query.device, lambda: self._rates().float())
        centre = positions.query[:, positions.query.shape[1] // 2, None]
        grown = self._grown(query, (positions.query - centre).float()[..., None] * rates)
        # Keys ahead of a query are masked, and may not overflow before they are.
        behind = (centre - positions.key).clamp(min=-self._span)
        return grown, self._grown(key, behind.float()[..., None] * rates)

    def _scores(self, query: Tensor, key: Tensor, positions: Positions, engine: AttentionEngine) -> Tensor:
        scores = []
        for start, stop in self._blocks(positions):
            seen = positions._replace(query=positions.query[:, start:stop])
            scores.append(engine.scores(*self._around(query[:, :, start:stop], key, seen)))
        return scores[0] if len(scores) == 1 else torch.cat(scores, 2)

    def _grown(self, x: Tensor, exponents: Tensor) -> Tensor:
        """Multiply the rotated dimensions of `x` by e to the power of `exponents`, `[batch | 1, length, r]`."""
        factors, start = exponents.exp().to(x.dtype)[:, None], self.shape.rotary_start
        if self.dim == x.shape[-1]:
            return x * factors
        stop = start + self.dim
        return torch.cat((x[..., :start], x[..., start:stop] * factors, x[..., stop:]), -1)

    @property
    def _span(self) -> int:
        """Return the distance in tokens over which the fastest pair changes by at most e^5, which fits every dtype."""
        return max(1, int(4 * self.scale_base))

    def _blocks(self, positions: Positions) -> Iterator[tuple[int, int]]:
        """Yield ranges (start, stop) of queries within reach of one centre."""
        count, width = positions.query.shape[1], min(ROWS, self._span)
        jumps = count > 1 and not torch.compiler.is_compiling() and bool(positions.prepared[-1])
        for start in range(0, count, width):
            stop = min(start + width, count)
            if jumps:
                yield from self._near(positions.query, start, stop)
            else:
                yield start, stop

    def _near(self, at: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Halve a range of queries until no part spans a gap in the positions."""
        block = at[:, start:stop]
        if stop - start == 1 or int((block.amax(1) - block.amin(1)).max()) <= self._span:
            yield start, stop
        else:
            middle = (start + stop) // 2
            yield from self._near(at, start, middle)
            yield from self._near(at, middle, stop)


@register_scheme
class RoPEALiBi(FrequencyWrapper):
    """ALiBi's penalty on the scores of a rotation, -s m_h (i - j) beside any rotary scheme."""

    name = "rope_alibi"
    summary = "a rotation, and a penalty on the scores that grows linearly with the distance"
    paper = "Su et al. 2021, arXiv 2104.09864, with Press et al. 2021, arXiv 2108.12409"
    head_sharded_attributes = MappingProxyType({"head_slopes": 0})

    slope_scale: float = 1.0
    """s > 0, the factor on all slopes."""

    def setup(self) -> None:
        super().setup()
        scale = check_number(self.name, "slope_scale", self.slope_scale, 0.0, LARGEST_SLOPE, exclusive=True)
        self.head_slopes = [scale * slope for slope in alibi_slopes(self.shape.num_heads)]
        self.penalty = ALiBi(self.shape, slopes=self.head_slopes)

    @property
    def scorer(self) -> Scheme | None:
        return self.penalty

    def change_frequencies(self, inv_freq: Tensor) -> Tensor:
        return inv_freq
