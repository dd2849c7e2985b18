"""Apply two schemes at the scores of one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from ..core.positions import Positions
from ..core.scheme import AttentionShape, Scheme

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine, Output


@dataclass
class Stacked:
    """Two schemes in one layer: the first encodes queries and keys, the second acts on their scores.

    A rotation is added to a family's native ALiBi in this way. No other schemes stack.
    """

    encoder: Scheme
    """The scheme that encodes queries and keys."""
    scorer: Scheme
    """The scheme that acts on their scores."""
    calls_modules: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The names of both schemes, for messages."""
        return f"{self.encoder.name} + {self.scorer.name}"

    @property
    def shape(self) -> AttentionShape:
        """Sizes of the layer."""
        return self.encoder.shape

    @property
    def shares_heads(self) -> bool:
        return self.encoder.shares_heads and self.scorer.shares_heads

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of both schemes."""
        return chain(self.encoder.parameters(), self.scorer.parameters())

    def __call__(self, hook: str, *arguments: Any) -> Any:
        """Call a hook by its name."""
        return getattr(self, hook)(*arguments)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        """Return the attention of the encoder, which calls that of the scorer."""
        through = cast("AttentionEngine", _SchemeEngine(engine, self.scorer))
        return self.encoder("attend", query, key, value, positions, through)


@dataclass
class _SchemeEngine:
    """An engine that computes attention by the `attend` of another scheme."""

    engine: AttentionEngine
    scorer: Scheme

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Any = None) -> Any:
        return self.scorer("attend", query, key, value, positions, self.engine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)
