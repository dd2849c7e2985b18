"""Tasks whose questions are the rows of a published data set."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ...errors import OptionError, PePatchError, nearest
from ..context import EvaluationContext, PromptTemplate
from ..question import Question
from ..question_task import QuestionTask
from .rows import Home, Row, fingerprint, load_rows

LEAST_CONTROL = 128
"""Tokens of a prompt below which cutting it would leave nothing of its question: no control then."""


@dataclass(frozen=True)
class RowQuestion(Question):
    """A question made from a row; `parts` are the parts of the data set that it belongs to."""

    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSetTask(QuestionTask):
    """Rows of a data set, drawn by the seed; each becomes one prompt that is never cut unless told so.

    Args:
        source: a folder with the benchmark's own files, one of these files, or a repository of the hub (default: the
            benchmark's own).
        split: have `datasets` read this split of the source, for sources that are laid out differently.
        wording: "own", or "official": as the authors word it. Only then do rows carry the benchmark's name.
        truncate: None, or "middle": a prompt that is too long loses its middle, as the authors do it. Rows tell how
            many prompts and tokens were cut.
        skip_longer: pass over rows that are too long. Rows tell how many.

    The control within the trained window is the same prompts with their middle cut out.
    """

    source: str | None = None
    split: str | None = None
    wording: str = "own"
    truncate: str | None = None
    skip_longer: bool = False

    benchmark: ClassVar[str] = ""
    home: ClassVar[Home]
    data_name: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    budget: ClassVar[int] = 0
    chat: ClassVar[bool] = True
    """Whether the prompt is put in the chat template where the evaluation asks for one."""

    def __post_init__(self) -> None:
        if self.truncate not in (None, "middle"):
            near = nearest(self.truncate, ["middle"])
            raise OptionError(f"truncate is None or 'middle', got {self.truncate!r}.{near}")
        if self.truncate and self.skip_longer:
            raise OptionError("truncate='middle' cuts longer rows and skip_longer=True passes over them: give one.")

    def prompt(self, row: Row) -> tuple[str, str]:
        """The text of a row's prompt, and the beginning of the answer that is given with it."""
        raise NotImplementedError

    def references(self, row: Row) -> tuple[str, ...]:
        """The right answers of a row."""
        raise NotImplementedError

    def parts(self, row: Row) -> tuple[str, ...]:
        """The parts of the data set, with scores of their own, that a row belongs to."""
        return ()

    def label(self) -> str:
        """What the rows may be called: the benchmark, or its data in other words."""
        return self.benchmark if self.wording == "official" else f"{self.benchmark}'s data in other words"

    def rows(self) -> list[Row]:
        return load_rows(self.home, self.data_name, self.source, self.split, self.columns)

    def questions(
        self, context: EvaluationContext, length: int, depth: float | None, within: int | None = None
    ) -> Sequence[RowQuestion]:
        """As many rows as samples are asked for, or all there are."""
        rows, kept, stamps = self._chosen(context, length)
        if within is not None:
            if within - self.budget + 1 < LEAST_CONTROL:
                raise PePatchError(
                    f"{within} tokens, {self.budget} of them for the answer, leave nothing of a prompt when its middle "
                    "is cut out."
                )
            stamps = {}
            kept = {index: self._cut(context, rows[index], within)[0] for index in kept}
        return [self._question(context, rows[index], ids, stamps) for index, ids in kept.items()]

    def _chosen(
        self, context: EvaluationContext, length: int
    ) -> tuple[list[Row], dict[int, np.ndarray], dict[str, Any]]:
        """All rows, the prompts by row number, and what became of those that were too long."""
        rows = self.rows()
        room = length - self.budget + 1
        order = np.random.default_rng([context.seed, zlib.crc32(self.name.encode())]).permutation(len(rows))
        kept: dict[int, np.ndarray] = {}
        longer: list[int] = []
        tokens_cut = 0
        for index in map(int, order):
            if len(kept) + (0 if self.skip_longer or self.truncate else len(longer)) == context.samples:
                break
            ids = self._ids(context, *self.prompt(rows[index]))
            if len(ids) > room:
                longer.append(len(ids) + self.budget - 1)
                if self.truncate:
                    ids, lost = self._cut(context, rows[index], length)
                    tokens_cut += lost
            if len(ids) <= room:
                kept[index] = ids
        if longer and (not kept or not (self.skip_longer or self.truncate)):
            raise PePatchError(
                f"{self.name}: {len(longer)} of {len(longer) + len(kept)} rows are longer than {length} tokens, their "
                f"answers included (the longest has {max(longer)}). Ask for a greater length, pass over such rows with "
                "skip_longer=True, or cut them as the benchmark's authors do with truncate='middle'."
            )
        stamps: dict[str, Any] = {"rows_in_data_set": len(rows)}
        if self.skip_longer:
            stamps["rows_skipped_as_longer"] = len(longer)
        if self.truncate:
            stamps |= {"truncated": self.truncate, "prompts_cut": len(longer), "tokens_cut": tokens_cut}
        return rows, kept, stamps

    def _question(
        self, context: EvaluationContext, row: Row, ids: np.ndarray, stamps: Mapping[str, Any]
    ) -> RowQuestion:
        bare = self._ids(context, *self.prompt(row | {"context": ""}))
        return RowQuestion(ids, self.references(row), self.budget, bare, stamps=stamps, parts=self.parts(row))

    def _ids(self, context: EvaluationContext, text: str, lead: str) -> np.ndarray:
        frame = context.template if self.chat else PromptTemplate()
        return frame.ids(context.model.tokenizer, text, lead)

    def _cut(self, context: EvaluationContext, row: Row, length: int) -> tuple[np.ndarray, int]:
        """The row's prompt without as much of its middle as it takes to fit, and how many tokens were lost.

        As the authors do it, the text's first and last tokens are made text again, each on their own, and that is put
        in the chat template.
        """
        text, lead = self.prompt(row)
        whole, room = self._ids(context, text, lead), length - self.budget + 1
        tokenizer = context.model.tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        half = (room - len(self._ids(context, "", lead))) // 2
        cut = whole
        while len(cut) > room:
            if half < 1:
                raise PePatchError(f"{self.name}: {length} tokens leave no room for a prompt beside its answer.")
            cut = self._ids(context, tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:]), lead)
            half -= max(1, (len(cut) - room) // 2)
        return cut, len(whole) - len(cut)

    def _row(
        self, context: EvaluationContext, work: Any, length: int, depth: Any, questions: Any, texts: Any, scores: Any
    ) -> Any:
        """With the scores of the data set's parts; the text of these rows is the data set's, not the evaluation's."""
        row = super()._row(context, work, length, depth, questions, texts, scores)
        found: dict[str, list[float]] = {}
        for question, score in zip(questions, scores, strict=True):
            for part in question.parts:
                found.setdefault(part, []).append(score)
        details = row.details
        if found:
            parts = {part: {"score": sum(each) / len(each), "samples": len(each)} for part, each in found.items()}
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
            "source": self.source or self.home.hub,
            "wording": self.wording,
            "chat": self.chat and context.template.chat,
            "control": "the same prompts, their middle cut out",
        }
