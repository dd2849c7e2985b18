"""Write the results of an evaluation as a self-contained HTML page: verdict, tables, charts and configuration.

A caller adds its own content, such as the table of a comparison, as `Section`s directly below the verdict:

    from pe_patch.evaluation.charts import dots
    from pe_patch.evaluation.report import Entry, Section, write_report

    table = Section(
        "Schemes at 8 x the window",
        text="One paragraph.",
        columns=["scheme", "retrieval", "loss"],
        rows=[["yarn", Entry("0.94", 0.94, small="0.81 to 0.99", hint="35 questions", best=True), Entry("2.91", 2.91)]],
        caption="Each number counts 35 questions; more is better.",
        sortable=True,
        charts=[dots([{"label": "yarn", "column": "retrieval", "value": 0.94, "low": 0.81, "high": 0.99,
                       "samples": "35 questions", "measured_on": "..."}],
                     name="schemes", title="Schemes at 8 x the window", subtitle="35 questions, model, text")],
    )
    write_report(results, "report", sections=[table])

`dots` makes one panel per `column`. The page's folder also gets the chart as `schemes.png`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PePatchError
from .charts import DARK, LIGHT, Chart, charts_of, theme
from .charts.libraries import jinja2, vl_convert
from .results import (
    Cell,
    Pivot,
    Results,
    Row,
    cell_notes,
    format_interval,
    mean_pivot,
    measure_title,
    pivots,
    sample_unit,
    write_atomically,
)

__all__ = ["Entry", "Section", "best_retrieval", "write_report"]

MAX_OPEN_TABLES = 3
"""Up to this many task tables are shown open. More are folded below a table of their mean."""
MAX_EXAMPLES = 60
"""Answers on the page. results.jsonl has all of them."""


@dataclass(frozen=True)
class Entry:
    """One cell of a table on the page."""

    shown: str
    value: float | None = None
    """Sort key. None sorts by the number in `shown`, or alphabetically."""
    small: str = ""
    """Small print below, such as the interval."""
    hint: str = ""
    """Tooltip. It must not be the only place that has this information."""
    best: bool = False
    text: bool = False
    """Left-aligned text that may wrap, rather than a number."""


@dataclass(frozen=True)
class Section:
    """A titled part of the page with an optional paragraph, table and charts. All text is escaped."""

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Entry | str]] = ()
    """One `Entry` or plain string per column. The first one is the row heading."""
    caption: str = ""
    """Text below the table: how many samples its numbers count, and which direction is better."""
    charts: Sequence[Chart] = ()
    folded: bool = False
    """Collapse the section until the reader clicks on it."""
    sortable: bool = False
    """Add sortable headings and a filter field to the table."""
    parts: Sequence[Section] = field(default_factory=tuple)
    """Nested sections."""


def write_report(
    results: Results,
    directory: str | os.PathLike[str],
    *,
    title: str = "Evaluation",
    verdict: str | None = None,
    command: str | None = None,
    notes: Sequence[str] = (),
    frequencies: Mapping[str, np.ndarray] | None = None,
    sections: Sequence[Section] = (),
    overwrite: bool = False,
) -> Path:
    """Write index.html, one PNG per chart, results.jsonl and config.json.

    The page loads nothing from a network. It contains the chart library, and its Content-Security-Policy forbids every
    script except the two that it ships. All text is escaped.

    Args:
        results: Rows to report.
        directory: Output folder.
        title: Page title.
        verdict: One sentence for the top of the page. None writes one about the best retrieval at the longest length.
        command: Command line that reproduces the results.
        notes: Remarks for the page.
        frequencies: Inverse frequencies [pairs] by scheme name, for the chart of wavelengths.
        sections: Sections between the verdict and the standard tables.
        overwrite: Write even if the folder holds something other than an evaluation.

    Returns:
        The path of index.html.

    Raises:
        PePatchError: There are no rows, or two charts have the same name.
        OutputError: The folder holds something other than an evaluation and `overwrite` is False.
    """
    if not results.rows:
        raise PePatchError("There are no rows to report.")
    folder = results.save(directory, overwrite=overwrite)
    measured_on = results.values("measured_on")
    result_charts = charts_of(results, frequencies)
    details = [_examples_section(results), _rows_section(results, measured_on)]
    page = {
        "sections": sections,
        "scores": [*_effective_length_sections(results), *_score_sections(results)],
        "charts": result_charts,
        "details": [section for section in details if section is not None],
    }
    charts = [*(chart for section in sections for chart in _charts_in(section)), *result_charts]
    _check_chart_names(charts)
    for chart in charts:
        write_atomically(folder / f"{chart.name}.png", chart.png())
    hashes = [(f"hash of the {what}", _plain_text(results.values(f"{what}_hash"))) for what in ("text", "tokenizer")]
    scripts = [_chart_library(), _template_source("report.js")]
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            **page,
            title=title,
            verdict=verdict or best_retrieval(results),
            command=command,
            notes=notes,
            measured_on=measured_on,
            config=[
                *((name.replace("_", " "), _plain_text(value)) for name, value in results.config.items()),
                *hashes,
            ],
            specifications=_embedded_json({chart.name: chart.specifications() for chart in charts}),
            themes=_embedded_json({"light": theme(LIGHT), "dark": theme(DARK)}),
            style=_template_source("report.css"),
            scripts=scripts,
            digests=[_csp_digest(script) for script in scripts],
        )
    )
    write_atomically(folder / "index.html", html)
    return folder / "index.html"


def best_retrieval(results: Results) -> str:
    """Return a sentence about the best scheme of the first retrieval task at its longest length."""
    pivot = next((pivot for pivot in pivots(results) if pivot.higher_is_better), None)
    if pivot is None:
        return "Only loss was measured here; that alone does not show that the context is used."
    last = {scheme: cell for scheme, cells in pivot.cells.items() if (cell := cells[-1]) is not None}
    best = max(last, key=lambda scheme: last[scheme].score)
    cell = last[best]
    sentence = (
        f"At {pivot.lengths[-1]} tokens {best} answers {cell.score:.0%} of {cell.samples} questions "
        f"({pivot.task}; 95 % interval {format_interval(cell)})"
    )
    measured = results.select(scheme=best, task=pivot.task, measure=pivot.measure, length=pivot.lengths[-1])[0]
    if cell.control is not None and (measured.control_length or 0) < measured.length:
        sentence += f", against {cell.control:.0%} of the same questions within the trained window"
    return sentence + "."


# Sections of every report


def _effective_length_sections(results: Results) -> list[Section]:
    """Make a table of effective lengths by RULER's rule; empty if no task of RULER was measured."""
    from .effective import THRESHOLD, effective_length
    from .tasks.ruler import RULER

    if not any(row.task in RULER for row in results.rows):
        return []
    by_scheme = effective_length(results)
    rows = [
        (
            scheme,
            Entry(_format_effective_length(entry), entry["effective"] or 0),
            *(Entry(f"{entry[name]:.3f}", entry[name]) for name in ("average", "rising", "falling")),
        )
        for scheme, entry in by_scheme.items()
    ]
    first = next(iter(by_scheme.values()))
    because = f" This differs from RULER's own figure: {'; '.join(first['because'])}." if first["because"] else ""
    return [
        Section(
            "Effective length",
            columns=("scheme", "effective length", "mean", "longer lengths weigh more", "shorter lengths weigh more"),
            rows=rows,
            caption=f"The greatest length, in tokens, at which the mean of {len(first['tasks'])} RULER tasks "
            f"({first['of_thirteen']} of RULER's thirteen) is above {THRESHOLD:.1%}, the score of Llama-2-7B-chat at "
            f"4,096 tokens.{because}",
        )
    ]


