"""Base classes of rotary schemes, which rotate before the cache or at the scores. `scalings.py` has the schemes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from ..core.checks import LARGEST_BASE, check_number, check_window
from ..core.head_slices import SHARED
from ..core.positions import Positions
from ..core.scheme import Scheme, causal_distance, overrides
from ..errors import OptionValueError, UnsupportedError

if TYPE_CHECKING:
    from ..core.encoded_keys import EncodedPass
    from ..core.engine import AttentionEngine, Output


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, start: int = 0, interleaved: bool = False, arithmetic: str = "model"
) -> Tensor:
    """Rotate the pairs of `x`, `[batch, heads, length, head]`, by angles given as cos and sin `[batch | 1, length, r]`.

    Both have the family's own layout over r = rotary_dim; dimensions outside `[start, start + r)` pass through. The
    dtypes (`scheme.ARITHMETIC`) and the order of operations are Transformers', so that equal angles give equal bits.
    """
    width = cos.shape[-1]
    rotated = _product(x if width == x.shape[-1] else x[..., start : start + width], cos, sin, interleaved, arithmetic)
    if width == x.shape[-1]:
        return rotated
    return torch.cat((x[..., :start], rotated, x[..., start + width :]), dim=-1)


def _product(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, arithmetic: str) -> Tensor:
    """Rotate all dimensions of `x`, and return the result in its dtype."""
    dtype = x.dtype
    if arithmetic == "complex":
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        rotation = torch.complex(cos[..., ::2].float(), sin[..., ::2].float())
        return torch.view_as_real(pairs * rotation.unsqueeze(1)).flatten(-2).to(dtype)
    table = torch.float32 if arithmetic == "float32 tables" else dtype
    cos, sin = cos.to(table).unsqueeze(1), sin.to(table).unsqueeze(1)
    if arithmetic == "float32":
        x = x.float()
    if interleaved:
        other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        other = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
    return (x * cos + other * sin).to(dtype)


def cos_sin(
    angles: Tensor, factor: float | Tensor, dtype: torch.dtype, interleaved: bool, polar: bool = False
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of `angles` `[..., r / 2]` over r dimensions, times `factor`, in `dtype`; computed in float32.

    `polar` takes them from `torch.polar`, as families with a complex product do.
    """
    if polar:
        rotation = torch.polar(torch.ones_like(angles), angles) * factor
        cos, sin = (part.repeat_interleave(2, dim=-1) for part in (rotation.real, rotation.imag))
        return cos.to(dtype), sin.to(dtype)
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


