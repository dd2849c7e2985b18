"""Show a comparison: tables in the terminal, in Markdown and on the report page, and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..evaluation.charts.chart import Chart
from ..evaluation.charts.components import heat_map, tooltips
from ..evaluation.charts.libraries import alt
from ..evaluation.report import Entry, Section, write_report
from ..evaluation.results import write_atomically
from .compared_scheme import without_factor
from .comparison import Comparison, Line
from .settings import write_json

Column = tuple[str, Callable[[Line], float | None], Callable[[float], str]]
"""A heading, a function from a line of the table to its number, and a function that formats the number."""

HOW_TO_READ = (
    "Forward, decode and train: time relative to the unpatched model, measured in turns in one process, median over "
    "rounds. Parameters: added by the scheme. Memory: peak of a forward pass at the greatest length, above its start. "
    "Cache: bytes per token over all layers. Loss is in nats per token; its change is relative to the unpatched model "
    "on the same tokens."
)


def columns(comparison: Comparison) -> list[Column]:
    """Return the columns that have a number in some line: costs first, then scores by length."""
    short = comparison.settings.short
    every: list[Column] = [
        ("forward", lambda line: line["forward"], "x {:.2f}".format),
        ("decode", lambda line: line["decode"], "x {:.2f}".format),
        ("train", lambda line: line["train"], "x {:.2f}".format),
        ("parameters", lambda line: line["parameters_added"], "{:+,.0f}".format),
        ("memory", lambda line: line["peak_memory"], lambda size: f"{size / 2**20:,.1f} MiB"),
        ("cache", lambda line: line["cache_bytes_per_token"], "{:,.0f} B".format),
        (f"loss {short:,}", lambda line: line["loss"].get(short), "{:.3f}".format),
        ("change of loss", lambda line: line["loss_change"], "{:+.3f}".format),
        (f"retrieval {short:,}", lambda line: line["retrieval"].get(short), "{:.2f}".format),
    ]
    for length in [length for length in comparison.settings.lengths if length != short]:
        every += [
            (f"loss {length:,}", lambda line, length=length: line["loss"].get(length), "{:.3f}".format),
            (f"retrieval {length:,}", lambda line, length=length: line["retrieval"].get(length), "{:.2f}".format),
        ]
    lines = [line for line in comparison.table() if line["why"] is None]
    return [column for column in every if any(column[1](line) is not None for line in lines)]


def cells(line: Line, of: Sequence[Column]) -> list[tuple[str, float | None]]:
    """Return the text and the number of a line in each column."""
    values = [value(line) for _, value, _ in of]
    return [("-" if value is None else shown(value), value) for value, (_, _, shown) in zip(values, of, strict=True)]


def terminal(comparison: Comparison) -> list[Table]:
    """Return two tables for the terminal: the costs of each scheme, and its scores at each length."""
    of = columns(comparison)
    costs = [column for column in of if not column[0].startswith(("loss ", "retrieval "))]
    table = Table(title=f"Cost of each scheme on {comparison.settings.model}", title_justify="left")
    scores = Table(title="Retrieval / loss by length in tokens", title_justify="left", caption_justify="left")
    scores.caption = "; ".join(notes(comparison)) or None
    headings = ([heading for heading, _, _ in costs], [f"{length:,}" for length in comparison.settings.lengths])
    for target, names in zip((table, scores), headings, strict=True):
        target.add_column("scheme")
        for name in names:
            target.add_column(name, justify="right", no_wrap=True)
    for line in comparison.table():
        if line["why"] is not None:
            table.add_row(line["scheme"], *["-"] * len(costs))
            continue
        table.add_row(line["scheme"], *(shown for shown, _ in cells(line, costs)))
        pairs = [(line["retrieval"].get(length), line["loss"].get(length)) for length in comparison.settings.lengths]
        scores.add_row(line["scheme"], *(" / ".join((_shown(a, 2), _shown(b, 3))) for a, b in pairs))
    return [table, scores]


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(comparison: Comparison) -> str:
    """Return the table as Markdown."""
    of = columns(comparison)
    lines = [
        "| " + " | ".join(["scheme", *(heading for heading, _, _ in of)]) + " |",
        "| --- |" + " ---: |" * len(of),
    ]
    for line in comparison.table():
        shown = [text for text, _ in cells(line, of)] if line["why"] is None else ["-"] * len(of)
        lines.append("| " + " | ".join([line["scheme"], *shown]) + " |")
    return "\n".join(lines) + "\n"


def notes(comparison: Comparison) -> list[str]:
    """Return notes on single lines of the table."""
    texts = [f"{label} cannot work here: {reason}" for label, reason in comparison.unsupported.items()]
    texts += [f"{label} failed: {reason}" for label, reason in comparison.failures.items()]
    bounded = {
        line["scheme"]: line["positions"] for line in comparison.table() if line["why"] is None and line["positions"]
    }
    texts += [f"{label} has only {most:,} positions" for label, most in bounded.items()]
    given = [entry for entry in comparison.settings.contenders if "factor" in entry.options]
    if given and (others := without_factor(comparison.settings.contenders)):
        texts.append(f"no factor was set for {', '.join(others)}")
    return texts


def write(
    comparison: Comparison, folder: Path, *, title: str, command: str | None = None, more: Sequence[str] = ()
) -> Path:
    """Write the page, the picture, `table.md` and `comparison.json`, and return the page's path."""
    labels = ", ".join(comparison.rows.values("scheme"))
    comparison.rows.config |= {
        "model": comparison.settings.model,
        "scheme": labels,
        "window": comparison.settings.window,
    }
    section = Section(
        "Scores and costs of each scheme",
        columns=["scheme", *(heading for heading, _, _ in columns(comparison))],
        rows=_rows(comparison),
        caption=HOW_TO_READ,
        sortable=True,
        charts=[picture(comparison, "comparison")] if comparison.rows.rows else [],
    )
    write_json(folder / "comparison.json", comparison.to_dict())
    write_atomically(folder / "table.md", markdown(comparison))
    return write_report(
        comparison.rows,
        folder,
        title=title,
        verdict=verdict(comparison),
        command=command,
        notes=[*notes(comparison), *more],
        sections=[section],
        overwrite=True,  # the comparison already checked the folder
    )