def _format_effective_length(entry: Mapping[str, Any]) -> str:
    if entry["effective"] is None:
        return "none measured"
    return f"{entry['effective']:,}{' or more' if entry['at_least'] else ''}"


def _score_sections(results: Results) -> list[Section]:
    """Make a table of schemes against lengths per task and measure; many tasks are folded below their mean."""
    every_pivot = pivots(results)
    question_pivots = [pivot for pivot in every_pivot if pivot.higher_is_better]
    losses = [_pivot_section(pivot) for pivot in every_pivot if not pivot.higher_is_better]
    tables = [_pivot_section(pivot) for pivot in question_pivots]
    if len(tables) > MAX_OPEN_TABLES:
        mean = mean_pivot(question_pivots)
        folded = Section(f"Tables of the {len(tables)} tasks", folded=True, parts=tables)
        tables = [*([] if mean is None else [_pivot_section(mean)]), folded]
    return [*tables, *losses]


def _pivot_section(pivot: Pivot) -> Section:
    cells = [cell for line in pivot.cells.values() for cell in line if cell is not None]
    controls = "; ".join(
        name
        for name, measured in (
            ("the same within the trained window", any(cell.control is not None for cell in cells)),
            ("without the context", any(cell.without_context is not None for cell in cells)),
        )
        if measured
    )
    samples = _format_range({cell.samples for cell in cells})
    caption = f"Columns: tokens given to the model. Each number counts {samples} {sample_unit(pivot.measure)}"
    caption += "; below it the 95 % interval" * any(cell.low is not None for cell in cells)
    direction = "Higher" if pivot.higher_is_better else "Lower"
    caption += f". {direction} is better; the best of each column is in colour."
    if controls:
        caption += f" Hover over a number to see its controls ({controls}); the table of every row also has them."
    lines = [
        [scheme, *(_score_entry(cell, column, pivot) for column, cell in enumerate(line))]
        for scheme, line in pivot.cells.items()
    ]
    title = measure_title(pivot.task, pivot.measure)
    title = title[:1].upper() + title[1:]
    return Section(title, columns=["scheme", *(f"{length:,}" for length in pivot.lengths)], rows=lines, caption=caption)


