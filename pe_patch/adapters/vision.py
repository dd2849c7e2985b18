"""Towers that read images: where their table of positions is, and what stands in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@dataclass(frozen=True)
class Tower:
    """How a tower turns an image into tokens: patches row by row, after its leading tokens."""

    table: str
    """The learned positions, a parameter below the embeddings."""
    leading_tokens: int = 1
    """Tokens before the patches: the class token, and registers."""
    embeddings: str = "embeddings"
    """The module on the base model that makes tokens of an image and adds the table to them.

    It looks the table up with `interpolate_pos_encoding` for images of a size that it was not trained on.
    """

    def patch(self, config: Any) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair(config.patch_size)

    def grid(self, config: Any) -> tuple[int, int]:
        """Rows and columns of patches of an image of the trained size."""
        (height, width), (down, across) = _pair(config.image_size), self.patch(config)
        return height // down, width // across

    def native_table(self, base: nn.Module) -> nn.Parameter:
        """The learned positions themselves."""
        return attrgetter(f"{self.embeddings}.{self.table}")(base)


def no_table(embeddings: Any, inner: Callable[..., Tensor], tokens: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands where the table was looked up, and adds nothing."""
    return tokens.new_zeros(1, 1, 1)
