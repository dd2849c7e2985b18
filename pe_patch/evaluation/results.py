"""Rows of an evaluation, the tables made from them, and the files that hold them."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.folders import EVALUATION, check_output
from ..errors import OutputError, PePatchError, quoted

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measurement."""

    scheme: str
    task: str
    measure: str
    length: int
    """Requested length in tokens."""
    tokens: int
    """Tokens that the model actually read, answer included."""
    depth: float | None
    score: float
    low: float | None
    """Lower end of the 95 % interval: exact for right or wrong answers, by betting for scores in between, Student's t
    over text spots for losses."""
    high: float | None
    """Upper end of the 95 % interval."""
    samples: int
    control: float | None
    """Score of the same questions or target tokens at `control_length`."""
    control_length: int | None
    seconds: float
    peak_memory: int | None
    """Peak memory in bytes."""
    memory_kind: str
    seed: int
    text_hash: str
    tokenizer_hash: str
    measured_on: str
    """A sentence that describes the scored tokens or questions."""
    details: dict[str, Any] = field(default_factory=dict)
    without_context: float | None = None
    """Score of the same questions or target tokens without any text before them."""
    key: str = ""
    """Hash of everything that the numbers depend on."""


COLUMNS = tuple(entry.name for entry in fields(Row))


@dataclass(frozen=True)
class Cell:
    """The pooled rows of one scheme, task, measure and length."""

    score: float
    low: float | None
    high: float | None
    samples: int
    control: float | None
    without_context: float | None = None


