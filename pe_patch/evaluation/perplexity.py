"""How well the next token is predicted: three ways to measure it, each saying which tokens it scored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from pe_patch.errors import OptionError, PePatchError, unknown
from pe_patch.evaluation.bench import Bench, Outcome, Piece
from pe_patch.evaluation.results import Row
from pe_patch.evaluation.subject import Subject

TARGETS = 128
STRIDE = 256


@dataclass(frozen=True)
class Perplexity:
    """Mean loss in nats per token, by up to three measures.

    `fixed`: the same last `targets` tokens of `spots` pieces of text at every length, with all that fits before them.
    Only this one tells "makes use of more context" from "other tokens". `targets=None` is 128, or half of the shortest
    length where that is less.
    `sliding`: every token of a stretch of text, once, in windows that move by `stride` tokens (None: 256, or half of
    the shortest length where that is less); `stretch_tokens` are scored in all.
    `position`: the loss of every token of `windows` pieces by its position, in buckets that double.
    """

    measures: Sequence[str] = ("fixed", "sliding", "position")
    targets: int | None = None
    spots: int = 64
    stride: int | None = None
    stretch_tokens: int = 8192
    windows: int = 8

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "loss on the same last tokens for every length, in a sliding window, and by position"
    paper: ClassVar[str] = "token-weighted sliding window as in the Transformers documentation"
    retrieves: ClassVar[bool] = False
    depends_on_lengths: ClassVar[bool] = True
    """The same tokens are scored at every length: how many, follows from the shortest and the longest."""

    def __post_init__(self) -> None:
        # a list would make the task unhashable, and tasks are keys of the controls
        object.__setattr__(self, "measures", tuple(self.measures))
        for measure in self.measures:
            if measure not in _MEASURES:
                raise unknown("measure of perplexity", measure, _MEASURES)
        for option in ("targets", "spots", "stride", "stretch_tokens", "windows"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"{option} must be at least 1, got {value}.")

    def pieces(self, bench: Bench, length: int) -> Iterator[Piece]:
        """One piece for each measure."""
        windows = {
            "fixed": self.spots,
            "sliding": -(-self.stretch_tokens // self.resolved_stride(bench)),
            "position": self.windows,
        }
        for measure in self.measures:
            yield Piece(measure, windows[measure] * length, partial(self._measure, measure, bench, length))

    def _measure(self, measure: str, bench: Bench, length: int) -> Outcome:
        return Outcome([_MEASURES[measure](self, bench, length)])

    def resolved_targets(self, bench: Bench) -> int:
        shortest = min(*bench.lengths, bench.control_length)
        if self.targets is not None and self.targets >= shortest:
            raise PePatchError(f"targets={self.targets} leaves no context at length {shortest}; give fewer.")
        return self.targets or max(1, min(TARGETS, shortest // 2))

    def resolved_stride(self, bench: Bench) -> int:
        shortest = min(*bench.lengths, bench.control_length)
        if self.stride is not None and self.stride >= shortest:
            raise PePatchError(f"stride={self.stride} leaves no context at length {shortest}; give a smaller one.")
        return self.stride or max(1, min(STRIDE, shortest // 2))


def sliding_losses(subject: Subject, ids: np.ndarray, window: int, stride: int) -> np.ndarray:
    """The loss of every token of a text but the first, each once, with up to `window` - 1 tokens before it.

    `ids` [n] gives [n - 1] losses in nats. The first window scores all of its tokens; each further one is moved by
    `stride` (the last by what is left) and scores only its newest. `stride` is less than `window`.
    """
    window = min(window, len(ids))
    starts = list(range(stride, len(ids) - window + 1, stride))
    first = subject.losses([ids[:window]], window - 1)[0]
    middle = subject.losses([ids[start : start + window] for start in starts], stride).ravel() if starts else first[:0]
    rest = len(ids) - window - stride * len(starts)
    last = subject.losses([ids[len(ids) - window :]], rest)[0] if rest else first[:0]
    return np.concatenate([first, middle, last])


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


def _fixed(task: Perplexity, bench: Bench, length: int) -> Row:
    targets = task.resolved_targets(bench)
    pieces, where = bench.corpus.spots(_longest(bench), targets, task.spots, bench.seed)
    with bench.timed() as work:
        losses = bench.subject.losses([piece[-length:] for piece in pieces], targets)
    found = _summary(bench, losses)

    def control() -> float:
        shorter = bench.subject.losses([piece[-bench.control_length :] for piece in pieces], targets)
        return _summary(bench, shorter)["loss"]

    def bare() -> float:
        alone = bench.subject.losses([piece[-targets - 1 :] for piece in pieces], targets)
        return _summary(bench, alone)["loss"]

    name = hashlib.sha256(np.stack([piece[-targets:] for piece in pieces]).tobytes()).hexdigest()[:12]
    return _row(
        (task, bench, work, length),
        "nats per token, fixed targets",
        found,
        _control(task, bench, length, "fixed", found["loss"], control),
        f"the same last {targets} tokens of {len(pieces)} spots ({where}) in {bench.corpus.name}, "
        f"{length - targets} tokens before them",
        {"targets": targets, "spots": len(pieces), "targets_hash": name},
        bench.once(bench.key(task, "fixed", "bare"), bare),
    )


def _sliding(task: Perplexity, bench: Bench, length: int) -> Row:
    stride, size = task.resolved_stride(bench), max(_longest(bench), min(task.stretch_tokens, 4 * _longest(bench)))
    stretches, where = bench.corpus.spots(size, size, max(1, task.stretch_tokens // size), bench.seed)
    with bench.timed() as work:
        losses = np.stack([sliding_losses(bench.subject, ids, length, stride) for ids in stretches])
    # One group per stride: the few stretches there are would give no interval.
    groups = np.arange(losses.shape[1]) // stride + np.arange(len(stretches))[:, None] * losses.shape[1]
    found = _summary(bench, losses, groups)

    def control() -> float:
        shorter = [sliding_losses(bench.subject, ids, bench.control_length, stride) for ids in stretches]
        return _summary(bench, np.stack(shorter))["loss"]

    return _row(
        (task, bench, work, length),
        "nats per token, sliding window",
        found,
        _control(task, bench, length, "sliding", found["loss"], control),
        f"every token of {len(stretches)} stretches of {size} tokens ({where}) in {bench.corpus.name}, "
        f"window {length}, stride {stride}, each token weighing the same",
        {"stride": stride, "stretches": len(stretches), "stretch": size},
    )


def _position(task: Perplexity, bench: Bench, length: int) -> Row:
    pieces, where = bench.corpus.spots(_longest(bench), TARGETS, task.windows, bench.seed)
    with bench.timed() as work:
        losses = bench.subject.losses([piece[-length:] for piece in pieces], length - 1)
    within = losses[:, : min(length, bench.control_length) - 1]
    return _row(
        (task, bench, work, length),
        "nats per token, by position",
        _summary(bench, losses),
        float(within.mean()),
        f"every token but the first of {len(pieces)} windows ({where}) in {bench.corpus.name}; the control is those at "
        f"positions below {min(length, bench.control_length)}",
        {"buckets": position_buckets(losses)},
    )


_MEASURES = {"fixed": _fixed, "sliding": _sliding, "position": _position}


def _longest(bench: Bench) -> int:
    return max(*bench.lengths, bench.control_length)


def _summary(bench: Bench, losses: np.ndarray, groups: np.ndarray | None = None) -> dict[str, Any]:
    if groups is None:
        groups = np.repeat(np.arange(len(losses)), losses.shape[1])
    return bench.token_loss(losses.ravel().tolist(), groups.ravel().tolist())


def _control(task: Perplexity, bench: Bench, length: int, measure: str, loss: float, measured: Any) -> float:
    """The loss on the same tokens within the native window, measured once for all lengths."""
    if length < bench.control_length:
        return loss
    return bench.once(
        bench.key(task, measure, "within"), lambda: loss if length == bench.control_length else measured()
    )


def _row(
    measurement: tuple[Perplexity, Bench, Any, int],
    measure: str,
    found: dict[str, Any],
    control: float,
    measured_on: str,
    details: dict[str, Any],
    without_context: float | None = None,
) -> Row:
    task, bench, work, length = measurement
    return bench.row(
        work,
        task=task.name,
        measure=measure,
        length=length,
        tokens=length,
        depth=None,
        score=found["loss"],
        low=found["low"],
        high=found["high"],
        samples=found["tokens"],
        control=control,
        control_length=min(length, bench.control_length),
        without_context=without_context,
        measured_on=measured_on,
        details={"perplexity": found["perplexity"], "bits_per_byte": found["bits_per_byte"], **details},
    )
