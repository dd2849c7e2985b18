"""What the tasks of one evaluation share: model, text, seed, controls, clock and the stamps on every row."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.memory import PeakMemory
from pe_patch.evaluation.results import Row
from pe_patch.evaluation.subject import Subject


@dataclass
class Work:
    """What a measurement took."""

    seconds: float = 0.0
    peak_memory: int | None = None
    memory_kind: str = ""


@dataclass
class Bench:
    """Everything a task needs to measure one length."""

    subject: Subject
    corpus: Corpus
    lengths: Sequence[int]
    depths: Sequence[float]
    samples: int
    seed: int
    control_length: int
    scheme: str
    tokenizer_hash: str
    controls: dict[Any, Any] = field(default_factory=dict)
    """Scores at the control length by (task, depth or measure), so that each is measured once for all lengths."""

    @property
    def samples_per_depth(self) -> int:
        """Questions in each cell: `samples` shared out over the depths, rounded up."""
        return -(-self.samples // len(self.depths))

    @contextlib.contextmanager
    def timed(self) -> Iterator[Work]:
        work = Work()
        start = time.perf_counter()
        with PeakMemory(self.subject.device) as peak:
            yield work
        work.seconds, work.peak_memory, work.memory_kind = time.perf_counter() - start, peak.bytes, peak.kind

    def row(self, work: Work, **measured: Any) -> Row:
        """A row with the stamps every row of this evaluation carries."""
        return Row(
            scheme=self.scheme,
            seed=self.seed,
            text_hash=self.corpus.hash,
            tokenizer_hash=self.tokenizer_hash,
            seconds=work.seconds,
            peak_memory=work.peak_memory,
            memory_kind=work.memory_kind,
            **measured,
        )

    def accuracy(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        from pe_patch.evaluation.metrics import RetrievalAccuracy

        return RetrievalAccuracy(keep_in_memory=True).compute(predictions=predictions, references=references) or {}

    def token_loss(self, losses: Sequence[float], groups: Sequence[int]) -> dict[str, Any]:
        from pe_patch.evaluation.metrics import TokenLoss

        metric = TokenLoss(keep_in_memory=True)
        return metric.compute(losses=losses, groups=groups, bytes_per_token=self.corpus.bytes_per_token) or {}