@dataclass
class Results:
    """Rows in the order of measurement, and the configuration of the run."""

    rows: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    def select(self, **wanted: Any) -> list[Row]:
        """Return the rows whose columns have these values: `select(task="needle", length=2048)`."""
        return [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]

    def values(self, column: str) -> list[Any]:
        """Return the distinct values of a column in order of first occurrence."""
        return list(dict.fromkeys(getattr(row, column) for row in self.rows))

    def cell(self, **wanted: Any) -> Cell | None:
        """Pool the selected rows over depths and recompute the interval from all questions.

        Args:
            wanted: Column values, as for `select`.

        Returns:
            The pooled cell, or None if no row matches.

        Raises:
            PePatchError: Several rows match and they are not depths of one measurement.
        """
        rows = self.select(**wanted)
        if not rows:
            return None
        samples = sum(row.samples for row in rows)
        score = sum(row.score * row.samples for row in rows) / samples
        controls = {name: _weighted_mean(rows, name) for name in ("control", "without_context")}
        if len(rows) == 1:
            return Cell(score, rows[0].low, rows[0].high, samples, **controls)
        if any(row.depth is None for row in rows):
            raise PePatchError(
                f"Cannot pool {len(rows)} rows that are not depths of one measurement: {wanted}. Select fewer rows."
            )
        from .metrics import binomial_interval, score_interval

        scores = [score for row in rows for score in row.details.get("scores", ())]
        groups = [group for row in rows for group in row.details.get("groups", ())]
        if not math.isfinite(score):
            low = high = None
        elif len(scores) != samples:
            low, high = binomial_interval(round(score * samples), samples)
        else:
            low, high = score_interval(scores, groups if len(groups) == samples else None)
        return Cell(score, low, high, samples, **controls)

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame with one line per row and the columns of `Row`."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows], columns=list(COLUMNS))

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write results.jsonl and config.json, each atomically.

        Args:
            directory: Output folder. It is created if needed.
            overwrite: Write even if the folder holds something other than an evaluation.

        Returns:
            The folder.

        Raises:
            OutputError: The folder holds something other than an evaluation and `overwrite` is False.
        """
        check_output(directory, EVALUATION, overwrite=overwrite)
        folder = Path(directory).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json_text(asdict(row)) for row in self.rows]
        write_atomically(folder / "results.jsonl", "".join(line + "\n" for line in lines))
        write_atomically(folder / "config.json", json_text(self.config, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Results:
        """Read results that `save` wrote.

        Raises:
            PePatchError: A file is missing or damaged.
        """
        folder = Path(directory)
        try:
            lines = json_lines((folder / "results.jsonl").read_text(encoding="utf-8"))
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return cls([_row(line) for line in lines], config)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise PePatchError(f"No readable results in {folder}: {error}") from error

    def __add__(self, other: Results) -> Results:
        return Results(self.rows + other.rows, self.config | other.config)

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=150, force_jupyter=False, force_terminal=False).print(summary_table(self))
        return stream.getvalue()


def _weighted_mean(rows: list[Row], column: str) -> float | None:
    """Average a column over the questions of all rows that have a value; None if no row has one."""
    known = [(value, row.samples) for row in rows if (value := getattr(row, column)) is not None]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None


# Tables


@dataclass(frozen=True)
class Pivot:
    """A table of schemes against lengths for one task and measure."""

    task: str
    measure: str
    lengths: list[int]
    cells: dict[str, list[Cell | None]]
    """For each scheme one cell per length; None if the length was not measured."""
    measured_on: list[str]

    @property
    def higher_is_better(self) -> bool:
        """True for shares of correct answers, False for losses and perplexities."""
        return not is_loss(self.measure)


def is_loss(measure: str) -> bool:
    """Return True if lower is better: a loss, or a number derived from one."""
    name = measure.lower().replace("_", " ")
    return name.startswith("nats") or any(part in name for part in ("perplexity", "longppl", "bits per"))


def measure_title(task: str, measure: str) -> str:
    """Return the heading of a measure: nats per token are a loss, whatever the task is called."""
    return f"{'loss' if measure.startswith('nats') else task}: {measure}"


def sample_unit(measure: str) -> str:
    """Return the plural noun for the samples of a measure."""
    return "tokens" if is_loss(measure) else "questions"


def pivots(results: Results) -> list[Pivot]:
    """Make one pivot per task and measure, in the order of measurement."""
    pairs = dict.fromkeys((row.task, row.measure) for row in results.rows)
    return [_pivot(results, task, measure) for task, measure in pairs]


def _pivot(results: Results, task: str, measure: str) -> Pivot:
    rows = results.select(task=task, measure=measure)
    lengths = sorted({row.length for row in rows})
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    cells = {
        scheme: [results.cell(scheme=scheme, task=task, measure=measure, length=length) for length in lengths]
        for scheme in schemes
    }
    return Pivot(task, measure, lengths, cells, [row.measured_on for row in rows if row.length == lengths[-1]])


def mean_pivot(tables: Sequence[Pivot]) -> Pivot | None:
    """Average the scores of several tasks with equal weights.

    The mean has no interval. Its sample count is the sum over the tasks.

    Returns:
        The averaged pivot, or None unless all tasks share their lengths and schemes.
    """
    first = tables[0]
    if any(pivot.lengths != first.lengths or set(pivot.cells) != set(first.cells) for pivot in tables):
        return None
    columns = range(len(first.lengths))
    cells = {
        scheme: [_mean_cell([pivot.cells[scheme][column] for pivot in tables]) for column in columns]
        for scheme in first.cells
    }
    return Pivot(f"mean of {len(tables)} tasks", "each task weighing the same", first.lengths, cells, [])


def _mean_cell(cells: list[Cell | None]) -> Cell | None:
    known = [cell for cell in cells if cell is not None]
    if len(known) < len(cells):
        return None

    def mean_of(name: str) -> float | None:
        values = [getattr(cell, name) for cell in known]
        return None if None in values else sum(values) / len(values)

    score = sum(cell.score for cell in known) / len(known)
    return Cell(score, None, None, sum(cell.samples for cell in known), mean_of("control"), mean_of("without_context"))


def cell_notes(cell: Cell, unit: str) -> list[str]:
    """Describe the evidence for a score: its sample count and its two controls."""
    notes = [f"{cell.samples:,} {unit}"]
    if cell.control is not None:
        notes.append(f"{cell.control:.3f} within the trained window")
    if cell.without_context is not None:
        notes.append(f"{cell.without_context:.3f} without the context")
    return notes


def format_interval(cell: Cell) -> str:
    """Format the 95 % interval of a cell; empty if it has none."""
    return "" if cell.low is None or cell.high is None else f"{cell.low:.2f} to {cell.high:.2f}"


def summary_table(results: Results) -> Table:
    """Make a table for the terminal with one line per scheme, task, measure and length. Depths are pooled."""
    from rich.table import Table

    settings = [f"{name} {results.config[name]}" for name in ("model", "text", "seed") if name in results.config]
    settings += [f"BOS: {results.config['bos']}"] if "bos" in results.config else []
    table = Table(title=", ".join(["Measured", *settings]), title_justify="left")
    for heading in ("scheme", "measured"):
        table.add_column(heading)
    for heading in ("length", "score", "95 % interval", "counted", "within window", "seconds", "memory"):
        table.add_column(heading, justify="right")
    columns = ("scheme", "task", "measure", "length")
    for key in dict.fromkeys(tuple(getattr(row, name) for name in columns) for row in results.rows):
        table.add_row(*_summary_line(results, dict(zip(columns, key, strict=True))))
    return table


def _summary_line(results: Results, key: dict[str, str | int]) -> list[str]:
    cell, rows = results.cell(**key), results.select(**key)
    assert cell is not None
    memory = max((row.peak_memory for row in rows if row.peak_memory is not None), default=None)
    return [
        str(key["scheme"]),
        measure_title(str(key["task"]), str(key["measure"])),
        str(key["length"]),
        f"{cell.score:.3f}",
        format_interval(cell) or "-",
        f"{cell.samples} {sample_unit(str(key['measure']))}",
        "-" if cell.control is None else f"{cell.control:.3f} at {rows[0].control_length}",
        f"{sum(row.seconds for row in rows):.1f}",
        "-" if memory is None else f"{memory / 2**20:.0f} MiB",
    ]


# Files


def check_results_folder(
    directory: str | os.PathLike[str], *, scheme: str | None = None, inputs: Iterable[Any] = (), overwrite: bool = False
) -> None:
    """Check that an evaluation may write to a folder.

    Args:
        directory: Output folder.
        scheme: Name of the scheme to measure. The folder must not hold results of another scheme, which this run
            would replace. None skips this check.
        inputs: Folders that the run reads and must not write to.
        overwrite: Allow a folder that holds something else.

    Raises:
        OutputError: The folder is an input, or it holds something else and `overwrite` is False.
    """
    folder = check_output(directory, EVALUATION, inputs=inputs, overwrite=overwrite)
    if scheme is None or overwrite:
        return
    try:
        previous = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("scheme", scheme)
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # no finished results, or none that can be read
    if previous != scheme:
        raise OutputError(
            f"{directory} holds the results of {previous!r}, and this run would replace them with those of {scheme!r}. "
            "Give another folder, or --overwrite (overwrite=True in Python) to replace them."
        )


def json_lines(text: str) -> list[dict[str, Any]]:
    """Parse JSON lines.

    `str.splitlines` would also split at U+2028, U+0085 and other characters, which JSON strings may hold as they are.
    """
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as standard JSON: NaN and infinities, which it has no words for, become null."""
    return json.dumps(finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """Return a JSON-able value with None in place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


NUMBERS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("length", "tokens", "samples"), (int,)),
    **dict.fromkeys(("score", "low", "high", "depth", "control", "without_context"), (int, float, type(None))),
}
"""Types of the numbers in a row."""


def row_of(values: Any) -> Row:
    """Make a row from its values in a file.

    Raises:
        TypeError: a value is missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise TypeError("a row must be an object")
    row = Row(**values)
    for name, kinds in {**NUMBERS, "details": (dict,)}.items():
        value = getattr(row, name)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{name} is {quoted(value)}")
    return row


def _row(line: dict[str, Any]) -> Row:
    """Make a row from its JSON, in which a score or a loss of null was NaN or infinite."""
    row = row_of(line)
    for bucket in row.details.get("buckets", ()):
        bucket["loss"] = math.nan if bucket["loss"] is None else bucket["loss"]
    return replace(row, score=math.nan) if row.score is None else row


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file in one step, so that no reader and no crash ever sees half of it."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)  # mkstemp creates files that only their owner can read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
