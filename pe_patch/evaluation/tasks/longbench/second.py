"""LongBench v2: 503 questions with four choices each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ....errors import OptionError
from ...context import EvaluationContext
from ..data_set import DataSetTask
from ..rows import DataFiles, Row

PROMPT = (
    "Read the text between the two lines of dashes. It is followed by a question with four choices.\n\n"
    "----------\n{context}\n----------\n\n{question}\n\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n\n"
    'Which of the four is right? Reply "The correct answer is (X)", with its letter for X.\n'
)
LEAD = "The correct answer is"
PLACES = {"$DOC$": "context", "$Q$": "question", "$C_A$": "A", "$C_B$": "B", "$C_C$": "C", "$C_D$": "D"}
"""The placeholders in the authors' prompt files, and the columns that replace them."""
OFFICIAL = "68a162252bc9ff71d5d7abca3d69bb31aac3c35f832d657a2866f2018b8a6950"
"""SHA-256 of the authors' prompts/0shot.txt."""


@dataclass(frozen=True)
class LongBench2(DataSetTask):
    """LongBench v2. `wording` is "own" (also for None), or the path of a prompt file in the authors' format.

    Only with the authors' prompts/0shot.txt do the rows carry the name LongBench v2. lm-eval uses another prompt and
    compares the likelihoods of four letters.
    """

    name: ClassVar[str] = "longbench2"
    summary: ClassVar[str] = (
        "LongBench v2: questions with four choices about long texts (data from a folder or the hub)"
    )
    paper: ClassVar[str] = "Bai et al. 2024, arXiv 2412.15204"
    benchmark: ClassVar[str] = "LongBench v2"
    data_files: ClassVar[DataFiles] = DataFiles("THUDM/LongBench-v2", ("data.json",))
    data_name: ClassVar[str] = "LongBench-v2"
    columns: ClassVar[tuple[str, ...]] = (
        "context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "difficulty", "length",
    )  # fmt: skip
    budget: ClassVar[int] = 128

    def has_official(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wording == "own":
            return
        assert self.wording is not None
        if not Path(self.wording).is_file():
            raise OptionError(
                "wording must be 'own' or a prompt file in the authors' format (their prompts/0shot.txt), got "
                f"{self.wording!r}. No installed package has the official wording of LongBench v2."
            )
        missing = [placeholder for placeholder in PLACES if placeholder not in self._file()]
        if missing:
            raise OptionError(f"The prompt file {self.wording} has no {', '.join(missing)}.")

    def prompt(self, row: Row) -> tuple[str, str]:
        fields = {key: row[key].strip() for key in ("context", "question")}
        fields |= {letter: row[f"choice_{letter}"].strip() for letter in "ABCD"}
        if self.wording == "own":
            return PROMPT.format(**fields), LEAD
        # Replace all placeholders in one pass, because a text may contain "$Q$".
        placeholder = re.compile("|".join(map(re.escape, PLACES)))
        return placeholder.sub(lambda match: fields[PLACES[match.group()]], self._file()), ""

    def check_row(self, row: Row) -> str:
        texts = [
            name for name in self.columns if name not in ("difficulty", "length") and not isinstance(row[name], str)
        ]
        if texts:
            return f"{texts[0]} must be a string, not {str(row[texts[0]])[:60]!r}"
        return "" if row["answer"] in tuple("ABCD") else f"answer must be A, B, C or D, not {row['answer'][:60]!r}"

    def references(self, row: Row) -> tuple[str, ...]:
        return (row["answer"],)

    def parts(self, row: Row) -> tuple[str, ...]:
        """Return the difficulty and the length class, by which the authors report scores."""
        return row["difficulty"], row["length"]

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the answer names the right letter in the authors' exact phrase, else 0."""
        given = (LEAD if self.wording == "own" else "") + prediction
        return float(_letter(given) == references[0])

    def measure(self) -> str:
        return "share of choices right"

    def label(self) -> str:
        official = self.wording != "own" and hashlib.sha256(self._file().encode()).hexdigest() == OFFICIAL
        return self.benchmark if official else f"{self.benchmark}'s data in other words"

    def stamps(self, context: EvaluationContext) -> dict[str, Any]:
        return super().stamps(context) | {"guessing": 0.25}

    def _file(self) -> str:
        return Path(str(self.wording)).read_text(encoding="utf-8")


def _letter(given: str) -> str | None:
    """Return the letter that an answer names, in parentheses if any is, or None."""
    given = given.replace("*", "")
    match = re.search(LEAD + r" \(([A-D])\)", given) or re.search(LEAD + " ([A-D])", given)
    return match.group(1) if match else None
