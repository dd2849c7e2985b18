"""What the tasks of one evaluation share: model, text, seed, controls, clock, journal and the stamps on every row."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..data.packaged import __version__
from .corpus import Corpus
from .journal import Journal, key_of
from .memory import PeakMemory
from .prompts import Frame
from .results import Row
from .retrieval import encode
from .subject import Subject


@dataclass
class Work:
    """What a measurement took."""

    seconds: float = 0.0
    peak_memory: int | None = None
    memory_kind: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a piece of work found: its rows, and every answer behind them (JSON-able)."""

    rows: Sequence[Row]
    answers: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Piece:
    """The smallest part of an evaluation that is done or not done; a stopped run goes on with the next one."""

    name: str
    """Different from the other pieces' of the same task and length."""
    tokens: int
    """About how many the model will be given, for the progress bar."""
    measure: Callable[[], Outcome]


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
    model_hash: str = ""
    frame: Frame = field(default_factory=Frame)
    journal: Journal = field(default_factory=Journal)

    @property
    def samples_per_depth(self) -> int:
        """Questions in each cell: `samples` shared out over the depths, rounded up."""
        return -(-self.samples // len(self.depths))

    def prompt(self, text: str, answer_prefix: str = "") -> np.ndarray:
        """The ids [n] of a prompt as the model is given it, with its special tokens or in its chat template.

        `answer_prefix` is the beginning of the answer that is given with the question.
        """
        return self.frame.ids(self.subject.tokenizer, text, answer_prefix)

    def encode(self, text: str) -> np.ndarray:
        """The ids [n] of a text without special tokens; cached, so treat them as read-only."""
        return encode(self.subject.tokenizer, text)

    def count(self, text: str) -> int:
        """How many tokens a text has, special ones not counted."""
        return len(self.encode(text))

    def key(self, task: Any, *names: Any) -> str:
        """The name of everything that a measurement depends on; `names` tell those of one task apart."""
        return key_of(
            version=__version__,
            model=self.model_hash,
            scheme=self.scheme,
            precision=str(self.subject.autocast),
            tokenizer=self.tokenizer_hash,
            text=self.corpus.hash,
            frame=asdict(self.frame),
            seed=self.seed,
            samples=self.samples,
            depths=list(self.depths),
            control_length=self.control_length,
            lengths=list(self.lengths) if getattr(task, "depends_on_lengths", False) else None,
            task=[type(task).__name__, task.name, repr(task)],
            names=list(names),
        )

    def once(self, key: str, measured: Callable[[], Any]) -> Any:
        """What several rows share, such as a control (JSON-able): measured once, and kept in the journal."""
        entry = self.journal.get(key)
        if entry is None:
            entry = {"value": measured()}
            self.journal.put(key, entry)
        return entry["value"]

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

    def token_loss(self, losses: Sequence[float], groups: Sequence[int]) -> dict[str, Any]:
        from .metrics import TokenLoss

        metric = TokenLoss(keep_in_memory=True)
        return metric.compute(losses=losses, groups=groups, bytes_per_token=self.corpus.bytes_per_token) or {}
