"""Positions on the grid of patches of a vision encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..core.checks import LARGEST_BASE, check_choice, check_list, check_number
from ..core.head_slices import SHARED
from ..core.positions import Positions
from ..core.scheme import Scheme, check_heads
from ..errors import OptionValueError, UnsupportedError
from .bias import LARGEST_SLOPE, alibi_slopes
from .registry import register_scheme


class GridScheme(Scheme):
    """A scheme whose tokens are at (x, y) on a grid of patches, except for leading tokens such as the class token.

    Coordinates are counted in patches of the trained grid: an image of W columns where the model was trained on W0 is
    read at x W0 / W, which keeps it within what was trained (position interpolation on both axes).
    """

    mechanism = "two-dimensional"

    def setup(self) -> None:
        super().setup()
        if self.shape.grid is None:
            raise UnsupportedError(
                f"{self.name!r} needs a grid of patches, and this model has none: use 'rope' or 'alibi' for text. "
                "For a model that reads both, choose the vision encoder with submodule=."
            )
        self.grid = self.shape.grid

    def lay_out(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        """Return what all layers share for an image of `rows` x `columns` patches.

        The first entry is the (x, y) of all tokens, `[tokens, 2]`, float32, (0, 0) for leading tokens. The second is
        the mask of patches, `[tokens]`.
        """
        trained_rows, trained_columns = self.grid
        y, x = torch.meshgrid(
            torch.arange(rows, device=device).float() * (trained_rows / rows),
            torch.arange(columns, device=device).float() * (trained_columns / columns),
            indexing="ij",
        )
        places = torch.stack((x.flatten(), y.flatten()), -1)
        leading = self.shape.leading_tokens
        patch = torch.arange(leading + len(places), device=device) >= leading
        return torch.cat((places.new_zeros(leading, 2), places)), patch


MODES = {"axial": 100.0, "mixed": 10.0}
"""Modes of `rope_2d`, with the authors' base for each."""


@register_scheme
class RoPE2D(GridScheme):
    """Rotary positions of image patches (Heo et al. 2024, arXiv 2403.13298).

    "axial" rotates the first half of the pairs of a head by x and the second by y, at theta^(-4t / d). "mixed" rotates
    every pair by x f_x + y f_y with frequencies learned for each head and layer; they start at the same magnitudes
    along two perpendicular directions that are random for each head. Pairs are neighbours. The class token does
    not rotate.
    """

    name = "rope_2d"
    summary = "rotates by the row and the column of an image patch, axially or by learned directions"
    paper = "Heo et al. 2024, arXiv 2403.13298"
    per_layer = True
    head_sharded_attributes = cast("Mapping[str, int] | None", SHARED)

    mode: Literal["axial", "mixed"] = "axial"
    """Fixed frequencies along the axes, or learned directions."""
    theta: float | None = None
    """Base of the frequencies; None for 100 (axial) or 10 (mixed)."""

    def setup(self) -> None:
        super().setup()
        mode = check_choice(self.name, "mode", self.mode, MODES)
        theta = MODES[mode] if self.theta is None else self.theta
        self.base = check_number(self.name, "theta", theta, 1.0, LARGEST_BASE, exclusive=True)
        if self.shape.head_dim % 4:
            raise OptionValueError(
                f"'rope_2d' needs a head_dim that four divides, for pairs on two axes; {self.shape.head_dim}."
            )
        if mode == "mixed":
            self.frequencies = nn.Parameter(self.random_directions())
            self.head_sharded_attributes = {"frequencies": 1}  # a proxy could not be copied with the model

    def magnitudes(self) -> Tensor:
        """Return theta^(-4t / d) for t < d / 4, radians per patch, float32."""
        exponent = torch.arange(0, self.shape.head_dim, 4, dtype=torch.float64, device="cpu") / self.shape.head_dim
        return (self.base**-exponent).float()

    def random_directions(self) -> Tensor:
        """Return frequencies along x and y, `[2, heads, head_dim / 2]`: half of them along a random direction for each
        head, half perpendicular to it."""
        along = torch.rand(self.shape.num_heads, 1, device="cpu") * 2 * math.pi
        direction = torch.cat((along, along + math.pi / 2), -1)[..., None]
        magnitudes = self.magnitudes()
        return torch.stack((direction.cos() * magnitudes, direction.sin() * magnitudes)).flatten(2)

    def angles_at(self, places: Tensor) -> Tensor:
        """Return the angles of the pairs for (x, y), `[tokens, 2]`: `[heads | 1, tokens, head_dim / 2]`, float32."""
        if self.mode == "axial":
            magnitudes = self.constant("magnitudes", places.device, self.magnitudes)
            return (places[..., None] * magnitudes).flatten(1)[None]
        return torch.einsum("nc,chk->hnk", places, self.frequencies.float())

    def lay_out(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        places, patch = super().lay_out(rows, columns, device)
        if self.mode == "mixed":
            return places, patch
        angles = self.angles_at(places)
        return places, patch, angles.cos(), angles.sin()

    def encode(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        if self.mode == "axial":
            cos, sin = positions.prepared[2:]
        else:
            check_heads(self, query)
            angles = self.angles_at(positions.prepared[0])
            cos, sin = angles.cos(), angles.sin()
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)
        return rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of `x` `[batch, heads, tokens, head]` by cos, sin `[heads | 1, tokens, head / 2]`."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@register_scheme
class ALiBi2D(GridScheme):
    """A bias of minus slope times the Euclidean distance between two patches (after Press et al. 2022, arXiv
    2108.12409, on a grid as in Fuller et al. 2023, arXiv 2311.00566), the same both ways; none to or from the class
    token.
    """

    name = "alibi_2d"
    summary = "a bias by the Euclidean distance between image patches"
    paper = "Fuller et al. 2023, arXiv 2311.00566"
    head_sharded_attributes = MappingProxyType({"head_slopes": 0})

    slopes: Sequence[float] | None = None
    """One positive number for each head; None for ALiBi's geometric ones."""

    def setup(self) -> None:
        super().setup()
        heads = self.shape.num_heads
        given = alibi_slopes(heads) if self.slopes is None else self.slopes
        self.head_slopes = check_list(self.name, "slopes", given, heads, verb="has", unit="head", high=LARGEST_SLOPE)

    def bias(self, query: Tensor, key: Tensor, positions: Positions) -> Tensor | None:
        check_heads(self, query)
        places, patch = positions.prepared
        rows, columns = positions.query[0], positions.key[0]
        apart = (places[rows][:, None] - places[columns][None]).square().sum(-1).sqrt()
        apart = apart.masked_fill(~(patch[rows][:, None] & patch[columns][None]), 0)
        slopes = self.constant("slopes", query.device, lambda: torch.tensor(self.head_slopes, device="cpu"))
        return -slopes[None, :, None, None] * apart