@dataclass(frozen=True)
class RotaryTransform:
    """A rotation of queries or keys, with cos and sin `[batch | 1, length, r]`."""

    cos: Tensor
    sin: Tensor
    start: int = 0
    interleaved: bool = False
    arithmetic: str = "model"

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate `x` `[batch, heads, length, head]`, in its own dtype."""
        return rotate(x, self.cos, self.sin, self.start, self.interleaved, self.arithmetic)

    def back(self, grad: Tensor) -> Tensor:
        """Rotate gradients the other way; the factor on cos and sin stays."""
        return rotate(grad, self.cos, -self.sin, self.start, self.interleaved, self.arithmetic)

    def slice_tokens(self, start: int, stop: int) -> RotaryTransform:
        """Return the rotation of the tokens `start` to `stop`; a single angle applies to all tokens."""
        if self.cos.shape[1] == 1:
            return self
        return replace(self, cos=self.cos[:, start:stop], sin=self.sin[:, start:stop])


GROWTH = 2.0
"""Ratio of two consecutive length regimes."""
REGIMES = 24
REGIME = "regime"
"""Name under which a pass keeps the regime of each row, if one regime holds for all its queries."""


class Rotation(Scheme):
    """A scheme that rotates pairs of dimensions by position times frequency; subclasses choose the positions.

    Tables are plain float32 tensors, computed on first use on each device. They are not buffers: casting the model
    cannot round them, and loading cannot leave them uninitialised.
    """

    mechanism = "rotary"
    head_sharded_attributes = SHARED

    theta: float | None = None
    """Base of the frequencies; None for the model's."""
    original_max_position_embeddings: int | None = None
    """Trained window L in tokens; None for the model's."""

    def setup(self) -> None:
        super().setup()
        given = self.shape.rope_theta if self.theta is None else self.theta
        remedy = "It is the base of the frequencies."
        self.base = check_number(self.name, "theta", given, 1.0, LARGEST_BASE, exclusive=True, remedy=remedy)
        option = "original_max_position_embeddings"
        length = check_window(self.name, option, self.original_max_position_embeddings)
        self.trained_window = self.shape.trained_length if length is None else length
        self.dim = self.shape.rotary_dim
        self.longest_expected: int | None = None
        if self.dim < 2 or self.dim % 2:
            raise OptionValueError(
                f"{self.name!r} rotates pairs of dimensions, so it needs an even number of them; this attention has "
                f"rotary_dim={self.dim} (head_dim={self.shape.head_dim})."
            )
        if self.trained_window < 1:
            raise OptionValueError(
                f"{self.name!r} needs to know the window the model was trained for, and its config does not say: "
                "give original_max_position_embeddings=<tokens>."
            )
        self._tables: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        self._static_factor = 1.0

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        """Return inverse frequencies and the factor on cos and sin for a sequence of `length` tokens.

        Args:
            length: in tokens; None for the trained window. Static schemes ignore it.

        Returns:
            `[rotary_dim / 2]` in radians per token, float32, and a number.
        """
        raise NotImplementedError

    @property
    def softmax_factor(self) -> float:
        """Return M, whose square DeepSeek's families multiply their softmax scale by."""
        return 1.0

    @property
    def changes_nothing(self) -> bool:
        """Return whether these options give plain RoPE with the model's base at every length."""
        return False

    @property
    def inv_freq(self) -> Tensor:
        """Return inverse frequencies at the trained window, `[rotary_dim / 2]`, float32."""
        return self.frequencies(self.regime_start)[0]

    @property
    def attention_scaling(self) -> float:
        """Return the factor on cos and sin at the trained window; scores scale by its square."""
        return float(self.frequencies(self.regime_start)[1])

    @property
    def effective_window(self) -> int | None:
        return self.trained_window

    @property
    def regime_start(self) -> int:
        """Return the length in tokens up to which the frequencies do not change."""
        return max(self.trained_window, self.longest_expected or 0)

    def plain_frequencies(
        self, theta: float | None = None, stretch: float | Tensor = 1.0, pairs: int | None = None
    ) -> Tensor:
        """Return 1 / (stretch theta^(2k / r)) for the first `pairs` k, all r / 2 if None; float32.

        The order of operations is Transformers', which must be matched bit for bit: torch computes powers in vectors of
        eight and the rest one by one, so slicing or dividing afterwards would round differently.
        """
        count = self.dim if pairs is None else 2 * pairs
        exponent = torch.arange(0, count, 2, dtype=torch.int64, device="cpu").float() / self.dim
        return 1.0 / (stretch * (self.base if theta is None else theta) ** exponent)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, `[batch | 1, length, r]`, float32, of positions `[batch | 1, length]`, if static."""
        inv_freq, factor = self._table("static", positions.device, [self.regime_start])
        return self._tables_of(positions[..., None].float() * inv_freq[0], factor[0])

    def _tables_of(self, angles: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin times `factor`, `[batch | 1, length, r]`, of `angles` `[batch | 1, length, r / 2]`."""
        polar = self.shape.arithmetic == "complex"
        return cos_sin(angles, factor, torch.float32, self.shape.interleaved, polar)

    def rotation(self, cos: Tensor, sin: Tensor) -> RotaryTransform:
        """Return the rotation of this attention's queries or keys with given tables."""
        return RotaryTransform(cos, sin, self.shape.rotary_start, self.shape.interleaved, self.shape.arithmetic)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate queries or keys `[batch, heads, length, head]` with float32 tables; the dtype stays."""
        return self.rotation(cos, sin)(x)

    def _table(self, kind: str, device: torch.device, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Return frequencies `[lengths, r / 2]` and factors `[lengths]` on a device, cached."""
        entry = self._tables.get((kind, device))
        if entry is None:
            rows = [self.frequencies(length) for length in lengths]
            inv_freq = torch.stack([row[0] for row in rows]).float().to(device)
            factor = torch.tensor([float(row[1]) for row in rows], dtype=torch.float32, device="cpu").to(device)
            self._static_factor = float(rows[0][1])
            entry = self._tables[(kind, device)] = (inv_freq, factor)
        return entry


