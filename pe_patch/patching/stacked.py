"""Two schemes on the scores of one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from ..core.positions import Positions
from ..core.scheme import AttentionShape, Scheme

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine


@dataclass
class Stacked:
    """One scheme that encodes queries and keys before another that works on the scores.

    It is how a rotation is added to a family's own ALiBi; nothing else stacks.
    """

    encoder: Scheme
    scorer: Scheme
    calls_modules: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{self.encoder.name} + {self.scorer.name}"

    @property
    def shape(self) -> AttentionShape:
        return self.encoder.shape

    @property
    def shares_heads(self) -> bool:
        return self.encoder.shares_heads and self.scorer.shares_heads

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of both."""
        return chain(self.encoder.parameters(), self.scorer.parameters())

    def __call__(self, hook: str, *arguments: Any) -> Any:
        return getattr(self, hook)(*arguments)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine) -> Any:
        """The encoder's attention, through the scorer's."""
        through = cast("AttentionEngine", _Through(engine, self.scorer))
        return self.encoder("attend", query, key, value, positions, through)


@dataclass
class _Through:
    """A engine whose attention is that of a further scheme."""

    engine: AttentionEngine
    scorer: Scheme

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Any = None) -> Any:
        return self.scorer("attend", query, key, value, positions, self.engine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)
