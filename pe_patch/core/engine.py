"""What a scheme may ask for once queries, keys and values are projected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .head_slices import Heads
from .positions import Positions
from .ranges import Range

if TYPE_CHECKING:
    from .scheme import Scheme

Output = tuple[Tensor, Tensor | None]
"""Of an attention: `[batch, query, heads, head]`, and the weights `[batch, heads, query, key]` where they exist."""


class AttentionEngine(Protocol):
    """The attention of one layer in one pass, as `Scheme.attend` gets it. A scheme never sees Transformers.

    Tensors are query `[batch, heads, query, head]`, key and value `[batch, key_heads, key, head]`.
    """

    module: Any
    """The attention module that called."""
    mask: Tensor | None
    """`[batch | 1, 1, query, key]`, boolean or additive; None for a plain causal pass."""
    scaling: float
    """Factor on the products of queries and keys."""
    dropout: float
    backend: Any
    extra: dict[str, Any]
    """What the family hands to its attention beside the tensors: soft cap, sinks, sliding window."""
    heads: Heads | None
    """Which heads of the model these are; None for all of them."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme | None = None
    ) -> Output:
        """Compute attention with the bias of a scheme, if one is given, added to the scaled scores."""
        ...

    @property
    def causal(self) -> bool:
        """Return whether a query sees no key ahead of it where no mask says so."""
        ...

    @property
    def layer(self) -> int:
        """Return the index of the layer, from 0."""
        ...

    def after_rotation(self, x: Tensor) -> Tensor:
        """Normalise queries or keys that were rotated at the scores, where the family does so after its rotation."""
        ...

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Return which keys each query may see, `[batch | 1, 1, query, key]`, bool."""
        ...

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return scaled scores in float32 or wider, `[batch, heads, query, key]`, soft-capped where the family is."""
        ...

    def weights(self, scores: Tensor) -> Tensor:
        """Mask and normalise scores, `[batch, heads, query, key]`."""
        ...

    def mix(self, scores: Tensor, value: Tensor) -> Output:
        """Mask and normalise scores, and mix the values by them."""
        ...

    def rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        scores: Callable[[Tensor, Tensor, Positions, Any], Tensor],
        also: Callable[[Tensor, Positions], Tensor] | None = None,
    ) -> Output:
        """Compute attention by the scheme's own scores, for what needs whole rows of them.

        Args:
            scores: `scores(query, key, positions, engine)` returns `[batch, heads, query, key]`, float32, for some of
                the queries and all keys that they may see.
            also: `also(weights, positions)` returns what is added to the output, `[batch, heads, query, head]`.
        """
        ...

    def ranges(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, ranges: Sequence[Range]
    ) -> Output:
        """Compute one softmax over ranges of distance that differ in how they encode queries and keys."""
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
        """Compute attention with scores `scaling ((q_i + u) k_j + (q_i + v) r)`; return None if no kernel can.

        Args:
            u: `[heads, head]`, float32.
            v: `[heads, head]`, float32.
            vectors: returns r for distances i - j, `[heads, distances, head]`, float32.
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
        """Compute attention in which each block of `size` queries sees queries and keys as `change` returns them;
        return None if no kernel can."""
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
        """Compute attention with vectors `[bound + 1, head]`, float32, added to keys and values by a distance that
        stops at the bound; return None if no kernel can."""
        ...

    def where(self, condition: Tensor, first: Output, second: Output) -> Output:
        """Return one or the other output for each query; condition `[batch, query, 1, 1]`."""
        ...

    def host(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Output:
        """Call Transformers' own attention function."""
        ...
