"""A part of attention: the pairs of a query and a key that share one encoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from .positions import Positions


class Turn(Protocol):
    """A linear change of each query, or of each key, by where it stands."""

    def __call__(self, x: Tensor) -> Tensor:
        """`x` `[batch, heads, length, head]` changed."""
        ...

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of what was changed, from that of the result."""
        ...

    def part(self, start: int, stop: int) -> Turn:
        """The same for the places `start` to `stop`."""
        ...


@dataclass(frozen=True)
class Range:
    """The pairs of a query and a key with `low <= steps of the query - steps of the key < high`, and their encoding.

    Steps are positions unless given; coarser ones (the chunk that a token lies in) make coarser ranges. The ranges of
    one attention share no pair; a pair that is in none of them is not attended. Steps may not fall along a sequence.
    """

    low: int | None = None
    high: int | None = None
    step_query: Tensor | None = None
    """`[batch | 1, query]`, int64; the positions when None."""
    step_key: Tensor | None = None
    """`[batch | 1, key]`, int64; the positions when None."""
    below: int | None = None
    """Only keys whose position lies below this one (attention sinks)."""
    turn_query: Turn | None = None
    """What becomes of the queries here; they stay when None."""
    turn_key: Turn | None = None

    def steps(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Steps of queries and of keys, `[batch | 1, query]` and `[batch | 1, key]`."""
        query = positions.query if self.step_query is None else self.step_query
        return query, positions.key if self.step_key is None else self.step_key

    def covers(self, positions: Positions) -> Tensor:
        """Which pairs are in this range, `[batch | 1, query, key]`, bool."""
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

    def part(self, start: int, stop: int, end: int) -> Range:
        """The same for queries `start` to `stop` and keys up to `end`."""
        return replace(
            self,
            step_query=None if self.step_query is None else self.step_query[:, start:stop],
            step_key=None if self.step_key is None else self.step_key[:, :end],
            turn_query=None if self.turn_query is None else self.turn_query.part(start, stop),
            turn_key=None if self.turn_key is None else self.turn_key.part(0, end),
        )

    def turned(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as these pairs see them."""
        return (
            query if self.turn_query is None else self.turn_query(query),
            key if self.turn_key is None else self.turn_key(key),
        )
