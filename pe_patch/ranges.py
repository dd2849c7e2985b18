"""A part of attention: the pairs of a query and a key that share one encoding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .positions import Positions


@dataclass(frozen=True)
class Range:
    """The pairs of a query and a key with `low <= steps of the query - steps of the key < high`, and their encoding.

    Steps are positions unless given; coarser ones (the chunk that a token lies in) make coarser ranges. The ranges of
    one attention share no pair; a pair that is in none of them is not attended. Steps may not fall along a sequence.
    """

    query: Tensor
    """Queries as these pairs see them, `[batch, heads, query, head]`."""
    key: Tensor
    """Keys as these pairs see them, `[batch, key_heads, key, head]`."""
    low: int | None = None
    high: int | None = None
    step_query: Tensor | None = None
    """`[batch | 1, query]`, int64; the positions when None."""
    step_key: Tensor | None = None
    """`[batch | 1, key]`, int64; the positions when None."""
    below: int | None = None
    """Only keys whose position lies below this one (attention sinks)."""

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
        return Range(
            self.query[:, :, start:stop],
            self.key[:, :, :end],
            self.low,
            self.high,
            None if self.step_query is None else self.step_query[:, start:stop],
            None if self.step_key is None else self.step_key[:, :end],
            self.below,
        )
