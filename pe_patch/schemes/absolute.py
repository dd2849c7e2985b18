"""Absolute positions added to the input embeddings, and no positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..core.checks import (
    LARGEST,
    LARGEST_BASE,
    LARGEST_FACTOR,
    check_choice,
    check_length,
    check_number,
    check_table,
    check_window,
)
from ..core.head_slices import SHARED
from ..core.positions import Positions
from ..core.scheme import Scheme
from ..errors import OptionValueError, quoted
from .registry import register_scheme


@register_scheme
class NoPE(Scheme):
    """No positional encoding: the causal mask alone orders the tokens (Kazemnejad et al. 2023, arXiv 2305.19466)."""

    name = "nope"
    mechanism = "none"
    summary = "no positions; the causal mask alone orders the tokens"
    paper = "Kazemnejad et al. 2023, arXiv 2305.19466"
    head_sharded_attributes = SHARED


@register_scheme
class DroPE(NoPE):
    """Rotation dropped from a trained model in every layer (Gelberg et al. 2025, arXiv 2512.12167).

    What is left is `nope` on weights that were trained with positions. It must be recalibrated, which the authors do
    with the language-modelling loss at the trained length (Llama-2-7B: learning rate 1e-4, 10 billion tokens).
    """

    name = "drope"
    summary = "the rotation dropped from a trained model, which is then recalibrated"
    paper = "Gelberg et al. 2025, arXiv 2512.12167"
    head_sharded_attributes = SHARED

    softmax_scale: float = 1.0
    """Factor on all scores, for lengths beyond the trained one. At 1 no layer needs positions, so it works on every
    family."""

    def setup(self) -> None:
        super().setup()
        self.softmax_scale = check_number(
            self.name, "softmax_scale", self.softmax_scale, 0.0, LARGEST_FACTOR, exclusive=True
        )
        self.unused_hooks = frozenset({"encode"}) if self.softmax_scale == 1 else frozenset()

    def encode(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        return query * self.softmax_scale, key


@register_scheme
class Integer(Scheme):
    """The position as a number along one learned direction: x_i += (scale i / N) v, N the trained window.

    A baseline. The value grows with the position, so it is divided by the trained window and reaches `scale` at its
    end. v starts at zero, where the scheme equals `nope`, and must be trained.
    """

    name = "integer"
    mechanism = "absolute"
    summary = "the position as a number along one learned direction"
    paper = "a baseline of old, discussed in Vaswani et al. 2017, arXiv 1706.03762"
    head_sharded_attributes = SHARED
    shift_invariant = False

    scale: float = 1.0
    """The number at the end of the window."""
    original_max_position_embeddings: int | None = None
    """Trained window N in tokens; None for the model's."""

    def setup(self) -> None:
        super().setup()
        given = self.scale
        self.scale = check_number(self.name, "scale", given, -LARGEST)
        if self.scale == 0:
            raise OptionValueError(f"'integer' got scale={quoted(given)}; it is a number other than 0.")
        length = check_window(self.name, "original_max_position_embeddings", self.original_max_position_embeddings)
        self.window = length or self.shape.trained_length
        if self.window < 1:
            raise OptionValueError(
                "'integer' measures positions against the window the model was trained for, and its config does not "
                "say: give original_max_position_embeddings=<tokens>."
            )
        self.direction = nn.Parameter(torch.zeros(self.shape.added_size))

    @property
    def effective_window(self) -> int | None:
        return self.window

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        share = positions[..., None].float() * (self.scale / self.window)
        return hidden + (share * self.direction.float()).to(hidden.dtype)


LAYOUTS = ("interleaved", "concat", "tensor2tensor")


@register_scheme
class Sinusoidal(Scheme):
    """Fixed sines and cosines added to the input embeddings (Vaswani et al. 2017, arXiv 1706.03762, section 3.5)."""

    name = "sinusoidal"
    mechanism = "absolute"
    summary = "fixed sines and cosines added to the input embeddings"
    paper = "Vaswani et al. 2017, arXiv 1706.03762"
    head_sharded_attributes = SHARED
    shift_invariant = False

    theta: float = 10000.0
    """Base of the wavelengths."""
    layout: Literal["interleaved", "concat", "tensor2tensor"] = "interleaved"
    """"interleaved" is the paper's: sin at 2k, cos at 2k + 1. "concat" has all sines, then all cosines, as in
    Transformer-XL. "tensor2tensor" is the same with exponents k / (D / 2 - 1), so that the longest wavelength is
    2 pi theta."""

    def setup(self) -> None:
        super().setup()
        check_choice(self.name, "layout", self.layout, LAYOUTS)
        if self.shape.added_size % 2:
            raise OptionValueError(f"'sinusoidal' pairs dimensions; hidden_size={self.shape.added_size} is odd.")
        self.theta = check_number(self.name, "theta", self.theta, 1.0, LARGEST_BASE, exclusive=True)

    def frequencies(self) -> Tensor:
        """Return radians per token for each pair of dimensions, `[hidden / 2]`, float32."""
        pairs = self.shape.added_size // 2
        last = pairs - 1 if self.layout == "tensor2tensor" else pairs
        exponent = torch.arange(pairs, dtype=torch.float64, device="cpu") / max(last, 1)
        return (self.theta**-exponent).float()

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        angles = positions[..., None].float() * self.constant("frequencies", hidden.device, self.frequencies)
        sin, cos = angles.sin(), angles.cos()
        if self.layout == "interleaved":
            table = torch.stack((sin, cos), dim=-1).flatten(-2)
        else:
            table = torch.cat((sin, cos), dim=-1)
        return hidden + table.to(hidden.dtype)


