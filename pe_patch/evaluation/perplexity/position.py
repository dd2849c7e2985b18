"""The loss by how many tokens stand before the one predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..bench import Bench
from ..results import Row
from .measure import TARGETS, Measure, longest, row, summary

if TYPE_CHECKING:
    from .task import Perplexity

WINDOWS = 8


def position_buckets(losses: np.ndarray) -> list[dict[str, Any]]:
    """Mean loss by position, in buckets that double: `losses` [windows, positions], position 0 has one token before it.

    Each bucket names its first and last position as the number of tokens before the one predicted.
    """
    buckets, first = [], 1
    while first <= losses.shape[1]:
        last = min(2 * first - 1, losses.shape[1])
        part = losses[:, first - 1 : last]
        buckets.append({"first": first, "last": last, "loss": float(part.mean()), "tokens": int(part.size)})
        first = last + 1
    return buckets


def position(task: Perplexity, bench: Bench, length: int) -> Row:
    """The loss of every token of some windows, in one pass; the control is the part within the control length."""
    pieces, where = bench.corpus.spots(longest(bench), TARGETS, task.windows or WINDOWS, bench.seed)
    with bench.timed() as work:
        losses = bench.subject.losses([piece[-length:] for piece in pieces], length - 1)
    inside = min(length, bench.control_length)
    return row(
        bench,
        work,
        length,
        "nats per token, by position",
        summary(bench, losses),
        f"every token but the first of {len(pieces)} windows ({where}) in {bench.corpus.name}, each token weighing the "
        f"same; the control is those at positions below {inside}",
        {"buckets": position_buckets(losses)},
        control=float(losses[:, : inside - 1].mean()),
    )


POSITION = Measure(
    options=frozenset({"windows"}),
    tokens=lambda task, bench, length: (task.windows or WINDOWS) * length,
    row=position,
)
