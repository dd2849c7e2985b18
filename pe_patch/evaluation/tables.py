"""How results are laid out: one line per measurement, or schemes against lengths."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from .results import Cell, Results


@dataclass(frozen=True)
class Pivot:
    """One task and measure: `cells[scheme][i]` belongs to `lengths[i]`; None where it was not measured."""

    task: str
    measure: str
    lengths: list[int]
    cells: dict[str, list[Cell | None]]
    measured_on: list[str]

    @property
    def counts(self) -> bool:
        """Whether scores are shares of questions (more is better) rather than losses (less is better)."""
        return not is_loss(self.measure)


def is_loss(measure: str) -> bool:
    """Whether less is better: losses, and what is made from them."""
    words = measure.lower().replace("_", " ")
    return words.startswith("nats") or any(name in words for name in ("perplexity", "longppl", "bits per"))


def unit(measure: str) -> str:
    """What the samples of a measure are."""
    return "tokens" if is_loss(measure) else "questions"


def pivots(results: Results) -> list[Pivot]:
    """One pivot for each task and measure, in the order measured."""
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


def mean_pivot(found: list[Pivot]) -> Pivot | None:
    """The mean of several tasks' scores, each task weighing the same; None unless all share lengths and schemes.

    It has no interval; its samples are those of all tasks.
    """
    first = found[0]
    if any(pivot.lengths != first.lengths or set(pivot.cells) != set(first.cells) for pivot in found):
        return None
    columns = range(len(first.lengths))
    cells = {
        name: [_mean([pivot.cells[name][column] for pivot in found]) for column in columns] for name in first.cells
    }
    return Pivot(f"mean of {len(found)} tasks", "each task weighing the same", first.lengths, cells, [])


def _mean(cells: list[Cell | None]) -> Cell | None:
    known = [cell for cell in cells if cell is not None]
    if len(known) < len(cells):
        return None

    def over(name: str) -> float | None:
        values = [getattr(cell, name) for cell in known]
        return None if None in values else sum(values) / len(values)

    score = sum(cell.score for cell in known) / len(known)
    return Cell(score, None, None, sum(cell.samples for cell in known), over("control"), over("without_context"))


def words(cell: Cell, counted: str) -> list[str]:
    """What stands behind a score, in words: how much it counts, and its two controls."""
    found = [f"{cell.samples:,} {counted}"]
    if cell.control is not None:
        found.append(f"{cell.control:.3f} within the trained window")
    if cell.without_context is not None:
        found.append(f"{cell.without_context:.3f} without the context")
    return found


def interval(cell: Cell) -> str:
    return "" if cell.low is None or cell.high is None else f"{cell.low:.2f} to {cell.high:.2f}"


def summary(results: Results) -> Table:
    """One line per scheme, task, measure and length; depths are pooled."""
    named = [f"{name} {results.config[name]}" for name in ("model", "text", "seed") if name in results.config]
    table = Table(title=", ".join(["Measured", *named]), title_justify="left")
    for name in ("scheme", "measured"):
        table.add_column(name)
    for name in ("length", "score", "95 % interval", "counted", "within window", "seconds", "memory"):
        table.add_column(name, justify="right")
    names = ("scheme", "task", "measure", "length")
    for key in dict.fromkeys(tuple(getattr(row, name) for name in names) for row in results.rows):
        table.add_row(*_line(results, dict(zip(names, key, strict=True))))
    return table


def _line(results: Results, key: dict[str, str | int]) -> list[str]:
    cell, rows = results.cell(**key), results.select(**key)
    assert cell is not None
    memory = max((row.peak_memory for row in rows if row.peak_memory is not None), default=None)
    return [
        str(key["scheme"]),
        f"{key['task']}: {key['measure']}",
        str(key["length"]),
        f"{cell.score:.3f}",
        interval(cell) or "-",
        f"{cell.samples} {unit(str(key['measure']))}",
        "-" if cell.control is None else f"{cell.control:.3f} at {rows[0].control_length}",
        f"{sum(row.seconds for row in rows):.1f}",
        "-" if memory is None else f"{memory / 2**20:.0f} MiB",
    ]
