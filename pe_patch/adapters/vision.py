"""Describe vision encoders: their patches and their table of positions, and the function that replaces it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@dataclass(frozen=True)
class VisionEncoder:
    """How a vision encoder turns an image into tokens: leading tokens first, then patches row by row."""

    table: str
    """Path of the parameter with the learned positions, from the embeddings module."""
    leading_tokens: int = 1
    """Number of tokens before the patches: the class token, and registers."""
    embeddings: str = "embeddings"
    """Attribute of the base model: the module that turns an image into tokens and adds the table to them.

    Its method `interpolate_pos_encoding` gives the table for an image of another size than the trained one.
    """

    def patch(self, config: Any) -> tuple[int, int]:
        """Return the height and width of a patch in pixels."""
        return _pair(config.patch_size)

    def grid(self, config: Any) -> tuple[int, int]:
        """Return the rows and columns of patches of an image of the trained size."""
        (height, width), (down, across) = _pair(config.image_size), self.patch(config)
        return height // down, width // across

    def native_table(self, base: nn.Module) -> nn.Parameter:
        """Return the parameter with the learned positions."""
        return attrgetter(f"{self.embeddings}.{self.table}")(base)


def zero_positions(embeddings: Any, inner: Callable[..., Tensor], tokens: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return a zero in place of the looked-up table, `[1, 1, 1]`."""
    return tokens.new_zeros(1, 1, 1)
