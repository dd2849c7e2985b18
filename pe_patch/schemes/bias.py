"""Additive biases on the scores that depend on the distance and the head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..positions import Positions
from ..scheme import AttentionShape, DistanceBias

if TYPE_CHECKING:
    from ..attention import Core

WIDTH = 8
"""Head widths stay multiples of this many dimensions, which GPU kernels ask for."""

LIMBS: dict[torch.dtype, tuple[tuple[torch.dtype, ...], int, int, tuple[float, ...]]] = {
    # dtype: dtypes that cut the slope, base and number of a position's limbs, weights of the limbs of their products
    torch.float64: ((torch.float64,), 2**24, 1, (1.0,)),
    torch.float32: ((torch.bfloat16, torch.float32), 2**12, 2, (1.0,)),
    torch.bfloat16: ((torch.bfloat16, torch.bfloat16), 2**8, 3, (1.0, 1.0)),
    torch.float16: ((torch.float16, torch.float16), 2**11, 2, (2.0**11, 1.0)),
}


def position_limbs(positions: Tensor, base: int, count: int) -> list[Tensor]:
    """Digits of integers to a base, the lowest first, each with the sign of the whole; the last takes what is left."""
    limbs = []
    for _ in range(count - 1):
        limbs.append(torch.fmod(positions, base))
        positions = torch.div(positions, base, rounding_mode="trunc")
    return [*limbs, positions]


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 t / p) for the largest power of two p <= heads; for the other heads every other slope of 2p heads."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * t / power) for t in range(1, power + 1)]
    return slopes + [2.0 ** (-4 * t / power) for t in range(1, 2 * (heads - power), 2)]


class ALiBi(DistanceBias):
    """Bias -m_h (i - j), steeper for some heads than for others (Press et al. 2021, arXiv 2108.12409).

    Options:
        slopes: one positive number for each query head; the paper's when None.
    """

    name = "alibi"
    summary = "a penalty on the scores that grows linearly with the distance"
    paper = "Press et al. 2021, arXiv 2108.12409"
    widens_heads = True

    def __init__(self, shape: AttentionShape, *, slopes: Sequence[float] | None = None) -> None:
        super().__init__(shape)
        self.slopes = [float(slope) for slope in (alibi_slopes(shape.num_heads) if slopes is None else slopes)]
        if len(self.slopes) != shape.num_heads or not all(0 < slope < math.inf for slope in self.slopes):
            raise OptionError(
                f"slopes needs {shape.num_heads} positive numbers, one for each query head; got {slopes}."
            )

    def _slopes(self, device: torch.device) -> Tensor:
        return self.constant("slopes", device, lambda: torch.tensor(self.slopes, dtype=torch.float32, device="cpu"))

    def of(self, distance: Tensor, head: Tensor) -> Tensor:
        return -self._slopes(distance.device)[head] * distance.abs()

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor | None:
        # By the key's position alone, as BLOOM has it: each row differs from the distance form by a constant, which
        # the softmax does not see, and under a causal mask no key lies ahead.
        return self._slopes(query.device)[:, None, None] * positions.key[:, None, None, :]

    def reach(self, query: Tensor, key: Tensor, positions: Positions, core: Core) -> list[int] | None:
        return core.reaches(query, key, positions, self._slopes(query.device))

    def features(self, positions: Positions, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """slope j - slope i as a sum of exact products.

        Neither a position beyond 256 nor most slopes are bfloat16 numbers, so both are cut into limbs that are. The
        query's own term is subtracted although the softmax ignores it, right after its counterpart: sums stay small,
        where float32 is fine.
        """
        cuts, base, count, weights = LIMBS[dtype]
        origin = positions.query[:, -1:]
        of_query, of_key = [], []
        at_query = [limb[:, None, :] for limb in position_limbs(positions.query - origin, base, count)]
        at_key = position_limbs(positions.key - origin, base, count)
        rest = torch.tensor(self.slopes, dtype=torch.float64, device=origin.device)[None, :, None] / scaling
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
