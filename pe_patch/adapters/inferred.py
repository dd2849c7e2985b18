"""Hold the adapters that were inferred from a model, for families without a row."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from .adapter import Adapter

INFERRED: weakref.WeakKeyDictionary[nn.Module, Adapter] = weakref.WeakKeyDictionary()
"""The adapter that was inferred for each base model. A row of `ADAPTERS` takes precedence."""
LATEST: weakref.WeakKeyDictionary[type, Adapter] = weakref.WeakKeyDictionary()
"""The adapter that was verified last on a model of each class, which the next model tries first."""


@dataclass(frozen=True)
class RotatingLayers:
    """A value of `Adapter.rotates` for a family whose attentions have no attribute that says whether they rotate."""

    layers: frozenset[int]
    """Indices of the layers that rotate."""

    def __call__(self, attention: Any) -> bool:
        """Return whether this attention rotates."""
        return attention.layer_idx in self.layers


def adapter_row(adapter: Adapter) -> str:
    """Return an adapter as the Python expression that builds it."""
    given = (
        f"{each.name}={getattr(adapter, each.name)!r}"
        for each in fields(adapter)
        if getattr(adapter, each.name) != each.default
    )
    return f"Adapter({', '.join(given)})"
