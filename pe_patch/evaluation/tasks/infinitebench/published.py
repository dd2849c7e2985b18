"""InfiniteBench: 12 published data sets with about 100,000 tokens per question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ....errors import PePatchError, unknown
from ...question import check_references
from ..data_set import DataSetTask
from ..official import official_prompt
from ..rows import DataFiles, Row
from .table import DATA_SETS, DataSet

WORDINGS = ("official", "own")


@dataclass(frozen=True)
class InfiniteBenchTask(DataSetTask):
    """A data set of InfiniteBench; its `DataSet` has the wording and the metric.

    The official wording is the authors' wording for chat models, from lm-eval.
    """

    benchmark: ClassVar[str] = "InfiniteBench"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2402.13718"
    data_files: ClassVar[DataFiles] = DataFiles("xinrongzhang2022/InfiniteBench", ("{name}.jsonl",))
    columns: ClassVar[tuple[str, ...]] = ("context", "input", "answer")
    data_set: ClassVar[DataSet]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wording not in WORDINGS:
            raise unknown("wording", str(self.wording), WORDINGS)
        if self.wording == "official" and not self.has_official():
            raise PePatchError(
                f"lm-eval has no wording of {self.data_name}. Give wording='own', or leave this task out."
            )

    def has_official(self) -> bool:
        return self.data_set.official is not None

    def prompt(self, row: Row) -> tuple[str, str]:
        if self.wording == "official":
            return official_prompt(f"infinitebench/infinitebench_{self.data_set.official}.yaml")(row), ""
        fields = {"context": row["context"], "question": row["input"], **self.data_set.fields(row)}
        return self.data_set.prompt.format(**fields), self.data_set.lead

    def check_row(self, row: Row) -> str:
        if not isinstance(row["context"], str):
            return f"context must be a string, not {str(row['context'])[:60]!r}"
        if self.data_set.choices and not (isinstance(row.get("options"), list) and len(row["options"]) == 4):
            return "options must be a list of four answers"
        try:
            check_references(self.references(row))
        except PePatchError as error:
            return str(error)
        return ""

    def references(self, row: Row) -> tuple[str, ...]:
        """Return the answers as text; for a choice, its text and its letter."""
        answer = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if answer and isinstance(answer[0], list):
            (answer,) = answer
        references = tuple(map(str, answer))
        if self.data_set.choices and len(references) == 1:
            if references[0] not in row["options"]:
                raise PePatchError(f"{self.data_name}: the answer {references[0]!r} is not among the row's options.")
            references += ("ABCD"[row["options"].index(references[0])],)
        return references

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the score by the data set's metric."""
        lead = self.data_set.lead if self.data_set.lead_counts and self.wording == "own" else ""
        return self.data_set.metric(lead + prediction, references)

    def measure(self) -> str:
        return self.data_set.measure


def _task(name: str, data_set: DataSet) -> type[InfiniteBenchTask]:
    """Create the task class of a data set."""
    attributes = {
        "name": f"infinitebench_{name}",
        "summary": f"InfiniteBench's {name}: {data_set.measure} (data from a folder or the hub)",
        "data_name": name,
        "data_set": data_set,
        "budget": data_set.budget,
        "__module__": __name__,
        "__doc__": f"The data set {name} of InfiniteBench.",
    }
    return dataclass(frozen=True)(type(f"InfiniteBench_{name}", (InfiniteBenchTask,), attributes))


PUBLISHED = {f"infinitebench_{name}": _task(name, data_set) for name, data_set in DATA_SETS.items()}
