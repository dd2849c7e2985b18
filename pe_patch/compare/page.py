"""A comparison for its readers: the table in the terminal, in Markdown and on the page, and the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import altair as alt
from rich.table import Table

from ..evaluation.charts.chart import Chart
from ..evaluation.charts.components import heat_map, tooltips
from ..evaluation.report import Entry, Section, write_report
from ..evaluation.results import write_atomically
from .comparison import Comparison, Line
from .contender import without_factor
from .settings import write_json

Column = tuple[str, Callable[[Line], float | None], Callable[[float], str]]
"""A heading, where its number stands in a line of the table, and how it is written."""

HOW_TO_READ = (
    "Forward, decode and train: time over that of the model as it is, measured in turns in one process, median of the "
    "rounds. Parameters: what the scheme adds. Memory: the peak of a forward at the greatest length, above what was "
    "there before. Cache: bytes that a token leaves in all layers. Loss is nats per token, its change the difference "
    "to the model as it is, at the same tokens."
)


def columns(found: Comparison) -> list[Column]:
    """The columns that have a number in some line, costs first, then by length."""
    short = found.settings.short
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
    for length in [length for length in found.settings.lengths if length != short]:
        every += [
            (f"loss {length:,}", lambda line, length=length: line["loss"].get(length), "{:.3f}".format),
            (f"retrieval {length:,}", lambda line, length=length: line["retrieval"].get(length), "{:.2f}".format),
        ]
    lines = [line for line in found.table() if line["why"] is None]
    return [column for column in every if any(column[1](line) is not None for line in lines)]


def cells(line: Line, of: Sequence[Column]) -> list[tuple[str, float | None]]:
    """What stands in a line under each column, and the number behind it."""
    values = [value(line) for _, value, _ in of]
    return [("-" if value is None else shown(value), value) for value, (_, _, shown) in zip(values, of, strict=True)]


def terminal(found: Comparison) -> list[Table]:
    """What each scheme costs, and what it gives at each length: narrow enough for a terminal."""
    of = columns(found)
    costs = [column for column in of if not column[0].startswith(("loss ", "retrieval "))]
    table = Table(title=f"What each scheme costs on {found.settings.model}", title_justify="left")
    scores = Table(title="Retrieval / loss by tokens given to the model", title_justify="left", caption_justify="left")
    scores.caption = "; ".join(notes(found)) or None
    headings = ([heading for heading, _, _ in costs], [f"{length:,}" for length in found.settings.lengths])
    for one, names in zip((table, scores), headings, strict=True):
        one.add_column("scheme")
        for name in names:
            one.add_column(name, justify="right", no_wrap=True)
    for line in found.table():
        if line["why"] is not None:
            table.add_row(line["scheme"], *["-"] * len(costs))
            continue
        table.add_row(line["scheme"], *(shown for shown, _ in cells(line, costs)))
        pairs = [(line["retrieval"].get(length), line["loss"].get(length)) for length in found.settings.lengths]
        scores.add_row(line["scheme"], *(" / ".join((_shown(a, 2), _shown(b, 3))) for a, b in pairs))
    return [table, scores]


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(found: Comparison) -> str:
    """The table as Markdown."""
    of = columns(found)
    lines = [
        "| " + " | ".join(["scheme", *(heading for heading, _, _ in of)]) + " |",
        "| --- |" + " ---: |" * len(of),
    ]
    for line in found.table():
        shown = [text for text, _ in cells(line, of)] if line["why"] is None else ["-"] * len(of)
        lines.append("| " + " | ".join([line["scheme"], *shown]) + " |")
    return "\n".join(lines) + "\n"


def notes(found: Comparison) -> list[str]:
    """What a reader of the table must know of single lines."""
    told = [f"{label} cannot work here: {reason}" for label, reason in found.unsupported.items()]
    told += [f"{label} failed: {reason}" for label, reason in found.failures.items()]
    bounded = {line["scheme"]: line["positions"] for line in found.table() if line["why"] is None and line["positions"]}
    told += [f"{label} has {most:,} positions and none beyond them" for label, most in bounded.items()]
    given = [one for one in found.settings.contenders if "factor" in one.options]
    if given and (others := without_factor(found.settings.contenders)):
        told.append(f"no factor was given to {', '.join(others)}")
    return told


def write(found: Comparison, folder: Path, *, title: str, command: str | None = None, more: Sequence[str] = ()) -> Path:
    """Write the page, the picture, `table.md` and `comparison.json`; returns the page's path."""
    labels = ", ".join(found.rows.values("scheme"))
    found.rows.config |= {"model": found.settings.model, "scheme": labels, "window": found.settings.window}
    section = Section(
        "What each scheme gives, and what it costs",
        columns=["scheme", *(heading for heading, _, _ in columns(found))],
        rows=_rows(found),
        caption=HOW_TO_READ,
        sortable=True,
        charts=[picture(found, "comparison")] if found.rows.rows else [],
    )
    write_json(folder / "comparison.json", found.to_dict())
    write_atomically(folder / "table.md", markdown(found))
    return write_report(
        found.rows,
        folder,
        title=title,
        verdict=verdict(found),
        command=command,
        notes=[*notes(found), *more],
        sections=[section],
        overwrite=True,  # the comparison has claimed the folder
    )