def _score_entry(cell: Cell | None, column: int, pivot: Pivot) -> Entry:
    if cell is None:
        return Entry("-")
    scores = [round(other.score, 3) for line in pivot.cells.values() if (other := line[column]) is not None]
    best = (max if pivot.higher_is_better else min)(scores)
    return Entry(
        f"{cell.score:.3f}",
        cell.score,
        format_interval(cell),
        "; ".join(cell_notes(cell, sample_unit(pivot.measure))),
        best=len(scores) > 1 and round(cell.score, 3) == best,
    )


def _examples_section(results: Results) -> Section | None:
    """Make a table of answers to the longest prompts of each scheme and task; None if no row has examples."""
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
    share = max(1, MAX_EXAMPLES // len(longest))
    lines = []
    for kept in longest.values():
        # one example of each depth before a second one of any depth
        answers = [(row, example) for row in kept for example in row.details["examples"]]
        answers.sort(key=lambda pair: pair[0].details["examples"].index(pair[1]))
        lines += [_example_line(row, example) for row, example in answers[:share]]
    return Section(
        "Answers of the model, verbatim",
        columns=["scheme", "task", "length", "depth", "score", "end of the question", "answer", "correct answer"],
        rows=lines,
        caption="The longest prompts of each scheme and task. The first few questions are shown, whatever their score.",
        folded=True,
        sortable=True,
    )


def _example_line(row: Row, example: Mapping[str, Any]) -> list[Entry | str]:
    references = example["references"]
    return [
        row.scheme,
        Entry(row.task, text=True),
        Entry(f"{row.length:,}", row.length),
        Entry("-" if row.depth is None else f"{row.depth:.0%}", row.depth),
        Entry(f"{example['score']:.2f}", example["score"]),
        Entry(str(example["question"]), text=True),
        Entry(str(example["prediction"]), text=True),
        Entry(references if isinstance(references, str) else ", ".join(map(str, references)), text=True),
    ]


def _rows_section(results: Results, measured_on: Sequence[str]) -> Section:
    """Make a sortable table of every row; its last column is a number in the list `measured_on`."""
    columns = (
        "scheme", "task", "measure", "length", "tokens given", "depth", "score", "low", "high", "counted",
        "within the window", "without context", "seconds", "MiB", "seed", "text", "tokenizer", "measured on",
    )  # fmt: skip
    numbers = {sentence: number for number, sentence in enumerate(measured_on, 1)}
    return Section(
        f"Every row ({len(results.rows):,})",
        columns=columns,
        rows=[_row_line(row, numbers[row.measured_on]) for row in results.rows],
        caption="Low and high are the ends of the 95 % interval. The last column refers to the list below.",
        folded=True,
        sortable=True,
    )


def _row_line(row: Row, number: int) -> list[Entry | str]:
    return [
        row.scheme,
        Entry(row.task, text=True),
        Entry(row.measure, text=True),
        Entry(f"{row.length:,}", row.length),
        Entry(f"{row.tokens:,}", row.tokens),
        Entry("-" if row.depth is None else f"{row.depth:.0%}", row.depth),
        *(_number_entry(value, ".3f") for value in (row.score, row.low, row.high)),
        Entry(f"{row.samples:,}", row.samples),
        *(_number_entry(value, ".3f") for value in (row.control, row.without_context)),
        _number_entry(row.seconds, ",.1f"),
        _number_entry(None if row.peak_memory is None else row.peak_memory / 2**20, ",.0f"),
        str(row.seed),
        Entry(row.text_hash, text=True),
        Entry(row.tokenizer_hash, text=True),
        str(number),
    ]


def _number_entry(value: float | None, style: str) -> Entry:
    return Entry("-") if value is None else Entry(format(value, style), value)


def _format_range(counts: set[int]) -> str:
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"


# The page


def _charts_in(section: Section) -> Iterator[Chart]:
    yield from section.charts
    for nested in section.parts:
        yield from _charts_in(nested)


def _check_chart_names(charts: Sequence[Chart]) -> None:
    """Raise `PePatchError` if two charts would write the same PNG."""
    names = [chart.name for chart in charts]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise PePatchError(
            f"Two charts are called {', '.join(duplicates)}. Chart names must be unique: each names a PNG."
        )


def _plain_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain_text, value))
    return str(value)


def _embedded_json(value: Any) -> str:
    """Return JSON without any character that could end a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def _chart_library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one minified script that defines `window.vegaEmbed`."""

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    if "</script" in script.lower() or "<script" in script.lower():
        raise PePatchError("The chart library contains a script tag and cannot be embedded in a page.")
    return script


@cache
def _template_source(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _csp_digest(script: str) -> str:
    """Return the SHA-256 source expression of a script for a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pe_patch.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
