"""The attention engine: the operations that a scheme can use once queries, keys and values are projected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from .head_slices import Heads
from .positions import Positions
from .ranges import Range

if TYPE_CHECKING:
    from .scheme import Scheme

Output = tuple[Tensor, Tensor | None]
"""Attention output `[batch, query, heads, head]`, and the weights `[batch, heads, query, key]` or None."""


class AttentionEngine(Protocol):
    """The attention of one layer in one forward pass. `Scheme.attend` receives it; schemes never import Transformers.

    Shapes: query `[batch, heads, query, head]`, key and value `[batch, key_heads, key, head]`.
    """

    module: nn.Module
    """The attention module that runs."""
    mask: Tensor | None
    """Attention mask `[batch | 1, 1, query, key]`, boolean or additive; None for a plain causal pass."""
    scaling: float
    """Factor on the dot products of queries and keys."""
    dropout: float
    """Dropout probability of the attention weights in training."""
    backend: object
    """The `Backend` that computes the attention."""
    extra: dict[str, object]
    """Further keyword arguments of the family's attention: soft cap, sinks, sliding window."""
    heads: Heads | None
    """The range of the model's heads that this process holds; None for all of them."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme | None = None
    ) -> Output:
        """Compute attention, and add the bias of the scheme `bias`, if given, to the scaled scores."""
        ...

    @property
    def causal(self) -> bool:
        """Return whether attention without a mask is causal."""
        ...

    @property
    def is_specification(self) -> bool:
        """Return whether this is eager attention, the specification, which reuses nothing."""
        ...

    @property
    def cache_layer(self) -> int | None:
        """Return the index of the layer in its cache, as far as the family's module says."""
        ...

    @property
    def layer(self) -> int:
        """Return the index of the layer, counted from 0."""
        ...

    def after_rotation(self, x: Tensor) -> Tensor:
        """Normalize rotated queries or keys if the family does so after its rotation; else return them unchanged."""
        ...

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the boolean mask of the keys that each query attends to, `[batch | 1, 1, query, key]`."""
        ...

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return scaled scores `[batch, heads, query, key]` in float32 or wider, soft-capped if the family does so."""
        ...

    def weights(self, scores: Tensor) -> Tensor:
        """Mask the scores and apply softmax; return weights `[batch, heads, query, key]`."""
        ...

    def softmax_and_mix(self, scores: Tensor, value: Tensor) -> Output:
        """Mask the scores, apply softmax and dropout, and multiply the weights by the values."""
        ...

    def rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        scores: Callable[[Tensor, Tensor, Positions, AttentionEngine], Tensor],
        extra_output: Callable[[Tensor, Positions], Tensor] | None = None,
    ) -> Output:
        """Compute attention from scores that the scheme computes row by row.

        Args:
            scores: `scores(query, key, positions, engine)` returns float32 scores `[batch, heads, query, key]` for a
                chunk of the queries and all keys that they attend to.
            extra_output: `extra_output(weights, positions)` returns a term `[batch, heads, query, head]` to add to the
                output.
        """
        ...

    def ranges(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, ranges: Sequence[Range]
    ) -> Output:
        """Compute one softmax over ranges of distance, each with its own encoding of queries and keys."""
        ...

    def relative(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        u: Tensor,
        v: Tensor,
        vectors: Callable[[Tensor], Tensor],
    ) -> Output | None:
        """Compute attention with scores `scaling ((q_i + u) k_j + (q_i + v) r)`; return None if no kernel supports it.

        Args:
            u: `[heads, head]`, float32.
            v: `[heads, head]`, float32.
            vectors: returns r `[heads, distances, head]`, float32, for the distances i - j.
        """
        ...

    def one_query(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute the attention of one query with a bias on its scaled scores; return None if no kernel supports it.

        Args:
            bias: `[batch | 1, heads, 1, key]`, float32 or wider.

        Returns:
            The output `[batch, heads, 1, head]`, and the log-sum-exp of the scores, `[batch, heads, 1]`.
        """
        ...

    def blocks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        size: int,
        change: Callable[[Tensor, Tensor, Positions], tuple[Tensor, Tensor]],
    ) -> Output | None:
        """Compute attention in blocks of `size` queries, each with the queries and keys that `change` returns.

        Returns:
            The output, or None if no kernel supports it.
        """
        ...

    def clipped(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        on_keys: Tensor,
        on_values: Tensor | None,
    ) -> Output | None:
        """Compute attention with vectors added to keys and values, indexed by the distance clipped at a bound.

        Args:
            on_keys: `[bound + 1, head]`, float32.
            on_values: `[bound + 1, head]`, float32; None to leave the values unchanged.

        Returns:
            The output, or None if no kernel supports it.
        """
        ...

    def where(self, condition: Tensor, first: Output, second: Output) -> Output:
        """Select `first` or `second` for each query by `condition` `[batch, query, 1, 1]`."""
        ...

    def native_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Output:
        """Call the attention function of Transformers."""
        ...
