"""What the measures of perplexity have in common: their options, their summary, their control and their row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import PePatchError
from ..bench import Bench, Work
from ..results import Row

if TYPE_CHECKING:
    from .task import Perplexity

TARGETS = 128
STRIDE = 256


@dataclass(frozen=True)
class Measure:
    """One way to measure: the options it looks at, about how many tokens it reads, and how it makes its row.

    The row is None where there was nothing to score.
    """

    options: frozenset[str]
    tokens: Callable[[Perplexity, Bench, int], int]
    row: Callable[[Perplexity, Bench, int], Row | None]


def shortest(bench: Bench) -> int:
    """The shortest context that anything is measured at."""
    return min(*bench.lengths, bench.control_length)


def longest(bench: Bench) -> int:
    """The longest context that anything is measured at."""
    return max(*bench.lengths, bench.control_length)


def within(bench: Bench, option: str, given: int | None, default: int) -> int:
    """An option in tokens that has to be less than every length; None is the default, or half of the shortest."""
    bound = shortest(bench)
    if given is not None and given >= bound:
        raise PePatchError(f"{option}={given} leaves no context at length {bound}; give fewer than {bound}.")
    return given or max(1, min(default, bound // 2))


def summary(bench: Bench, losses: np.ndarray, groups: np.ndarray | None = None) -> dict[str, Any]:
    """Mean, interval and bits per byte of losses [groups, tokens], or of losses [tokens] with the group of each."""
    if groups is None:
        groups = np.repeat(np.arange(len(losses)), losses.shape[1])
    return bench.token_loss(losses.ravel().tolist(), groups.ravel().tolist())


def control(
    task: Perplexity, bench: Bench, length: int, measure: str, loss: float, measured: Callable[[], float]
) -> float:
    """The loss on the same tokens within the native window, measured once for all lengths."""
    if length < bench.control_length:
        return loss
    return bench.once(
        bench.key(task, measure, "within"), lambda: loss if length == bench.control_length else measured()
    )


def row(
    bench: Bench,
    work: Work,
    length: int,
    measure: str,
    found: dict[str, Any],
    measured_on: str,
    details: dict[str, Any],
    *,
    control: float | None = None,
    without_context: float | None = None,
) -> Row:
    """The row of a measure whose score is a loss in nats per token; `found` is what `summary` gives."""
    return bench.row(
        work,
        task="perplexity",
        measure=measure,
        length=length,
        tokens=length,
        depth=None,
        score=found["loss"],
        low=found["low"],
        high=found["high"],
        samples=found["tokens"],
        control=control,
        control_length=None if control is None else min(length, bench.control_length),
        without_context=without_context,
        measured_on=measured_on,
        details={"perplexity": found["perplexity"], "bits_per_byte": found["bits_per_byte"], **details},
    )
