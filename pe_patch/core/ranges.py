"""Ranges of query-key pairs that share one encoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from .positions import Positions


class PositionTransform(Protocol):
    """A linear transform of each query, or of each key, that depends on its position."""

    def __call__(self, x: Tensor) -> Tensor:
        """Transform `x`, `[batch, heads, length, head]`."""
        ...

    def back(self, grad: Tensor) -> Tensor:
        """Return the gradient of the input, given that of the output."""
        ...

    def slice_tokens(self, start: int, stop: int) -> PositionTransform:
        """Return the transform of the tokens `start` to `stop`."""
        ...


@dataclass(frozen=True)
class Range:
    """The pairs with `low <= step of the query - step of the key < high`, and their encoding.

    Steps are positions by default. Coarser steps, such as the index of a token's chunk, give coarser ranges. The ranges
    of one attention are disjoint, and a pair outside all of them is not attended. Steps must not decrease along a
    sequence.
    """

    low: int | None = None
    high: int | None = None
    step_query: Tensor | None = None
    """`[batch | 1, query]`, int64; None for the positions."""
    step_key: Tensor | None = None
    """`[batch | 1, key]`, int64; None for the positions."""
    below: int | None = None
    """Include only keys at positions below this one (attention sinks)."""
    rotate_query: PositionTransform | None = None
    """Transform of the queries in this range; None for none."""
    rotate_key: PositionTransform | None = None
    keys: Tensor | None = None
    """The keys after `rotate_key`, `[batch, key_heads, key, head]`, if they are known already."""

    def steps(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return the steps of queries and keys, `[batch | 1, query]` and `[batch | 1, key]`."""
        query = positions.query if self.step_query is None else self.step_query
        return query, positions.key if self.step_key is None else self.step_key

    def covers(self, positions: Positions) -> Tensor:
        """Return the mask of pairs in this range, `[batch | 1, query, key]`, bool."""
        query, key = self.steps(positions)
        steps = query[:, :, None] - key[:, None, :]
        inside = steps == steps
        if self.low is not None:
            inside = inside & (steps >= self.low)
        if self.high is not None:
            inside = inside & (steps < self.high)
        if self.below is not None:
            inside = inside & (positions.key[:, None, :] < self.below)
        return inside

    def slice_pairs(self, start: int, stop: int, end: int) -> Range:
        """Return the range restricted to the queries `start` to `stop` and the keys before `end`."""
        return replace(
            self,
            step_query=None if self.step_query is None else self.step_query[:, start:stop],
            step_key=None if self.step_key is None else self.step_key[:, :end],
            rotate_query=None if self.rotate_query is None else self.rotate_query.slice_tokens(start, stop),
            rotate_key=None if self.rotate_key is None else self.rotate_key.slice_tokens(0, end),
            keys=None if self.keys is None else self.keys[:, :, :end],
        )

    def rotated_key(self, key: Tensor) -> Tensor:
        """Return the keys for the pairs of this range."""
        if self.keys is not None:
            return self.keys
        return key if self.rotate_key is None else self.rotate_key(key)

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Transform queries and keys for the pairs of this range."""
        return (
            query if self.rotate_query is None else self.rotate_query(query),
            self.rotated_key(key),
        )
