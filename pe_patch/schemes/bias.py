"""Additive biases on the scores that depend on the distance and the head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from ..core.checks import LARGEST_LENGTH, LARGEST_TABLE, check_choice, check_count, check_list
from ..core.positions import Positions
from ..core.scheme import DistanceBias, at_least_float32, check_heads
from ..errors import OptionValueError, quoted
from .registry import register_scheme

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine, Output

LARGEST_SLOPE = 1e4
LARGEST_SANDWICH = 8192
"""Largest width of Sandwich's sinusoids. Each cosine costs a pass over the scores."""

WIDTH = 8
"""GPU kernels need head widths that are multiples of this number."""

TURN_AFTER = 256
"""Distance in tokens after which Sandwich reduces its angles modulo 2 pi."""

LIMBS: dict[torch.dtype, tuple[tuple[torch.dtype, ...], int, int, tuple[float, ...]]] = {
    # dtype: dtypes that cut the slope, base and number of a position's limbs, weights of the limbs of their products
    torch.float64: ((torch.float64,), 2**24, 1, (1.0,)),
    torch.float32: ((torch.bfloat16, torch.float32), 2**12, 2, (1.0,)),
    torch.bfloat16: ((torch.bfloat16, torch.bfloat16), 2**8, 3, (1.0, 1.0)),
    torch.float16: ((torch.float16, torch.float16), 2**11, 2, (2.0**11, 1.0)),
}


def position_limbs(positions: Tensor, base: int, count: int) -> list[Tensor]:
    """Split integers into digits to a base, the lowest first, each with the integer's sign; the last is the rest."""
    limbs = []
    for _ in range(count - 1):
        limbs.append(torch.fmod(positions, base))
        positions = torch.div(positions, base, rounding_mode="trunc")
    return [*limbs, positions]