class Rotary(Rotation):
    """Rotation of every query and key by its own position (Su et al. 2021, arXiv 2104.09864).

    A subclass overrides `frequencies(length)`. Length-dependent schemes cache unrotated keys. A first pass uses the
    frequencies for its document's length. A cached token uses the smallest length on a geometric grid (`regime`) that
    contains its position, for itself and its keys.
    """

    head_sharded_attributes = SHARED

    def relative_position(self, length: int) -> Tensor:
        return causal_distance(length)

    @property
    def rotates_early(self) -> bool:
        return not self.length_dependent and not self._acts_on_scores(Rotary)

    @property
    def changes_nothing(self) -> bool:
        if not self.rotates_early or self.scorer is not None:
            return False
        inv_freq, factor = self.frequencies(self.regime_start)
        return factor == 1 and torch.equal(inv_freq, self.plain_frequencies(self.shape.rope_theta))

    def angles(self, positions: Tensor) -> tuple[Tensor, float] | None:
        inv_freq, _ = self._table("static", positions.device, [self.regime_start])
        return positions[..., None].float() * inv_freq[0], self._static_factor

    def regime(self, length: int) -> int:
        """Return the length whose frequencies a first pass over a document of `length` tokens uses."""
        return max(length, self.regime_start)

    def prepare(self, positions: Positions) -> tuple[Tensor, ...]:
        """Return the regime of each query, then cos and sin of queries and keys for each regime in use."""
        if not self.length_dependent or positions.length is None:
            inv_freq, factor = self._table("static", positions.query.device, [self.regime_start])
            return self._rotations(positions, inv_freq[None], factor[None], inv_freq[None], factor[None])
        if positions.fresh:
            return self._prepare_first_pass(positions, positions.length)
        assert isinstance(positions.length, Tensor)
        return self._prepare_cached(positions, positions.length)

    def _prepare_first_pass(self, positions: Positions, length: Tensor | int) -> tuple[Tensor, ...]:
        if isinstance(length, torch.SymInt) or (isinstance(length, Tensor) and torch.compiler.is_exporting()):
            raise UnsupportedError(
                f"{self.name!r} follows the length of the sequence, which torch.export does not know here: export with "
                "a fixed length and without attention_mask and position_ids, or use a scheme with a fixed factor."
            )
        if isinstance(length, int):  # read from a shape, so that a compiler can follow
            length, known = torch.full_like(positions.query, length), [length]
            which = torch.zeros_like(length)
        else:
            distinct, which = length.unique(return_inverse=True)
            known = distinct.tolist()
        rows = [self.frequencies(self.regime(int(n))) for n in known]
        inv_freq = torch.stack([row[0] for row in rows]).float().to(length.device)[which]
        factor = torch.tensor([float(row[1]) for row in rows], dtype=torch.float32, device=length.device)[which]
        surplus = positions.key.shape[1] - inv_freq.shape[1]  # empty slots of a static cache, hidden by the mask
        inv_key = torch.cat((inv_freq, inv_freq[:, -1:].expand(-1, surplus, -1)), 1) if surplus else inv_freq
        factor_key = torch.cat((factor, factor[:, -1:].expand(-1, surplus)), 1) if surplus else factor
        return self._rotations(positions, inv_freq, factor, inv_key, factor_key)

    def _prepare_cached(self, positions: Positions, length: Tensor) -> tuple[Tensor, ...]:
        grid, (inv_freq, factor) = self._grid(length.device)
        level = torch.bucketize(length, torch.tensor(grid, device=length.device)).clamp(max=REGIMES - 1)
        first = level.amin(dim=1)
        more = int((level - first[:, None]).max()) if level.shape[1] > 1 else 0
        prepared: tuple[Tensor, ...] = (level - first[:, None],)
        if positions.encoded is not None:
            if more == 0:
                regime = positions.encoded.once(REGIME, lambda: tuple(first.tolist()))
                at = torch.tensor(regime, device=length.device)[:, None]
                angles = positions.query[..., None].float() * inv_freq[at]
                return *prepared, *self._tables_of(angles, factor[at][..., None])
        for step in range(more + 1):
            at = (first + step).clamp(max=REGIMES - 1)[:, None]
            prepared += self._rotations(positions, inv_freq[at], factor[at], inv_freq[at], factor[at])[1:]
        return prepared

    def _grid(self, device: torch.device) -> tuple[list[int], tuple[Tensor, Tensor]]:
        """Return the lengths of the regimes, and their frequencies `[regimes, r / 2]` and factors `[regimes]`."""
        grid = [int(self.regime_start * GROWTH**step) for step in range(REGIMES)]
        return grid, self._table("grid", device, grid)

    def _rotations(
        self, positions: Positions, inv_query: Tensor, factor_query: Tensor, inv_key: Tensor, factor_key: Tensor
    ) -> tuple[Tensor, ...]:
        """Return an empty regime index, then cos and sin of queries and keys, `[batch | 1, length, r]`, float32."""
        sides = ((positions.query, inv_query, factor_query), (positions.key, inv_key, factor_key))
        tables: list[Tensor] = [positions.query[:, :0]]
        for position, inv_freq, factor in sides:
            tables += self._tables_of(position[..., None].float() * inv_freq, factor[..., None])
        return tuple(tables)

    def _rotate_both(
        self, query: Tensor, key: Tensor, tables: tuple[Tensor, ...], kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        cos_query, sin_query, cos_key, sin_key = tables
        if kept is not None:
            cos_key, sin_key = cos_key[:, kept], sin_key[:, kept]
        return self.rotate(query, cos_query, sin_query), self.rotate(key, cos_key, sin_key)

    def encode(self, query: Tensor, key: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        return self._rotate_both(query, key, positions.prepared[1:5], positions.kept)

    @property
    def key_copies(self) -> int:
        own = type(self).attend is not Rotary.attend or type(self).prepare is not Rotary.prepare
        return int(self.length_dependent and not own)

    def _encoded_keys(self, key: Tensor, positions: Positions, encoded: EncodedPass, engine: AttentionEngine) -> Tensor:
        """Return the rotated keys, most of which earlier passes rotated."""
        regime = cast("tuple[int, ...]", encoded.once(REGIME, tuple))
        _, (inv_freq, factor) = self._grid(positions.key.device)

        def encode(new: Tensor, start: int) -> Tensor:
            def tables() -> tuple[Tensor, Tensor]:
                at = torch.tensor(regime, device=positions.key.device)[:, None]
                angles = positions.key[:, start:, None].float() * inv_freq[at]
                return self._tables_of(angles, factor[at][..., None])

            name = (id(self), start, positions.key.shape[1], positions.key.device)
            return engine.after_rotation(self.rotate(new, *encoded.once(name, tables)))

        if engine.is_specification:
            return encode(key, 0)
        return encoded.keys(key, engine.cache_layer, "rotated", regime, encode)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        choice, tables = positions.prepared[0], positions.prepared[1:]
        bias = self if overrides(self, "bias") else None
        if positions.encoded is not None and len(tables) == 2:
            rotated_query = engine.after_rotation(self.rotate(query, *tables))
            return engine(
                rotated_query, self._encoded_keys(key, positions, positions.encoded, engine), value, positions, bias
            )
        output = None
        for step in range(len(tables) // 4):  # more than one where the queries of a chunk straddle a threshold
            rotated = self._rotate_both(query, key, tables[4 * step : 4 * step + 4], positions.kept)
            rotated = engine.after_rotation(rotated[0]), engine.after_rotation(rotated[1])
            other = engine(*rotated, value, positions, bias)
            output = other if output is None else engine.where((choice == step)[:, :, None, None], other, output)
        assert output is not None
        return output


Factor = float | Literal["auto"]


def to_rope_parameters(scheme: Rotary, rope_type: str, **values: Any) -> dict[str, Any]:
    """Return Transformers' `rope_parameters` with the base and, if only a part of each head rotates, its share."""
    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": scheme.base, **values}
    width, head = scheme.shape.rotary_dim, scheme.shape.head_dim
    if width < head and scheme.shape.rotary_start == 0:  # DeepSeek's config counts its trailing slice as a whole head
        part = width / head
        # Transformers truncates head x part, which may fall just short of a whole number
        parameters["partial_rotary_factor"] = part if int(head * part) == width else math.nextafter(part, 1.0)
    return parameters


class Scaled(Rotary):
    """A scaling by one factor s, the target window over the trained one.

    A subclass overrides `scaled(factor)` for s > 1. At s = 1 the frequencies are the plain ones, bit for bit. With
    `factor="auto"` s follows the length of the sequence in powers of two of the trained window, so decoding rarely
    changes the regime.
    """

    auto_allowed: ClassVar[bool] = True

    factor: Factor
    """s >= 1, the target window over the trained one; or "auto"."""

    def setup(self) -> None:
        super().setup()
        self.fixed_factor = self.read_factor()
        self.auto = self.fixed_factor is None

    def read_factor(self) -> float | None:
        """Check the option `factor` and return it, or None if s follows the length of the sequence."""
        if self.auto_allowed and isinstance(self.factor, str) and self.factor == "auto":
            return None
        remedy = "Give the target window over the trained one" + (', or "auto".' if self.auto_allowed else ".")
        return check_number(self.name, "factor", self.factor, 1.0, remedy=remedy)

    def scaled(self, factor: float) -> tuple[Tensor, float]:
        """Return inverse frequencies and attention factor for s = `factor` > 1."""
        raise NotImplementedError

    def unscaled(self) -> tuple[Tensor, float]:
        """Return inverse frequencies and attention factor for s = 1."""
        return self.plain_frequencies(), 1.0

    def factor_at(self, length: int | None) -> float:
        """Return s for a sequence of `length` tokens."""
        return (
            self.regime(length or self.trained_window) / self.trained_window
            if self.fixed_factor is None
            else self.fixed_factor
        )

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        factor = self.factor_at(length)
        return self.scaled(factor) if factor > 1 else self.unscaled()

    def regime(self, length: int) -> int:
        if not self.auto:
            return super().regime(length)
        reached = self.regime_start
        while reached < length:
            reached = int(reached * GROWTH)
        return reached

    @property
    def length_dependent(self) -> bool:
        return self.auto

    @property
    def effective_window(self) -> int | None:
        return None if self.fixed_factor is None else int(self.fixed_factor * self.trained_window)

    def native(self) -> dict[str, object] | None:
        if self.fixed_factor is None:
            return None
        if self.fixed_factor == 1 and self.unscaled()[1] == 1:
            return to_rope_parameters(self, "default")
        return self.native_scaled(self.fixed_factor)

    def native_scaled(self, factor: float) -> dict[str, object] | None:
        """Return Transformers' `rope_parameters` for a fixed s > 1, or None if it has no such type."""
        return None
