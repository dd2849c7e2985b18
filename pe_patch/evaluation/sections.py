"""What a page is made of: titled tables and charts; and those that every evaluation has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .charts import Chart
from .results import Cell, Results, Row
from .tables import Pivot, interval, mean_pivot, pivots, unit, words

OPEN_TABLES = 3
"""Tasks whose tables are shown unfolded; those of more tasks stand below their mean, to be opened."""
EXAMPLES = 60
"""Answers shown on a page; all are in results.jsonl."""


@dataclass(frozen=True)
class Entry:
    """One place in a table."""

    shown: str
    value: float | None = None
    """What sorting goes by; without it, numbers in `shown` or its letters."""
    small: str = ""
    """Small print below, such as the interval."""
    hint: str = ""
    """Told when a pointer rests on it; never the only place where something is told."""
    best: bool = False
    text: bool = False
    """Words that may wrap, at the left, rather than a number."""


@dataclass(frozen=True)
class Section:
    """A titled part of the page: a paragraph, a table and charts, each of which may be missing.

    `rows` have one `Entry` (or plain string) for each of `columns`; the first is the line's heading. `caption` stands
    below the table: how many samples its numbers count, which way is better. `folded` sections open on a click, those
    that are `sortable` have a heading that sorts and a field that filters. Everything is escaped.
    """

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Entry | str]] = ()
    caption: str = ""
    charts: Sequence[Chart] = ()
    folded: bool = False
    sortable: bool = False
    parts: Sequence[Section] = field(default_factory=tuple)
    """Sections within this one."""


def score_sections(results: Results) -> list[Section]:
    """Schemes against lengths for each task and measure; many tasks stand folded below their mean."""
    found = pivots(results)
    asked = [pivot for pivot in found if pivot.counts]
    losses = [_table(pivot) for pivot in found if not pivot.counts]
    tables = [_table(pivot) for pivot in asked]
    if len(tables) > OPEN_TABLES:
        mean = mean_pivot(asked)
        folded = Section(f"Tables of the {len(tables)} tasks", folded=True, parts=tables)
        tables = [*([] if mean is None else [_table(mean)]), folded]
    return [*tables, *losses]


def effective_sections(results: Results) -> list[Section]:
    """How long a context each scheme really uses, by RULER's rule; nothing where none of its tasks was measured."""
    from .effective import THRESHOLD, effective_length
    from .tasks.ruler import RULER

    if not any(row.task in RULER for row in results.rows):
        return []
    found = effective_length(results)
    rows = [
        (
            scheme,
            Entry(_reach(entry), entry["effective"] or 0),
            *(Entry(f"{entry[name]:.3f}", entry[name]) for name in ("average", "rising", "falling")),
        )
        for scheme, entry in found.items()
    ]
    first = next(iter(found.values()))
    because = f" It is not RULER's own figure: {'; '.join(first['because'])}." if first["because"] else ""
    return [
        Section(
            "Effective length",
            columns=("scheme", "effective length", "mean", "longer lengths weigh more", "shorter lengths weigh more"),
            rows=rows,
            caption=f"The greatest length, in tokens, at which the mean of {len(first['tasks'])} of its tasks "
            f"({first['of_thirteen']} of RULER's thirteen) is above {THRESHOLD:.1%}, what Llama-2-7B-chat has at 4,096."
            f"{because}",
        )
    ]


def _reach(entry: Mapping[str, Any]) -> str:
    if entry["effective"] is None:
        return "none measured"
    return f"{entry['effective']:,}{' or more' if entry['at_least'] else ''}"


def _table(pivot: Pivot) -> Section:
    cells = [cell for line in pivot.cells.values() for cell in line if cell is not None]
    controls = "; ".join(
        name
        for name, given in (
            ("the same within the trained window", any(cell.control is not None for cell in cells)),
            ("without the context", any(cell.without_context is not None for cell in cells)),
        )
        if given
    )
    counted = _range({cell.samples for cell in cells})
    caption = f"Columns: tokens given to the model. Each number counts {counted} {unit(pivot.measure)}"
    caption += "; below it the 95 % interval" * any(cell.low is not None for cell in cells)
    caption += f". {'More' if pivot.counts else 'Less'} is better; the best of each column is in colour."
    if controls:
        caption += f" Resting on a number tells its controls ({controls}); they also stand in the table of every row."
    lines = [
        [scheme, *(_score(cell, column, pivot) for column, cell in enumerate(line))]
        for scheme, line in pivot.cells.items()
    ]
    title = f"{pivot.task.capitalize()}: {pivot.measure}"
    return Section(title, columns=["scheme", *(f"{length:,}" for length in pivot.lengths)], rows=lines, caption=caption)