def alibi_slopes(heads: int) -> list[float]:
    """Return one ALiBi slope per head: 2^(-8 t / p) for the largest power of two p <= heads.

    The other heads get every other slope of 2p heads.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * t / power) for t in range(1, power + 1)]
    return slopes + [2.0 ** (-4 * t / power) for t in range(1, 2 * (heads - power), 2)]


@register_scheme
class ALiBi(DistanceBias):
    """Bias -m_h (i - j), steeper for some heads than for others (Press et al. 2021, arXiv 2108.12409)."""

    name = "alibi"
    summary = "a penalty on the scores that grows linearly with the distance"
    paper = "Press et al. 2021, arXiv 2108.12409"
    supports_bias_as_head_dims = True
    head_sharded_attributes = MappingProxyType({"head_slopes": 0})

    slopes: Sequence[float] | None = None
    """One positive number for each query head; None for the paper's."""

    def setup(self) -> None:
        super().setup()
        heads = self.shape.num_heads
        given = alibi_slopes(heads) if self.slopes is None else self.slopes
        self.head_slopes = check_list(
            self.name, "slopes", given, heads, verb="has", unit="query head", high=LARGEST_SLOPE
        )

    def _slopes(self, device: torch.device) -> Tensor:
        return self.constant(
            "slopes", device, lambda: torch.tensor(self.head_slopes, dtype=torch.float32, device="cpu")
        )

    def score_bias(self, distance: Tensor, head: Tensor) -> Tensor:
        return -self._slopes(distance.device)[head] * distance.abs()

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor | None:
        # By the key's position alone, as BLOOM has it: each row differs from the distance form by a constant, which
        # the softmax does not see, and under a causal mask no key lies ahead.
        return self._slopes(query.device)[:, None, None] * positions.key[:, None, None, :]

    def min_slope(self, device: torch.device) -> Tensor | None:
        return self._slopes(device)

    def bias_as_head_dims(
        self, positions: Positions, scaling: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Write the bias, slope j - slope i, as exact products.

        Positions above 256 and most slopes are not exact in bfloat16, so both are split. Subtracting the query's term
        next to its counterpart keeps partial sums small.
        """
        cuts, base, count, weights = LIMBS[dtype]
        if max(self.head_slopes) / scaling * float(base ** (count - 1)) > torch.finfo(dtype).max:
            return None  # slopes of a user's own may be too steep for half precision
        origin = positions.query[:, -1:]
        of_query, of_key = [], []
        at_query = [limb[:, None, :] for limb in position_limbs(positions.query - origin, base, count)]
        at_key = position_limbs(positions.key - origin, base, count)
        rest = torch.tensor(self.head_slopes, dtype=torch.float64, device=origin.device)[None, :, None] / scaling
        for cut in cuts:
            slope = rest.to(cut).double()
            rest = rest - slope
            for n in reversed(range(count)):
                step = slope * float(base**n)
                of_query.append(step.expand(1, -1, positions.query.shape[1]))
                of_key.append(at_key[n])
                constant = -step * at_query[n]
                for weight in weights:
                    limb = (constant / weight).to(dtype).double()
                    constant = constant - limb * weight
                    of_query.append(limb)
                    of_key.append(torch.full_like(at_key[n], int(weight)))
        rows, padding = positions.query.shape[0], -len(of_query) % WIDTH
        query = torch.stack([column.expand(rows, -1, -1) for column in of_query], -1).to(dtype)
        key = torch.stack(of_key, -1)[:, None].to(dtype)
        return nn.functional.pad(query, (0, padding)), nn.functional.pad(key, (0, padding))


def t5_buckets(distance: Tensor, buckets: int, farthest: int, both_ways: bool = False) -> Tensor:
    """Return the bucket of query position - key position: exact at first, then logarithmic up to `farthest` tokens.

    With `both_ways`, as in bidirectional attention, half of the buckets are for later keys. Without it, later keys
    share the bucket of distance 0. The logarithm is float32 and truncated, as in the implementations of trained models.
    """
    start = 0
    if both_ways:
        buckets //= 2
        start = buckets * (distance < 0).long()
        distance = distance.abs()
    distance = distance.clamp(min=0)
    exact = buckets // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(farthest / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return start + torch.where(distance < exact, distance.long(), far)


@register_scheme
class T5(DistanceBias):
    """A learned bias for each head and bucket of distances (Raffel et al. 2019, arXiv 1910.10683, section 2.1).

    One table `[num_buckets, heads]` for all layers, zeros at the start. In bidirectional attention, half of the buckets
    are for later keys.
    """

    name = "t5"
    summary = "a learned bias for each head and bucket of distances, shared by the layers"
    paper = "Raffel et al. 2019, arXiv 1910.10683"
    head_sharded_attributes = MappingProxyType({"table": 1})

    num_buckets: int = 32
    """Rows of the table."""
    max_distance: int = 128
    """Distance in tokens from which on all distances share the last bucket."""

    def setup(self) -> None:
        super().setup()
        heads = self.shape.num_heads
        self.num_buckets = check_count(self.name, "num_buckets", self.num_buckets, 4, LARGEST_TABLE // heads)
        least = self.num_buckets
        self.max_distance = check_count(self.name, "max_distance", self.max_distance, least, LARGEST_LENGTH)
        self.table = nn.Parameter(torch.zeros(self.num_buckets, heads))

    def score_bias(self, distance: Tensor, head: Tensor, both_ways: bool = False) -> Tensor:
        return at_least_float32(self.table)[t5_buckets(distance, self.num_buckets, self.max_distance, both_ways), head]

    def bias(self, query: Tensor, key: Tensor, positions: Positions, both_ways: bool = False) -> Tensor | None:
        # Whole rows of the table: its gradient is a sum over pairs, which indexing by head as well makes slow.
        buckets = t5_buckets(positions.distance, self.num_buckets, self.max_distance, both_ways)
        return nn.functional.embedding(buckets, at_least_float32(self.table)).permute(0, 3, 1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        if engine.causal:
            return super().attend(query, key, value, positions, engine)
        check_heads(self, query)
        return engine(query, key, value, positions, bias=cast("T5", _BothWays(self)))


@dataclass
class _BothWays:
    """T5's bias in bidirectional attention."""

    scheme: T5

    def score_bias(self, distance: Tensor, head: Tensor) -> Tensor:
        return self.scheme.score_bias(distance, head, both_ways=True)

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor | None:
        return self.scheme.bias(query, key, positions, both_ways=True)

    @property
    def name(self) -> str:
        return self.scheme.name


KINDS = ("log", "power")


@register_scheme
class Kerple(DistanceBias):
    """A learned kernel of the distance for each head and layer (Chi et al. 2022, arXiv 2205.09921).

    "log": -p ln(1 + a |i - j|); "power": -a |i - j|^p. The authors draw a from U(0, 1) and p from U(0, 2). They clamp a
    and p to at least 0.01, and the power's p to at most 2, in the weights. Here the clamp is in the forward pass, and
    the gradient ignores it.
    """

    name = "kerple"
    summary = "a learned logarithm or power of the distance for each head"
    paper = "Chi et al. 2022, arXiv 2205.09921"
    per_layer = True
    head_sharded_attributes = MappingProxyType({"a": 0, "p": 0})

    kind: Literal["log", "power"] = "log"
    """Which of the two kernels."""

    def setup(self) -> None:
        super().setup()
        check_choice(self.name, "kind", self.kind, KINDS)
        self.a = nn.Parameter(torch.rand(self.shape.num_heads))
        self.p = nn.Parameter(2 * torch.rand(self.shape.num_heads))

    def score_bias(self, distance: Tensor, head: Tensor) -> Tensor:
        a = _cut(self.a, None)[head]
        p = _cut(self.p, 2.0 if self.kind == "power" else None)[head]
        distance = distance.abs().to(a.dtype)
        return -p * torch.log1p(a * distance) if self.kind == "log" else -a * distance**p


def _cut(weight: Tensor, high: float | None, low: float = 0.01) -> Tensor:
    """Clamp a weight and pass the gradient through unclamped, so that a clamped weight can recover."""
    weight = at_least_float32(weight)
    return weight + (weight.clamp(low, high) - weight).detach()


@register_scheme
class Sandwich(DistanceBias):
    """The contribution of sinusoids to the scores: sum_k cos(w_k (i - j)) H / (8 h) for the heads h = 1 .. H
    (Chi et al. 2022, arXiv 2212.10356), w_k = 10000^(-2k / dim). No parameters.
    """

    name = "sandwich"
    summary = "a fixed sum of cosines of the distance, weaker from head to head"
    paper = "Chi et al. 2022, arXiv 2212.10356"
    head_sharded_attributes = MappingProxyType({"strength": 0})

    dim: int = 128
    """Width of the sinusoids, twice the number of cosines; not the width of the head."""

    def setup(self) -> None:
        super().setup()
        dim, heads = self.dim, self.shape.num_heads
        if check_count(self.name, "dim", dim, 2, LARGEST_SANDWICH, remedy="It is even.") % 2:
            raise OptionValueError(f"'sandwich' got dim={quoted(dim)}; dim must be an even number of at least 2.")
        self.frequencies = [10000.0 ** (-2 * k / dim) for k in range(dim // 2)]
        self.strength = [heads / 8 / head for head in range(1, heads + 1)]

    def _strength(self, device: torch.device) -> Tensor:
        return self.constant("strength", device, lambda: torch.tensor(self.strength, dtype=torch.float32, device="cpu"))

    def score_bias(self, distance: Tensor, head: Tensor) -> Tensor:
        # In float32 an angle of thousands of radians has lost its third decimal: whole turns are taken off first.
        coarse = torch.div(distance, TURN_AFTER, rounding_mode="floor")
        fine = distance - coarse * TURN_AFTER
        total = torch.zeros_like(distance, dtype=torch.float32)
        for frequency in self.frequencies:
            total = total + torch.cos(coarse * (TURN_AFTER * frequency % math.tau) + fine * frequency)
        return total * self._strength(distance.device)[head]

    def _waves(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Return cos(p w), then sin(p w), `[batch | 1, n, dim]`; their products sum to the cosines of a difference."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=positions.device)
        angles = positions[..., None].double() * frequencies
        return torch.cat((angles.cos(), angles.sin()), -1).to(dtype)

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor | None:
        strength = self._strength(query.device)[:, None, None]
        if positions.encoded is not None and positions.query.shape[1] == 1 and not torch.compiler.is_compiling():
            distance, make = positions.distance.abs(), partial(self._sums, device=query.device)
            sums = positions.encoded.table(("sandwich", self.dim, query.device), int(distance.max()) + 1, make)
            return strength * sums[distance][:, None]
        at_query, at_key = (self._waves(at, torch.float32) for at in (positions.query, positions.key))
        return strength * (at_query @ at_key.transpose(1, 2))[:, None]

    def _sums(self, count: int, device: torch.device) -> Tensor:
        """Return the sums of cosines at the distances 0 .. count - 1, `[count]`, float32."""
        distance = torch.arange(count, dtype=torch.float64, device="cpu")
        total = torch.zeros_like(distance)
        for frequency in self.frequencies:
            total += torch.cos(distance * frequency)
        return total.float().to(device)

    def bias_as_head_dims(
        self, positions: Positions, scaling: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Return the waves in float32 and float64. Half precision would need three limbs, and their products would be
        wider than the heads that flash kernels support."""
        if dtype not in (torch.float32, torch.float64):
            return None
        strength = torch.tensor(self.strength, dtype=torch.float64, device=positions.query.device) / scaling
        at_query = self._waves(positions.query, torch.float64)[:, None] * strength[:, None, None]
        padding = -at_query.shape[-1] % WIDTH
        at_key = self._waves(positions.key, dtype)[:, None]
        return nn.functional.pad(at_query.to(dtype), (0, padding)), nn.functional.pad(at_key, (0, padding))
