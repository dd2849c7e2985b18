"""Base class of tasks whose questions are the rows of a published data set."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ...errors import OptionError, PePatchError, nearest
from ..context import EvaluationContext
from ..question import Question
from ..question_task import QuestionTask
from .official import default_wording, lm_eval_version
from .rows import DataFiles, Row, fingerprint, load_rows

SHORTEST_CONTROL = 128
"""Tokens of the shortest control prompt; cutting it further would remove its question."""


@dataclass(frozen=True)
class RowQuestion(Question):
    """A question from a row of a data set."""

    parts: tuple[str, ...] = ()
    """The parts of the data set that the row belongs to."""


@dataclass(frozen=True)
class DataSetTask(QuestionTask):
    """A task that turns randomly drawn rows of a data set into prompts.

    Prompts are only cut with `truncate`. The control within the trained window uses the same prompts with their middle
    cut out.

    Args:
        source: a folder with the benchmark's files, one of these files, or a hub repository; None takes the benchmark's
            repository.
        split: the split to read with `datasets`, for sources with another layout; None reads the benchmark's files.
        wording: "official" for the authors' words, or "own" for ours. Only official rows carry the benchmark's name.
            None takes "official", or "own" where lm-eval, which has the official words, is not installed or lacks them.
        truncate: "middle" cuts the middle out of a prompt that is too long, as the authors do; None raises. Rows state
            the number of prompts and tokens cut.
        skip_longer: True to skip rows that are too long. Rows state their number.
    """

    source: str | None = None
    split: str | None = None
    wording: str | None = None
    truncate: str | None = None
    skip_longer: bool = False

    benchmark: ClassVar[str] = ""
    data_files: ClassVar[DataFiles]
    data_name: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    """The columns that a row must have."""
    budget: ClassVar[int] = 0
    """The largest number of tokens in an answer."""
    chat: ClassVar[bool] = True
    """True to use the chat template if the evaluation does."""

    def __post_init__(self) -> None:
        if self.wording is None:
            object.__setattr__(self, "wording", default_wording() if self.has_official() else "own")
        if self.truncate not in (None, "middle"):
            near = nearest(self.truncate, ["middle"])
            raise OptionError(f"truncate must be None or 'middle', got {self.truncate!r}.{near}")
        if self.truncate and self.skip_longer:
            raise OptionError("truncate='middle' cuts longer rows and skip_longer=True skips them: give one of them.")

    def has_official(self) -> bool:
        """Return True if lm-eval has the official wording of this data set."""
        return True

    def identity(self, context: EvaluationContext) -> str:
        """Add what the options do not name: the rows, and the version of lm-eval that has the official wording."""
        version = lm_eval_version() if self.wording == "official" else ""
        return f"{self!r} {fingerprint(self.rows())} {version}"

    def prompt(self, row: Row) -> tuple[str, str]:
        """Return the prompt of a row, and the beginning of the answer that follows it."""
        raise NotImplementedError

    def references(self, row: Row) -> tuple[str, ...]:
        """Return the right answers of a row."""
        raise NotImplementedError

    def parts(self, row: Row) -> tuple[str, ...]:
        """Return the parts of the data set that a row belongs to; each part gets a separate score."""
        return ()

    def label(self) -> str:
        """Return the name of the benchmark for the official wording, else a name that marks another wording."""
        return self.benchmark if self.wording == "official" else f"{self.benchmark}'s data in other words"

    def rows(self) -> list[Row]:
        """Load the rows of the data set, every one of them checked.

        Raises:
            PePatchError: A row cannot be asked or scored.
        """
        rows = load_rows(self.data_files, self.data_name, self.source, self.split, self.columns)
        for number, row in enumerate(rows, 1):
            if wrong := self.check_row(row):
                where = self.source or self.data_files.hub
                raise PePatchError(f"Row {number} of {self.data_name!r} in {where}: {wrong}. Correct or remove it.")
        return rows

    def check_row(self, row: Row) -> str:
        """Return what makes a row impossible to ask or to score, or an empty string."""
        return ""

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[RowQuestion]:
        """Return one question per sample, or fewer if the data set has fewer rows."""
        rows, prompts, stamps = self._choose_rows(context, length)
        if within is not None:
            if within - self.budget + 1 < SHORTEST_CONTROL:
                raise PePatchError(
                    f"{within} tokens, {self.budget} of them for the answer, leave nothing of a prompt whose middle is "
                    "cut out."
                )
            stamps = {}
            prompts = {index: self._cut(context, rows[index], within)[0] for index in prompts}
        return [self._question(context, rows[index], ids, stamps) for index, ids in prompts.items()]

    def _choose_rows(
        self, context: EvaluationContext, length: int
    ) -> tuple[list[Row], dict[int, np.ndarray], dict[str, Any]]:
        """Return all rows, the chosen prompts by row number, and stamps on rows that were too long."""
        rows = self.rows()
        room = length - self.budget + 1
        order = np.random.default_rng([context.seed, zlib.crc32(self.name.encode())]).permutation(len(rows))
        prompts: dict[int, np.ndarray] = {}
        longer: list[int] = []
        tokens_cut = 0
        for index in map(int, order):
            if len(prompts) + (0 if self.skip_longer or self.truncate else len(longer)) == context.samples:
                break
            ids = self._ids(context, *self.prompt(rows[index]))
            if len(ids) > room:
                longer.append(len(ids) + self.budget - 1)
                if self.truncate:
                    ids, removed = self._cut(context, rows[index], length)
                    tokens_cut += removed
            if len(ids) <= room:
                prompts[index] = ids
        if longer and (not prompts or not (self.skip_longer or self.truncate)):
            raise PePatchError(
                f"{self.name}: {len(longer)} of {len(longer) + len(prompts)} rows are longer than {length} tokens, "
                f"including their answers (the longest has {max(longer)}). Ask for a greater length, skip such rows "
                "with skip_longer=True, or cut them as the benchmark's authors do with truncate='middle'."
            )
        stamps: dict[str, Any] = {"rows_in_data_set": len(rows)}
        if self.skip_longer:
            stamps["rows_skipped_as_longer"] = len(longer)
        if self.truncate:
            stamps |= {"truncated": self.truncate, "prompts_cut": len(longer), "tokens_cut": tokens_cut}
        return rows, prompts, stamps

    def _question(
        self, context: EvaluationContext, row: Row, ids: np.ndarray, stamps: Mapping[str, Any]
    ) -> RowQuestion:
        bare = self._ids(context, *self.prompt(row | {"context": ""}))
        return RowQuestion(ids, self.references(row), self.budget, bare, stamps=stamps, parts=self.parts(row))

    def _ids(self, context: EvaluationContext, text: str, lead: str) -> np.ndarray:
        frame = context.template if self.chat else context.template.without_chat()
        return frame.ids(context.model.tokenizer, text, lead)

    def _cut(self, context: EvaluationContext, row: Row, length: int) -> tuple[np.ndarray, int]:
        """Cut the middle out of a row's prompt until it fits; return the prompt and the number of removed tokens.

        Like the authors, decode the first and the last tokens separately and put the result into the chat template.
        """
        text, lead = self.prompt(row)
        whole, room = self._ids(context, text, lead), length - self.budget + 1
        tokenizer = context.model.tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        half = (room - len(self._ids(context, "", lead))) // 2
        cut = whole
        while len(cut) > room:
            if half < 1:
                raise PePatchError(
                    f"{self.name}: {length} tokens leave no room for a prompt beside its answer. Ask for a greater "
                    "length."
                )
            cut = self._ids(context, tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:]), lead)
            half -= max(1, (len(cut) - room) // 2)
        return cut, len(whole) - len(cut)

    def _row(
        self, context: EvaluationContext, work: Any, length: int, depth: Any, questions: Any, texts: Any, scores: Any
    ) -> Any:
        """Add the scores of the data set's parts, and identify the text by the data set instead of the corpus."""
        row = super()._row(context, work, length, depth, questions, texts, scores)
        scores_of: dict[str, list[float]] = {}
        for question, score in zip(questions, scores, strict=True):
            for name in question.parts:
                scores_of.setdefault(name, []).append(score)
        details = row.details
        if scores_of:
            parts = {
                name: {"score": sum(values) / len(values), "samples": len(values)} for name, values in scores_of.items()
            }
            details = details | {"parts": parts}
        return replace(row, details=details, text_hash=fingerprint(self.rows()))

    def measured_on(self, context: EvaluationContext, questions: Sequence[Question]) -> str:
        return (
            f"{len(questions)} of {questions[0].stamps['rows_in_data_set']} rows of {self.data_name}, {self.label()}; "
            f"{self.measure()}, greedy answers of at most {self.budget} tokens"
        )

    def stamps(self, context: EvaluationContext) -> dict[str, Any]:
        return {
            "label": self.label(),
            "data_set": self.data_name,
            "source": self.source or self.data_files.hub,
            "wording": f"official (lm-eval {lm_eval_version()})" if self.wording == "official" else self.wording,
            "chat": self.chat and context.template.chat,
            "control": "the same prompts, their middle cut out",
        }