def _score(cell: Cell | None, column: int, pivot: Pivot) -> Entry:
    if cell is None:
        return Entry("-")
    scores = [round(other.score, 3) for line in pivot.cells.values() if (other := line[column]) is not None]
    best = (max if pivot.counts else min)(scores)
    return Entry(
        f"{cell.score:.3f}",
        cell.score,
        interval(cell),
        "; ".join(words(cell, unit(pivot.measure))),
        best=len(scores) > 1 and round(cell.score, 3) == best,
    )


def examples_section(results: Results) -> Section | None:
    """What the models answered to the longest prompts, a few of each scheme and task; None where no row keeps any."""
    rows = [row for row in results.rows if row.details.get("examples")]
    if not rows:
        return None
    longest: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kept = longest.setdefault((row.task, row.scheme), [])
        if kept and kept[0].length < row.length:
            kept.clear()
        if not kept or kept[0].length == row.length:
            kept.append(row)
    share = max(1, EXAMPLES // len(longest))
    lines = []
    for kept in longest.values():
        # one of each depth before a second of any
        answers = [(row, one) for row in kept for one in row.details["examples"]]
        answers.sort(key=lambda pair: pair[0].details["examples"].index(pair[1]))
        lines += [_example(row, one) for row, one in answers[:share]]
    return Section(
        "Answers, as the model gave them",
        columns=["scheme", "task", "length", "depth", "score", "end of the question", "answer", "right would be"],
        rows=lines,
        caption="Of the greatest length of each scheme and task; picked by number, not by how good they are.",
        folded=True,
        sortable=True,
    )


def _example(row: Row, one: Mapping[str, Any]) -> list[Entry | str]:
    references = one["references"]
    return [
        row.scheme,
        Entry(row.task, text=True),
        Entry(f"{row.length:,}", row.length),
        Entry("-" if row.depth is None else f"{row.depth:.0%}", row.depth),
        Entry(f"{one['score']:.2f}", one["score"]),
        Entry(str(one["question"]), text=True),
        Entry(str(one["prediction"]), text=True),
        Entry(references if isinstance(references, str) else ", ".join(map(str, references)), text=True),
    ]


def rows_section(results: Results, measured_on: Sequence[str]) -> Section:
    """Every row, to be sorted and filtered; `measured_on` is the list that the last column counts in."""
    columns = (
        "scheme", "task", "measure", "length", "tokens given", "depth", "score", "low", "high", "counted",
        "within the window", "without context", "seconds", "MiB", "seed", "text", "tokenizer", "measured on",
    )  # fmt: skip
    numbers = {sentence: number for number, sentence in enumerate(measured_on, 1)}
    return Section(
        f"Every row ({len(results.rows):,})",
        columns=columns,
        rows=[_row(row, numbers[row.measured_on]) for row in results.rows],
        caption="Low and high bound the 95 % interval. The last column is a number of the list below.",
        folded=True,
        sortable=True,
    )


def _row(row: Row, number: int) -> list[Entry | str]:
    return [
        row.scheme,
        Entry(row.task, text=True),
        Entry(row.measure, text=True),
        Entry(f"{row.length:,}", row.length),
        Entry(f"{row.tokens:,}", row.tokens),
        Entry("-" if row.depth is None else f"{row.depth:.0%}", row.depth),
        *(_number(value, ".3f") for value in (row.score, row.low, row.high)),
        Entry(f"{row.samples:,}", row.samples),
        *(_number(value, ".3f") for value in (row.control, row.without_context)),
        _number(row.seconds, ",.1f"),
        _number(None if row.peak_memory is None else row.peak_memory / 2**20, ",.0f"),
        str(row.seed),
        Entry(row.text_hash, text=True),
        Entry(row.tokenizer_hash, text=True),
        str(number),
    ]


def _number(value: float | None, style: str) -> Entry:
    return Entry("-") if value is None else Entry(format(value, style), value)


def _range(counts: set[int]) -> str:
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