def extend_hierarchically(table: Tensor, rows: int, alpha: float) -> Tensor:
    """Extend n rows to up to n^2 (Su 2020).

    E'[a n + b] = alpha U[a] + (1 - alpha) U[b] with U = (E - alpha E[0]) / (1 - alpha).

    The first n rows stay what they are.
    """
    count = table.shape[0]
    basis = (table.double() - alpha * table[:1].double()) / (1 - alpha)
    index = torch.arange(rows, device=table.device)
    extended = alpha * basis[index // count] + (1 - alpha) * basis[index % count]
    return torch.cat((table, extended[count:].to(table.dtype)))


def interpolate_rows(table: Tensor, rows: int) -> Tensor:
    """Interpolate the rows linearly and keep both ends (align_corners)."""
    stretched = nn.functional.interpolate(table.double().T[None], size=rows, mode="linear", align_corners=True)
    return stretched[0].T.to(table.dtype)


NEAREST = 1e-3
"""Least distance of alpha from 0.5, where positions collide, and from 1, where the extension divides by zero."""
EXTENSIONS = ("hierarchical", "interpolate")


@register_scheme
class Learned(Scheme):
    """A learned vector for each position, added to the input embeddings (Gehring et al. 2017, arXiv 1705.03122).

    On a model that has such a table (GPT-2, OPT) it starts as that table, lengthened if asked; elsewhere as zeros.
    """

    name = "learned"
    mechanism = "absolute"
    summary = "a learned vector for each position, added to the input embeddings"
    paper = "Gehring et al. 2017, arXiv 1705.03122"
    head_sharded_attributes = SHARED
    shift_invariant = False

    max_positions: int | None = None
    """Rows of the table; None for the model's window."""
    extend: Literal["hierarchical", "interpolate"] | None = None
    """How to make rows beyond those of the model's table; None allows no more rows."""
    alpha: float = 0.4
    """Weight of the coarse position in the hierarchical extension; at 0.5 positions would collide."""

    def setup(self) -> None:
        super().setup()
        rows = check_length(self.name, "max_positions", self.max_positions) or self.shape.trained_length
        if rows < 1:
            raise OptionValueError(
                "'learned' needs max_positions=<tokens>: the model's config does not say its window."
            )
        self.rows = check_table(self.name, "max_positions", rows, self.shape.added_size)
        if self.extend is not None:
            check_choice(self.name, "extend", self.extend, EXTENSIONS)
        self.alpha = check_number(self.name, "alpha", self.alpha, 0.0, 1.0, exclusive=True)
        if abs(self.alpha - 0.5) < NEAREST or 1 - self.alpha < NEAREST:
            raise OptionValueError(f"alpha={self.alpha} must lie in (0, 1) and not be 0.5, where positions collide.")
        self.table = nn.Parameter(torch.zeros(self.rows, self.shape.added_size))

    @property
    def effective_window(self) -> int | None:
        return self.rows

    @property
    def hard_window(self) -> bool:
        return True

    def init_from_table(self, table: Tensor) -> None:
        known, rows = table.shape[0], self.rows
        if rows > known and self.extend is None:
            raise OptionValueError(
                f"The model's table has {known} positions and max_positions={rows} asks for more: say how to make "
                "them, extend='hierarchical' or extend='interpolate'."
            )
        if rows > known * known and self.extend == "hierarchical":
            raise OptionValueError(
                f"The hierarchical extension of {known} positions ends at {known * known}, not {rows}."
            )
        if rows <= known:
            start = table[:rows]
        elif self.extend == "interpolate":
            start = interpolate_rows(table, rows)
        else:
            start = extend_hierarchically(table, rows, self.alpha)
        with torch.no_grad():
            self.table = nn.Parameter(start.detach().clone())

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return hidden + nn.functional.embedding(positions, self.table).to(hidden.dtype)


@register_scheme
class OneHot(Scheme):
    """A projection of the one-hot position, added to the input embeddings: x_i += W e_i.

    Equals a learned table, written as a linear layer: the weight is `[hidden, max_positions]`, as in `nn.Linear`. It
    starts at zero and ignores the model's table; with `keep_native=True` it adds to it.
    """

    name = "one_hot"
    mechanism = "absolute"
    summary = "a linear projection of the one-hot position, added to the input embeddings"
    paper = "Gehring et al. 2017, arXiv 1705.03122, as a projection"
    head_sharded_attributes = SHARED
    shift_invariant = False

    max_positions: int | None = None
    """Length of the one-hot vector in tokens; None for the model's window."""

    def setup(self) -> None:
        super().setup()
        columns = check_length(self.name, "max_positions", self.max_positions) or self.shape.trained_length
        if columns < 1:
            raise OptionValueError(
                "'one_hot' needs max_positions=<tokens>: the model's config does not say its window."
            )
        self.columns = check_table(self.name, "max_positions", columns, self.shape.added_size)
        self.weight = nn.Parameter(torch.zeros(self.shape.added_size, columns))

    @property
    def effective_window(self) -> int | None:
        return self.columns

    @property
    def hard_window(self) -> bool:
        return True

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return hidden + nn.functional.embedding(positions, self.weight.T).to(hidden.dtype)
