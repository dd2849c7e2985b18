"""The same last tokens at every length: the only measure that tells more context from other tokens."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from ..bench import Bench
from ..results import Row
from .measure import TARGETS, Measure, control, longest, row, summary, within

if TYPE_CHECKING:
    from .task import Perplexity

SPOTS = 64


def fixed(task: Perplexity, bench: Bench, length: int) -> Row:
    """The loss of the last tokens of pieces of `length` tokens; the control shortens what is before them."""
    targets = within(bench, "targets", task.targets, TARGETS)
    pieces, where = bench.corpus.spots(longest(bench), targets, task.spots or SPOTS, bench.seed)

    def loss(context: int) -> float:
        shorter = bench.subject.losses([piece[-context:] for piece in pieces], targets)
        return summary(bench, shorter)["loss"]

    with bench.timed() as work:
        losses = bench.subject.losses([piece[-length:] for piece in pieces], targets)
    found = summary(bench, losses)
    name = hashlib.sha256(np.stack([piece[-targets:] for piece in pieces]).tobytes()).hexdigest()[:12]
    return row(
        bench,
        work,
        length,
        "nats per token, fixed targets",
        found,
        f"the same last {targets} tokens of {len(pieces)} spots ({where}) in {bench.corpus.name}, "
        f"{length - targets} tokens before them, each token weighing the same",
        {"targets": targets, "spots": len(pieces), "targets_hash": name},
        control=control(task, bench, length, "fixed", found["loss"], lambda: loss(bench.control_length)),
        without_context=bench.once(bench.key(task, "fixed", "bare"), lambda: loss(targets + 1)),
    )


FIXED = Measure(
    options=frozenset({"targets", "spots"}),
    tokens=lambda task, bench, length: (task.spots or SPOTS) * length,
    row=fixed,
)
