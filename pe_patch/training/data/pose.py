"""Positions that skip, so that short sequences train the distances of long ones (PoSE, arXiv 2309.10400)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..recipe import RecipeError

Draw = Callable[[int, int], int]
"""A whole number from the first argument to the second, both included."""


class Chunks(NamedTuple):
    """A sequence in chunks: which tokens of its document it has, at which positions, and where chunks start."""

    tokens: np.ndarray
    """[length], from 0, rising."""
    positions: np.ndarray
    """[length], from 0, rising, below the target."""
    torn: np.ndarray
    """Boolean [length]: what stands before this token in the sequence is not what stands before it in the document."""


def check(length: int, target: int, chunks: int) -> None:
    """Raise `RecipeError` unless `length` tokens can be cut and spread so."""
    if length < chunks * chunks or chunks < 2:
        raise RecipeError(
            f"pose.chunks is {chunks}: it must be at least 2, and a sequence of {length} tokens can be cut into "
            f"{int(length**0.5)} chunks at most."
        )
    if target < length:
        raise RecipeError(f"pose.target is {target}, below the phase's length of {length}: no position could skip.")


def draw_chunks(length: int, document: int, target: int, chunks: int, draw: Draw) -> Chunks:
    """Cut `length` tokens of a document of `document` tokens into chunks that lie apart in it and in their positions.

    As in the paper (section 3.2) the first chunk starts at token 0 and position 0, and each further one is moved on by
    as much as the one before or more: in the document by up to `document - length` tokens, in positions by up to
    `target - length`, each drawn uniformly. The sizes are drawn as in the authors' code, which has two chunks: the
    first has 1 to half of the tokens, rounded up; with more chunks, each but the last 1 to its equal part.
    """
    check(length, target, chunks)
    most = -(-length // chunks)
    sizes = [draw(1, most) for _ in range(chunks - 1)]
    sizes.append(length - sum(sizes))
    texts, skips = (_rising(room - length, chunks, draw) for room in (document, target))
    place = np.arange(length)
    moved = np.diff(np.repeat(texts, sizes), prepend=0) > 0
    return Chunks(place + np.repeat(texts, sizes), place + np.repeat(skips, sizes), moved)


def _rising(most: int, count: int, draw: Draw) -> list[int]:
    """0, and then each at least the one before and at most `most`."""
    found = [0]
    while len(found) < count:
        found.append(draw(found[-1], most))
    return found