def verdict(comparison: Comparison) -> str:
    """Return a sentence with the best scheme at the greatest length, its loss within the window, and the reference."""
    lines = [line for line in comparison.table() if line["why"] is None]
    longest, short = comparison.settings.lengths[-1], comparison.settings.short
    answering = [line for line in lines if longest in line["retrieval"]]
    if not answering:
        return f"No scheme was measured at {longest:,} tokens."
    best = max(answering, key=lambda line: line["retrieval"][longest])
    share = best["retrieval"][longest]
    level = [line["scheme"] for line in answering if f"{line['retrieval'][longest]:.0%}" == f"{share:.0%}"]
    start = comparison.settings.contenders[0].label
    base = next((line for line in answering if line["scheme"] == start), None)
    sentence = (
        f"At {longest:,} tokens {' and '.join(level) if len(level) < 4 else f'{len(level)} of {len(answering)}'} "
    )
    sentence += f"answer{'s' if len(level) == 1 else ''} {share:.0%} of the questions"
    if base is not None and start not in level:
        sentence += f", {base['scheme']} {base['retrieval'][longest]:.0%}"
    if len(level) == 1 and best["loss_change"] is not None:
        sentence += f"; at {short:,} tokens its loss is {best['loss_change']:+.3f} nats from that of {start}"
    return sentence + "."


def picture(comparison: Comparison, name: str, title: str = "Within the window and beyond it") -> Chart:
    """Draw retrieval and loss by scheme and length as two heat maps."""
    lines = [line for line in comparison.table() if line["why"] is None]
    labels = [line["scheme"] for line in lines]
    short = comparison.settings.short
    panels = []
    for measure, what in (("retrieval", "share of questions answered"), ("loss", "loss (nats per token)")):
        scores = {
            line["scheme"]: {length: value for length, value in line[measure].items() if math.isfinite(value)}
            for line in lines
        }
        least = min((value for by_length in scores.values() for value in by_length.values()), default=0.0)
        marks = [
            {
                "scheme": label, "column": _times(length, short), "length": f"{length:,} tokens",
                # one colour scale for both: yellow is good
                "score": value if measure == "retrieval" else max(0.0, 1 - (value - least) / LOSS_SPAN),
                "short": f"{value:.2f}", "number": f"{value:.3f}",
            }
            for label, by_length in scores.items() for length, value in by_length.items()
        ]  # fmt: skip
        if marks:
            panels.append(
                _panel(marks, labels, [_times(length, short) for length in comparison.settings.lengths], what)
            )
    settings = comparison.settings
    subtitle = f"Window {short:,} tokens; {settings.samples} questions at each length; text: {settings.text}; seed "
    subtitle += f"{settings.seed}. Yellow is good; an empty cell was not measured or has no positions."
    return Chart(name, title, tuple(panels), subtitle, CAPTION, columns=len(panels))


CAPTION = (
    "Each line is a scheme, each column a length. Yellow is good: all questions answered, or the lowest loss. An empty "
    "cell was not measured, or the scheme has no positions there."
)
LOSS_SPAN = 2.0
"""Nats above the lowest loss at which the colour scale ends."""


def _panel(marks: list[Line], labels: list[str], lengths: list[str], title: str) -> Any:
    x = alt.X(
        "column:N", title="length, in windows", sort=lengths, scale=alt.Scale(domain=lengths),
        axis=alt.Axis(labelAngle=0, domain=False, ticks=False),
    )  # fmt: skip
    y = alt.Y(
        "scheme:N", title=None, sort=labels, scale=alt.Scale(domain=labels), axis=alt.Axis(domain=False, ticks=False)
    )
    layers = heat_map(marks, x, y, tooltips("scheme", extra={"length": "length", "number": "score"}))
    return alt.layer(*layers).properties(title=title, width=270, height=max(90, 26 * len(labels)))


def _times(length: int, short: int) -> str:
    return f"x {length // short}" if length % short == 0 else f"{length:,}"


def _rows(comparison: Comparison) -> list[list[Entry | str]]:
    of = columns(comparison)
    tasks = len({(row.task, row.measure) for row in comparison.rows.rows if not row.measure.startswith("nats")})
    rows: list[list[Entry | str]] = []
    for line in comparison.table():
        if line["why"] is not None:
            rows.append([line["scheme"], *(Entry("-", hint=line["why"]) for _ in of)])
            continue
        hint = f"mean of {tasks} tasks" if tasks > 1 else ""
        rows.append([line["scheme"], *(Entry(shown, value, hint=hint) for shown, value in cells(line, of))])
    return rows
