"""LongBench: 21 data sets, 13 of them also in LongBench-E with evenly distributed lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ....errors import PePatchError, unknown
from ..data_set import DataSetTask
from ..official import official_prompt
from ..rows import DataFiles, Row
from .scoring import first_line
from .table import DATA_SETS, PARAGRAPH, PARAGRAPH_CHINESE, DataSet

WORDINGS = ("official", "own")


@dataclass(frozen=True)
class LongBenchTask(DataSetTask):
    """A data set of LongBench; its `DataSet` has the wording and the metric."""

    benchmark: ClassVar[str] = "LongBench"
    paper: ClassVar[str] = "Bai et al. 2023, arXiv 2308.14508"
    data_files: ClassVar[DataFiles] = DataFiles(
        "THUDM/LongBench", ("{name}.jsonl", "data/{name}.jsonl", "data.zip!data/{name}.jsonl"), by_config=True
    )
    columns: ClassVar[tuple[str, ...]] = ("context", "answers", "all_classes", "length")
    data_set: ClassVar[DataSet]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wording not in WORDINGS:
            raise unknown("wording", str(self.wording), WORDINGS)

    def prompt(self, row: Row) -> tuple[str, str]:
        question = row["input"] if "input" in row else row.get("question", "")  # lm-eval's copy renames the column
        fields = {"context": row["context"], "question": question}
        if self.wording == "official":
            return official_prompt(f"longbench/{self.data_name}.yaml", self.data_set.repair)(fields), ""
        return self.data_set.prompt.format(**fields), self.data_set.lead

    def check_row(self, row: Row) -> str:
        """Return what is wrong with a row, or an empty string."""
        answers = row["answers"]
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            return f"answers must be a list of at least one string, not {str(answers)[:60]!r}"
        if self.data_set.metric in (PARAGRAPH, PARAGRAPH_CHINESE):
            try:
                self.data_set.metric.function("", answers[0])
            except PePatchError as error:
                return str(error)
        if not isinstance(row["context"], str):
            return f"context must be a string, not {str(row['context'])[:60]!r}"
        if self.data_set.metric.classes and not (isinstance(row["all_classes"], list) and row["all_classes"]):
            return "all_classes must be a list with the names of the classes"
        if self.data_name.endswith("_e") and not isinstance(row["length"], int):
            return f"length must be a number of words, not {str(row['length'])[:60]!r}"
        return ""

    def references(self, row: Row) -> tuple[str, ...]:
        return tuple(row["answers"])

    def parts(self, row: Row) -> tuple[str, ...]:
        """Return the authors' range of words for LongBench-E, else nothing."""
        if not self.data_name.endswith("_e"):
            return ()
        return ("0-4k" if row["length"] < 4000 else "4-8k" if row["length"] < 8000 else "8k+",)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the score by the data set's metric with the best matching right answer."""
        metric = self.data_set.metric
        classes = (self.rows()[0]["all_classes"],) if metric.classes else ()
        given = first_line(prediction) if self.data_set.one_line else prediction
        return max(metric.function(given, reference, *classes) for reference in references)

    def measure(self) -> str:
        return self.data_set.metric.name


def _task(name: str, data_set: DataSet) -> type[LongBenchTask]:
    """Create the task class of a data set."""
    attributes = {
        "name": f"longbench_{name}",
        "summary": f"LongBench's {name}: {data_set.metric.name} (data from a folder or the hub)",
        "data_name": name,
        "data_set": data_set,
        "budget": data_set.budget,
        "chat": data_set.chat,
        "retrieves": data_set.needs_context,
        "__module__": __name__,
        "__doc__": f"The data set {name} of LongBench.",
    }
    return dataclass(frozen=True)(type(f"LongBench_{name}", (LongBenchTask,), attributes))


FIRST = {f"longbench_{name}": _task(name, data_set) for name, data_set in DATA_SETS.items()}
FIRST_BY_LENGTH = {
    f"longbench_{name}_e": _task(f"{name}_e", data_set) for name, data_set in DATA_SETS.items() if data_set.by_length
}
