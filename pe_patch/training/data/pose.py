"""Draw positions that skip, so that short sequences train long distances (PoSE, arXiv 2309.10400)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..recipe import RecipeError

Draw = Callable[[int, int], int]
"""Draws an integer from the first argument to the second, both inclusive."""


class Chunks(NamedTuple):
    """A sequence cut into chunks."""

    tokens: np.ndarray
    """Index of each token in its document, `[length]`, from 0, increasing."""
    positions: np.ndarray
    """Position of each token, `[length]`, from 0, increasing, below the target."""
    torn: np.ndarray
    """True where the previous token of the sequence is not the previous token of the document, `[length]`."""


def check(length: int, target: int, chunks: int) -> None:
    """Raise `RecipeError` unless `length` tokens can be cut into `chunks` and spread up to `target`."""
    if length < chunks * chunks or chunks < 2:
        raise RecipeError(
            f"pose.chunks is {chunks}; it must be at least 2, and a sequence of {length} tokens allows at most "
            f"{int(length**0.5)} chunks."
        )
    if target < length:
        raise RecipeError(
            f"pose.target is {target}, below the phase's length of {length}: give a target above the length."
        )


def draw_chunks(length: int, document: int, target: int, chunks: int, draw: Draw) -> Chunks:
    """Cut `length` tokens of a document into chunks with gaps in the text and in the positions.

    As in the paper (section 3.2), the first chunk starts at token 0 and position 0. Each later chunk is shifted by at
    least the shift of the previous one: in the document by up to `document - length` tokens, in positions by up to
    `target - length`, each drawn uniformly. Sizes follow the authors' code, which has two chunks: the first has 1 to
    half of the tokens, rounded up. With more chunks, each but the last has 1 to `length / chunks` tokens, rounded up.

    Args:
        length: tokens of the sequence.
        document: tokens of the document.
        target: upper bound of the positions, exclusive.
        chunks: number of chunks.
        draw: draws integers.
    """
    check(length, target, chunks)
    most = -(-length // chunks)
    sizes = [draw(1, most) for _ in range(chunks - 1)]
    sizes.append(length - sum(sizes))
    texts, skips = (_draw_increasing(room - length, chunks, draw) for room in (document, target))
    place = np.arange(length)
    moved = np.diff(np.repeat(texts, sizes), prepend=0) > 0
    return Chunks(place + np.repeat(texts, sizes), place + np.repeat(skips, sizes), moved)


def _draw_increasing(most: int, count: int, draw: Draw) -> list[int]:
    """Draw `count` integers: 0, and then each from the previous one to `most`."""
    drawn = [0]
    while len(drawn) < count:
        drawn.append(draw(drawn[-1], most))
    return drawn
