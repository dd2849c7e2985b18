"""Everything that the tasks of one evaluation share, and the units of work that they divide it into."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..data.packaged import __version__
from ..errors import OptionError
from .corpus import Corpus, whole_ids
from .journal import Journal, key_of
from .memory import PeakMemory
from .model import EvaluatedModel, Work
from .results import Row
from .retrieval import encode, start_ids

_PLACEHOLDER = "\N{SYMBOL FOR START OF TEXT}"


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a prompt: the tokenizer's chat template, or nothing."""

    head: str = ""
    """Text before the prompt."""
    tail: str = ""
    """Text between the prompt and the start of the answer."""
    chat: bool = False
    bos: bool | None = None
    """Start every window and prompt with BOS. None does as the tokenizer does, and in a chat as the template does."""

    @classmethod
    def of(cls, tokenizer: Any, chat: bool, bos: bool | None = None) -> PromptTemplate:
        """Split the tokenizer's chat template at the user's message; without `chat`, return an empty template.

        Raises:
            OptionError: `chat` is True and the tokenizer has no usable chat template, or `bos` is True and it has no
                BOS token.
        """
        start_ids(tokenizer, bos)
        if not chat:
            return cls(bos=bos)
        if not getattr(tokenizer, "chat_template", None):
            raise OptionError("chat=True needs a tokenizer with a chat template; this one has none. Use chat=False.")
        message = [{"role": "user", "content": _PLACEHOLDER}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        head, placeholder, tail = text.partition(_PLACEHOLDER)
        if not placeholder:
            raise OptionError(
                "chat=True cannot use this tokenizer's chat template: its output does not contain the user's message. "
                "Use chat=False."
            )
        if bos is not None and (token := tokenizer.bos_token):
            head = (token if bos else "") + head.removeprefix(token)
        return cls(head, tail, chat=True, bos=bos)

    def without_chat(self) -> PromptTemplate:
        """Return the template of a task that does without a chat template."""
        return PromptTemplate(bos=self.bos)

    def start_ids(self, tokenizer: Any) -> np.ndarray:
        """Return the ids [n] that every window of a loss starts with: BOS, or none."""
        return start_ids(tokenizer, self.bos)

    def head_ids(self, tokenizer: Any) -> np.ndarray:
        """Return the ids [n] that every prompt starts with: the head of the chat, or BOS, or none."""
        return encode(tokenizer, self.head) if self.chat else self.start_ids(tokenizer)

    def ids(self, tokenizer: Any, text: str, answer_prefix: str = "") -> np.ndarray:
        """Return the ids [n] of a prompt that ends where the answer starts.

        Raises:
            PePatchError: The tokenizer drops part of the text.
        """
        if self.chat:
            return whole_ids(tokenizer, f"{self.head}{text}{self.tail}{answer_prefix}")
        return np.concatenate([self.start_ids(tokenizer), whole_ids(tokenizer, text + answer_prefix)])


@dataclass
class ResourceUsage:
    """Time and memory of a measurement."""

    seconds: float = 0.0
    peak_memory: int | None = None
    """Bytes."""
    memory_kind: str = ""


@dataclass(frozen=True)
class Outcome:
    """The rows of a unit of work, and every answer behind them (JSON-able)."""

    rows: Sequence[Row]
    answers: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class WorkUnit:
    """The smallest part of an evaluation that the journal records. A stopped run continues with the next unit."""

    name: str
    """Unique among the units of one task and length."""
    work: Work
    """Approximate work, for the progress. A dry run counts it exactly."""
    measure: Callable[[], Outcome]


@dataclass
class EvaluationContext:
    """Model, text, settings and journal of one evaluation."""

    model: EvaluatedModel
    corpus: Corpus
    lengths: Sequence[int]
    """Lengths in tokens, answer included."""
    depths: Sequence[float]
    samples: int
    """Questions per length, over all depths."""
    seed: int
    control_length: int
    """Length in tokens of the control within the trained window."""
    scheme: str
    tokenizer_hash: str
    model_hash: str = ""
    template: PromptTemplate = field(default_factory=PromptTemplate)
    journal: Journal = field(default_factory=Journal)
    _identities: dict[tuple[type, str], str] = field(default_factory=dict, repr=False)
    """Identity of each task, which may read a file."""

    @property
    def min_length(self) -> int:
        """Shortest length in tokens, including the control length."""
        return min(*self.lengths, self.control_length)

    @property
    def max_length(self) -> int:
        """Longest length in tokens, including the control length."""
        return max(*self.lengths, self.control_length)

    def control_tokens(self, length: int) -> int:
        """Return the tokens of a control that all lengths share at the length that measures it, and 0 at all others."""
        beyond = [value for value in self.lengths if value >= self.control_length]
        return self.control_length if beyond and length == min(beyond) > self.control_length else 0

    def samples_at(self, depth: float | None) -> int:
        """Return how many of the `samples` ask at a depth, or all of them for None.

        The depths have equally many, or one more than others. Their sum is `samples`, so some have none if `samples` is
        less than the number of depths.
        """
        if depth is None:
            return self.samples
        count = len(self.depths)
        if depth not in self.depths:  # of a caller who asks for a depth of their choice
            return -(-self.samples // count)
        index = list(self.depths).index(depth)
        return (index + 1) * self.samples // count - index * self.samples // count

    @property
    def start_ids(self) -> np.ndarray:
        """Ids [n] that every window of a loss starts with: BOS, or none."""
        return self.template.start_ids(self.model.tokenizer)

    def prompt(self, text: str, answer_prefix: str = "") -> np.ndarray:
        """Return the ids [n] of a prompt with its special tokens or in its chat template.

        Args:
            text: The prompt.
            answer_prefix: Start of the answer, which the model continues.
        """
        return self.template.ids(self.model.tokenizer, text, answer_prefix)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids [n] of a text without special tokens. The array is cached: do not write to it."""
        return encode(self.model.tokenizer, text)

    def count(self, text: str) -> int:
        """Count the tokens of a text without special tokens."""
        return len(self.encode(text))

    def key(self, task: Any, *names: Any) -> str:
        """Hash everything that a measurement depends on.

        Args:
            task: The task. Its options are part of the key, and what its `identity` adds to them.
            names: What distinguishes this measurement from others of the task.
        """
        return key_of(
            version=__version__,
            model=self.model_hash,
            scheme=self.scheme,
            precision=str(self.model.autocast),
            tokenizer=self.tokenizer_hash,
            text=self.corpus.hash,
            frame=asdict(self.template),
            start=self.start_ids.tolist(),
            seed=self.seed,
            samples=self.samples,
            depths=list(self.depths),
            control_length=self.control_length,
            lengths=list(self.lengths) if getattr(task, "depends_on_lengths", False) else None,
            task=[type(task).__name__, task.name, self._identity(task)],
            names=list(names),
        )

    def _identity(self, task: Any) -> str:
        shown = repr(task)
        if (type(task), shown) not in self._identities:
            identity = getattr(task, "identity", None)
            self._identities[type(task), shown] = shown if identity is None else identity(self)
        return self._identities[type(task), shown]

    def recall(self, key: str) -> Any:
        """Return the value that `remember` stored under a key, or None."""
        return self.journal.value(key, "value") if key in self.journal else None

    def remember(self, key: str, value: Any) -> Any:
        """Store a JSON-able value that several rows share, such as a control, in the journal.

        Returns:
            The value, or the one that the journal already has under this key.
        """
        if key not in self.journal:
            self.journal.put(key, {"value": value})
        return self.journal.value(key, "value")

    @contextlib.contextmanager
    def timed(self) -> Iterator[ResourceUsage]:
        """Measure the time and the peak memory of a block. The yielded object is filled in at the end."""
        usage = ResourceUsage()
        start = time.perf_counter()
        with PeakMemory(self.model.device) as peak:
            yield usage
        usage.seconds, usage.peak_memory, usage.memory_kind = time.perf_counter() - start, peak.bytes, peak.kind

    def row(self, usage: ResourceUsage, **measured: Any) -> Row:
        """Make a row with the hashes and settings that every row of this evaluation has."""
        return Row(
            scheme=self.scheme,
            seed=self.seed,
            text_hash=self.corpus.hash,
            tokenizer_hash=self.tokenizer_hash,
            seconds=usage.seconds,
            peak_memory=usage.peak_memory,
            memory_kind=usage.memory_kind,
            **measured,
        )

    def token_loss(self, losses: Sequence[float], groups: Sequence[int]) -> dict[str, Any]:
        """Summarise losses in nats as `TokenLoss` does; `groups` has the text spot of each token."""
        from .metrics import TokenLoss

        metric = TokenLoss(keep_in_memory=True)
        return metric.compute(losses=losses, groups=groups, bytes_per_token=self.corpus.bytes_per_token) or {}
