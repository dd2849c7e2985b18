"""Rotation by positions that depend on the pair of a query and a key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.checks import check_length
from ..core.head_slices import SHARED
from ..core.positions import Positions
from ..core.ranges import Range
from ..core.scheme import check_causal
from ..errors import OptionValueError
from .frequency_wrappers import build_inner
from .rotary import RotaryTransform, Rotation

if TYPE_CHECKING:
    from ..core.encoded_keys import EncodedPass
    from ..core.engine import AttentionEngine, Output


SAMPLED, ROWS = 4096, 64
"""Number of keys and queries of a long sequence to sample when checking whether a scheme changes anything."""


@dataclass(frozen=True)
class Zone:
    """A range of query-key pairs, as in `Range`, and the positions by which the two rotate in it.

    Zones with the same positions tensor share one rotation.
    """

    query: Tensor | None
    """`[batch | 1, query]`; None if queries do not rotate."""
    key: Tensor | None
    """`[batch | 1, key]`; None if keys do not rotate."""
    low: int | None = None
    high: int | None = None
    steps: tuple[Tensor | None, Tensor | None] = (None, None)
    """Steps of queries and keys that `low` and `high` compare; None for positions."""
    below: int | None = None

    def range(
        self,
        rotate_query: RotaryTransform | None = None,
        rotate_key: RotaryTransform | None = None,
        keys: Tensor | None = None,
    ) -> Range:
        """Return the `Range` of this zone with its rotations, or with the rotated keys."""
        return Range(self.low, self.high, *self.steps, self.below, rotate_query, rotate_key, keys)


class Remapped(Rotation):
    """Rotation by positions that depend on the pair, in one softmax; keys are cached as projected.

    A subclass overrides `zones(positions)`, which defines both the computation and `relative_position`.
    """

    mechanism = "remapped"
    own_scores = "ranges"
    training_free = True
    head_sharded_attributes = SHARED

    over: str | Mapping[str, object] | None = None
    """A static rotary scheme that gives frequencies, attention factor and window, a name or a dict with its options;
    None for plain RoPE."""

    def setup(self) -> None:
        super().setup()
        self.inner, self.model_window = build_inner(
            self.name, self.over, self.shape, self.theta, self.original_max_position_embeddings
        )
        if self.inner.length_dependent:
            raise OptionValueError(
                f"{self.name!r} needs fixed frequencies, and {self.inner.name!r} changes them with the length. Give "
                f"{self.inner.name!r} a fixed factor or an expected_length."
            )
        self.base = self.inner.base
        self.trained_window = self.model_window or self.inner.effective_window or self.inner.trained_window
        self._factor: float | None = None

    def zones(self, positions: Positions) -> Sequence[Zone]:
        """Return disjoint zones; a pair outside all of them is not attended."""
        raise NotImplementedError

    def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        return self.inner.frequencies(self.inner.regime_start)

    @property
    def attention_scaling(self) -> float:
        if self._factor is None:  # asked for in every layer
            self._factor = float(self.frequencies()[1])
        return self._factor

    @property
    def softmax_factor(self) -> float:
        return self.inner.softmax_factor

    @property
    def effective_window(self) -> int | None:
        return None

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """Return a factor on each query, `[batch | 1, query]`, float32, or None."""
        return None

    def prepare(self, positions: Positions) -> tuple[Tensor, ...]:
        """Return cos and sin for each distinct tensor of query positions, then of key positions, then the scale.

        If encoded keys are reused, those of the keys are left out.
        """
        zones = self._zones(positions)
        prepared: tuple[Tensor, ...] = ()
        sides = [_distinct([zone.query for zone in zones])]
        if positions.encoded is None:
            sides.append(_distinct([zone.key for zone in zones]))
        for distinct in sides:
            for at in distinct:
                prepared += self.cos_sin(at)
        query_scale = self.query_scale(positions.query)
        return prepared if query_scale is None else (*prepared, query_scale)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        check_causal(self, engine)
        zones, tables = self._zones(positions), positions.prepared
        at_query, at_key = [zone.query for zone in zones], [zone.key for zone in zones]
        middle = 2 * len(_distinct(at_query))
        end = middle if positions.encoded is not None else middle + 2 * len(_distinct(at_key))
        if len(tables) > end:
            query = query * tables[end][:, None, :, None].to(query.dtype)
        of_queries = self._rotations(query.device, at_query, tables[:middle])
        if positions.encoded is not None and not engine.is_specification:
            keys: list[Tensor | None] = self._encoded_keys(key, at_key, positions.encoded, engine)
            ranges = [
                zone.range(of_query, keys=keys[index])
                for index, (zone, of_query) in enumerate(zip(zones, of_queries, strict=True))
            ]
            return engine.ranges(query, key, value, positions, ranges)
        if positions.encoded is not None:
            tables = (*tables[:middle], *(table for at in _distinct(at_key) for table in self.cos_sin(at)))
            end = len(tables)
        kept = positions.kept
        whole = kept is None or positions.encoded is not None  # then the zones are those of the kept keys
        of_keys = tables[middle:end] if whole else tuple(table[:, kept] for table in tables[middle:end])
        rotations = zip(zones, of_queries, self._rotations(query.device, at_key, of_keys), strict=True)
        ranges = [zone.range(of_query, of_key) for zone, of_query, of_key in rotations]
        return engine.ranges(query, key, value, positions, ranges)

    def _zones(self, positions: Positions) -> Sequence[Zone]:
        """Return the zones, which layers share if encoded keys are reused."""
        if positions.encoded is None:
            return self.zones(positions)
        name = ("zones", id(self), positions.key.shape[1], positions.key.device)
        return positions.encoded.once(name, lambda: self.zones(positions))

    def _encoded_keys(
        self, key: Tensor, at_key: Sequence[Tensor | None], encoded: EncodedPass, engine: AttentionEngine
    ) -> list[Tensor | None]:
        """Return the rotated keys of each zone; None where keys stay as they are."""
        distinct, found = _distinct(at_key), []
        for at in at_key:
            if at is None and self.attention_scaling == 1:
                found.append(None)
                continue
            index = _index(at, distinct)

            def encode(new: Tensor, start: int, at: Tensor | None = at, index: int = index) -> Tensor:
                def tables() -> tuple[Tensor, Tensor]:
                    origin = torch.zeros(1, 1, dtype=torch.long, device=new.device)
                    return self.cos_sin(origin if at is None else at[:, start:])

                return self.rotation(*encoded.once((id(self), index, start, key.shape[2], new.device), tables))(new)

            found.append(encoded.keys(key, engine.cache_layer, index, None, encode))
        return found

    @property
    def key_copies(self) -> int:
        origin = torch.zeros(1, 1, dtype=torch.long, device="cpu")
        at_key = [zone.key for zone in self.zones(Positions(origin, origin))]
        return len(_distinct(at_key)) + (any(at is None for at in at_key) and self.attention_scaling != 1)

    def _rotations(
        self, device: torch.device, zone_positions: Sequence[Tensor | None], tables: tuple[Tensor, ...]
    ) -> list[RotaryTransform | None]:
        """Return the rotation of each zone; None for no rotation."""
        distinct = _distinct(zone_positions)
        rotations: list[RotaryTransform | None] = []
        for at in zone_positions:
            index = _index(at, distinct)
            if at is not None:
                rotations.append(self.rotation(*tables[2 * index : 2 * index + 2]))
            elif self.attention_scaling == 1:
                rotations.append(None)
            else:  # no rotation, but the factor stays
                origin = torch.zeros(1, 1, dtype=torch.long, device=device)
                rotations.append(self.rotation(*self.cos_sin(origin)))
        return rotations

    def relative_position(self, length: int) -> Tensor:
        at = torch.arange(length, device="cpu")
        return self._distances(at, at).float()

    def _distances(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the distance by which each query at these positions sees each key, `[query, key]`, float64; NaN if the
        pair is not attended."""
        positions, ahead = Positions(query[None], key[None]), key > query[:, None]
        result = torch.full(ahead.shape, torch.nan, dtype=torch.float64, device="cpu")
        for zone in self.zones(positions):
            at_query = torch.zeros_like(query) if zone.query is None else zone.query[0]
            at_key = torch.zeros_like(key) if zone.key is None else zone.key[0]
            distance = at_query[:, None].double() - at_key.double()
            covered = zone.range().covers(positions)[0] & ~ahead
            result = torch.where(covered, distance, result)
        return result

    def differs_within(self, length: int) -> bool:
        """Return whether anything is encoded otherwise than by the other scheme in a sequence of `length` tokens.

        Distances are compared for some pairs, evenly spread from the first token to the last.
        """
        theirs, their_factor = self.inner.frequencies(self.inner.regime_start)
        ours, factor = self.frequencies()
        if factor != their_factor or not torch.equal(ours, theirs):
            return True
        key = torch.linspace(0, length - 1, min(length, SAMPLED), dtype=torch.float64, device="cpu").long()
        query = key[:: max(1, len(key) // ROWS)]
        query = torch.cat((query, key[-1:]))
        query_scale = self.query_scale(query[None])
        if query_scale is not None and bool((query_scale != 1).any()):
            return True
        plain = (query[:, None] - key).double()
        return not torch.equal(self._distances(query, key)[plain >= 0], plain[plain >= 0])

    def tokens(self, option: str, value: object, default: int) -> int:
        """Return the value of an option that counts tokens, from 1 to the trained window."""
        given = check_length(self.name, option, value)
        if given is not None and given > self.trained_window:
            raise OptionValueError(
                f"{self.name!r} got {option}={given}, and the frequencies are good for {self.trained_window} tokens "
                f"only; give at most {self.trained_window}."
            )
        return max(1, default) if given is None else given


def _index(tensor: Tensor | None, tensors: Sequence[Tensor]) -> int:
    """Return the index of this very tensor in `tensors`, or their number."""
    return next((index for index, other in enumerate(tensors) if other is tensor), len(tensors))


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the distinct objects among `tensors` in order."""
    distinct: list[Tensor] = []
    for tensor in tensors:
        if tensor is not None and _index(tensor, distinct) == len(distinct):
            distinct.append(tensor)
    return distinct
