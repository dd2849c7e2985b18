"""What an evaluation found: rows, the table made from them, and the files they are kept in."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..checkpoints.folders import EVALUATION, check_output
from ..errors import OutputError, PePatchError


@dataclass(frozen=True)
class Row:
    """One measurement.

    `length` is what was asked for, `tokens` what the model was really given, answer included. `low` and `high` bound
    the 95 % interval (exact binomial for accuracies, normal over spots for losses). `control` is the same questions or
    targets at `control_length`, `without_context` those with nothing to read. `measured_on` says in words which tokens
    were scored. `peak_memory` is in bytes. `key` names everything that the numbers depend on.
    """

    scheme: str
    task: str
    measure: str
    length: int
    tokens: int
    depth: float | None
    score: float
    low: float | None
    high: float | None
    samples: int
    control: float | None
    control_length: int | None
    seconds: float
    peak_memory: int | None
    memory_kind: str
    seed: int
    text_hash: str
    tokenizer_hash: str
    measured_on: str
    details: dict[str, Any] = field(default_factory=dict)
    without_context: float | None = None
    key: str = ""


COLUMNS = tuple(entry.name for entry in fields(Row))


@dataclass(frozen=True)
class Cell:
    """All rows of one scheme, task, measure and length taken together."""

    score: float
    low: float | None
    high: float | None
    samples: int
    control: float | None
    without_context: float | None = None


def _mean(rows: list[Row], name: str) -> float | None:
    """The mean of a column over the questions of the rows that have it."""
    known = [(value, row.samples) for row in rows if (value := getattr(row, name)) is not None]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None


@dataclass
class Results:
    """Rows in the order they were measured, and the configuration that made them."""

    rows: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    def select(self, **wanted: Any) -> list[Row]:
        """The rows whose columns have these values: `select(task="needle", length=2048)`."""
        return [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]

    def values(self, column: str) -> list[Any]:
        """The different values of a column, in the order they first occur."""
        return list(dict.fromkeys(getattr(row, column) for row in self.rows))

    def cell(self, **wanted: Any) -> Cell | None:
        """The rows selected, pooled over depths: counts are added up and the interval is made from the sum."""
        rows = self.select(**wanted)
        if not rows:
            return None
        samples = sum(row.samples for row in rows)
        score = sum(row.score * row.samples for row in rows) / samples
        controls = {name: _mean(rows, name) for name in ("control", "without_context")}
        if len(rows) == 1:
            return Cell(score, rows[0].low, rows[0].high, samples, **controls)
        if any(row.depth is None for row in rows):
            raise PePatchError(f"These rows are not depths of one measurement and cannot be pooled: {wanted}.")
        from .metrics import binomial_interval, score_interval

        each = [share for row in rows for share in row.details.get("scores", ())]
        groups = [group for row in rows for group in row.details.get("groups", ())]
        if len(each) != samples:
            whole = binomial_interval(round(score * samples), samples)
        else:
            whole = score_interval(each, groups if len(groups) == samples else None)
        return Cell(score, *whole, samples, **controls)

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with one line per row and the columns of `Row`."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows], columns=list(COLUMNS))

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write results.jsonl and config.json, each whole or not at all; returns the directory.

        A directory that holds something else than an evaluation raises `OutputError` unless `overwrite=True`.
        """
        check_output(directory, EVALUATION, overwrite=overwrite)
        folder = Path(directory).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(row), ensure_ascii=False) for row in self.rows]
        write_atomically(folder / "results.jsonl", "".join(line + "\n" for line in lines))
        write_atomically(folder / "config.json", json.dumps(self.config, indent=2, ensure_ascii=False) + "\n")
        return folder

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Results:
        """Read what `save` wrote. A missing or damaged file raises `PePatchError`."""
        folder = Path(directory)
        try:
            lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return cls([Row(**json.loads(line)) for line in lines], config)
        except (OSError, ValueError, TypeError) as error:
            raise PePatchError(f"No readable results in {folder}: {error}") from error

    def __add__(self, other: Results) -> Results:
        return Results(self.rows + other.rows, self.config | other.config)

    def __str__(self) -> str:
        from rich.console import Console

        from .tables import summary

        stream = io.StringIO()
        Console(file=stream, width=150, force_jupyter=False, force_terminal=False).print(summary(self))
        return stream.getvalue()


def check_results_folder(
    directory: str | os.PathLike[str], *, scheme: str | None = None, inputs: Iterable[Any] = (), overwrite: bool = False
) -> None:
    """Raise `OutputError` unless an evaluation may write here: not onto an input, nor over something else.

    With `scheme` the results of another scheme are something else, too: they would be replaced.
    """
    folder = check_output(directory, EVALUATION, inputs=inputs, overwrite=overwrite)
    if scheme is None or overwrite:
        return
    try:
        before = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("scheme", scheme)
    except (OSError, ValueError, AttributeError):
        return  # no finished results, or none that can be read
    if before != scheme:
        raise OutputError(
            f"{directory} holds the results of {before!r}, and those of {scheme!r} would replace them. Give another "
            "folder, or --overwrite (overwrite=True in Python) to replace them."
        )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put a file in place in one step, so that a reader or a crash never meets half of it."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
