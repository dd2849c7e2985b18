"""The tasks by name, and the two that hide facts in a text and ask for them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from pe_patch.errors import PePatchError, unknown
from pe_patch.evaluation.bench import Bench
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.results import Row
from pe_patch.evaluation.retrieval import WORDINGS, RetrievalSample, Wording, make_sample, wording_for


class Task(Protocol):
    """What `evaluate` asks of a task: a name, a clause, what it will cost and the rows of one length."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]

    def cost(self, bench: Bench) -> int:
        """Tokens the model will be given over all lengths, controls included."""
        ...

    def rows(self, bench: Bench, length: int) -> Iterator[Row]: ...


@dataclass(frozen=True)
class _Retrieval:
    """Questions about facts hidden in real text, answered greedily; a score is the share answered exactly.

    `wording` is a name in WORDINGS, a Wording of your own, or None for the one that fits the tokenizer.
    """

    needles: int = 1
    wording: str | Wording | None = None

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    retrieves: ClassVar[bool] = True

    @staticmethod
    def score(prediction: str, answer: str) -> bool:
        """Whether an answer is right: equal to the reference, apart from surrounding white space."""
        return prediction.strip() == answer.strip()

    def samples(self, bench: Bench, length: int, depth: float) -> list[RetrievalSample]:
        """The questions of one cell. Their facts do not depend on the length, so a control asks the same ones."""
        return [
            make_sample(
                bench.subject.tokenizer,
                bench.corpus.stream,
                self._wording(bench),
                length=length,
                needles=self.needles,
                depth=depth,
                rng=np.random.default_rng([bench.seed, zlib.crc32(self.name.encode()), round(depth * 1e6), index]),
            )
            for index in range(bench.samples_per_depth)
        ]

    def cost(self, bench: Bench) -> int:
        lengths = set(bench.lengths)
        if max(lengths) > bench.control_length:
            lengths.add(bench.control_length)
        return bench.samples_per_depth * len(bench.depths) * sum(lengths)

    def rows(self, bench: Bench, length: int) -> Iterator[Row]:
        for depth in bench.depths:
            samples = self.samples(bench, length, depth)
            sizes = {len(sample.input_ids) + len(sample.answer_ids) for sample in samples}
            if sizes != {length}:
                raise PePatchError(f"A prompt of {sorted(sizes)} tokens was made where {length} were asked for.")
            with bench.timed() as work:
                given = bench.subject.answers(samples)
            found = bench.accuracy(given, [sample.answer for sample in samples])
            if length == bench.control_length:
                bench.controls[self, depth] = found["accuracy"]
            yield bench.row(
                work,
                task=self.name,
                measure=self._measure(),
                length=length,
                tokens=length,
                depth=depth,
                score=found["accuracy"],
                low=found["low"],
                high=found["high"],
                samples=found["samples"],
                control=self._control(bench, length, depth, found["accuracy"]),
                control_length=min(length, bench.control_length),
                measured_on=f"{found['samples']} questions at each depth, wording {self._wording(bench).name}, "
                f"in {bench.corpus.name}; greedy answer, equal to the right one",
            )

    def _measure(self) -> str:
        return f"exact answers, {self.needles} needle{'s' if self.needles > 1 else ''}"

    def _control(self, bench: Bench, length: int, depth: float, score: float) -> float:
        """The score of the same questions within the native window, measured once per depth."""
        if length <= bench.control_length:
            return score
        if (self, depth) not in bench.controls:
            samples = self.samples(bench, bench.control_length, depth)
            given = bench.subject.answers(samples)
            bench.controls[self, depth] = bench.accuracy(given, [sample.answer for sample in samples])["accuracy"]
        return bench.controls[self, depth]

    def _wording(self, bench: Bench) -> Wording:
        if self.wording is None:
            return wording_for(bench.subject.tokenizer)
        if isinstance(self.wording, Wording):
            return self.wording
        if self.wording not in WORDINGS:
            raise unknown("wording", self.wording, WORDINGS)
        return WORDINGS[self.wording]


@dataclass(frozen=True)
class Needle(_Retrieval):
    """One of several facts is asked for; the others are distractors."""

    needles: int = 8

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "one of several facts hidden in real text is asked for (multi-key needle in a haystack)"
    paper: ClassVar[str] = "Hsieh et al. 2024, arXiv 2404.06654 (the idea; wording and generator are ours)"


@dataclass(frozen=True)
class Passkey(_Retrieval):
    """The only fact hidden in the text is asked for."""

    name: ClassVar[str] = "passkey"
    summary: ClassVar[str] = "the only fact hidden in real text is asked for"
    paper: ClassVar[str] = "Mohtashami and Jaggi 2023, arXiv 2305.16300 (the idea; wording and generator are ours)"


TASKS: Mapping[str, type[Task]] = {task.name: task for task in (Perplexity, Needle, Passkey)}


def find_task(task: str | Task) -> Task:
    """A task by name with its defaults, or the instance given; an unknown name raises with the nearest one."""
    if not isinstance(task, str):
        return task
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    return TASKS[task]()