def verdict(found: Comparison) -> str:
    """Who answers most at the greatest length, what that costs within the window, and the model as it is beside it."""
    lines = [line for line in found.table() if line["why"] is None]
    longest, short = found.settings.lengths[-1], found.settings.short
    told = [line for line in lines if longest in line["retrieval"]]
    if not told:
        return f"No contender was measured at {longest:,} tokens."
    best = max(told, key=lambda line: line["retrieval"][longest])
    share = best["retrieval"][longest]
    level = [line["scheme"] for line in told if line["retrieval"][longest] == share]
    start = found.settings.contenders[0].label
    base = next((line for line in told if line["scheme"] == start), None)
    sentence = f"At {longest:,} tokens {' and '.join(level) if len(level) < 4 else f'{len(level)} of {len(told)}'} "
    sentence += f"answer{'s' if len(level) == 1 else ''} {share:.0%} of the questions"
    if base is not None and base is not best:
        sentence += f", {base['scheme']} {base['retrieval'][longest]:.0%}"
    if len(level) == 1 and best["loss_change"] is not None:
        sentence += f"; at {short:,} tokens its loss is {best['loss_change']:+.3f} nats from that of {start}"
    return sentence + "."


def picture(found: Comparison, name: str, title: str = "Within the window and beyond it") -> Chart:
    """Retrieval and loss by scheme and length, as two heat maps."""
    lines = [line for line in found.table() if line["why"] is None]
    labels = [line["scheme"] for line in lines]
    short = found.settings.short
    panels = []
    for measure, what in (("retrieval", "share of questions answered"), ("loss", "loss (nats per token)")):
        scores = {line["scheme"]: line[measure] for line in lines}
        least = min((value for each in scores.values() for value in each.values()), default=0.0)
        marks = [
            {
                "scheme": label, "column": _times(length, short), "length": f"{length:,} tokens",
                # one scale of colour for both: yellow is good
                "score": value if measure == "retrieval" else max(0.0, 1 - (value - least) / LOSS_SPAN),
                "short": f"{value:.2f}", "number": f"{value:.3f}",
            }
            for label, each in scores.items() for length, value in each.items()
        ]  # fmt: skip
        if marks:
            panels.append(_panel(marks, labels, [_times(length, short) for length in found.settings.lengths], what))
    settings = found.settings
    subtitle = f"Window {short:,} tokens; {settings.samples} questions at each length; text: {settings.text}; seed "
    subtitle += f"{settings.seed}. Yellow is good; an empty cell was not measured or has no positions."
    return Chart(name, title, tuple(panels), subtitle, CAPTION, columns=len(panels))


CAPTION = (
    "Each line is a scheme, each column a length. Yellow is good: all questions answered, the least loss. An empty "
    "cell was not measured, or the scheme has no positions there."
)
LOSS_SPAN = 2.0
"""Nats above the least loss at which the scale of colours ends."""


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


def _rows(found: Comparison) -> list[list[Entry | str]]:
    of = columns(found)
    asked = len({(row.task, row.measure) for row in found.rows.rows if not row.measure.startswith("nats")})
    rows: list[list[Entry | str]] = []
    for line in found.table():
        if line["why"] is not None:
            rows.append([line["scheme"], *(Entry("-", hint=line["why"]) for _ in of)])
            continue
        hint = f"mean of {asked} tasks" if asked > 1 else ""
        rows.append([line["scheme"], *(Entry(shown, value, hint=hint) for shown, value in cells(line, of))])
    return rows
