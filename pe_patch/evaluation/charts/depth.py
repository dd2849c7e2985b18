"""Answers by length and by where the answer stands."""

from __future__ import annotations

import altair as alt

from ..results import Results
from .chart import Chart, file_name
from .parts import MEASURED, Record, about, counted, heat_map, record, short_length, side_by_side, tooltips

HOW_TO_READ = (
    "Share answered exactly: dark blue is none, yellow is all. From left to right the text grows; from top to bottom "
    "the answer moves from its start to its end. A dark hole in the middle is a text whose middle is not read."
)


def depth_charts(results: Results) -> list[Chart]:
    """For each task that was asked at several depths a chart with a heat map for each scheme."""
    rows = [row for row in results.rows if row.depth is not None]
    pairs = list(dict.fromkeys((row.task, row.measure) for row in rows))
    tasks = [task for task, _ in pairs]
    # the shortest name that tells the pictures apart
    names = [() if len(pairs) == 1 else pair if tasks.count(pair[0]) > 1 else pair[:1] for pair in pairs]
    return [_chart(results, *pair, name) for pair, name in zip(pairs, names, strict=True)]


def _chart(results: Results, task: str, measure: str, name: tuple[str, ...]) -> Chart:
    rows = [row for row in results.select(task=task, measure=measure) if row.depth is not None]
    found = [_cell(results, row) for row in rows]
    lengths = [short_length(length) for length in sorted({row.length for row in rows})]
    depths = [f"{depth:.0%}" for depth in sorted({row.depth for row in rows if row.depth is not None})]
    x = alt.X(
        "column:N", title="tokens given to the model", sort=lengths, scale=alt.Scale(domain=lengths),
        axis=alt.Axis(labelAngle=0, domain=False, ticks=False, labelOverlap="parity"),
    )  # fmt: skip
    y = alt.Y(
        "depth:N", title="where the answer stands", sort=depths, scale=alt.Scale(domain=depths),
        axis=alt.Axis(domain=False, ticks=False),
    )  # fmt: skip
    tips = tooltips("scheme", "task", "asked", "depth", *MEASURED[3:])
    panels = []
    for scheme in dict.fromkeys(row.scheme for row in rows):
        marks = heat_map([one for one in found if one["scheme"] == scheme], x, y, tips)
        size = {"width": max(150, 46 * len(lengths)), "height": max(90, 30 * len(depths))}
        panels.append(alt.layer(*marks).properties(title=scheme, **size))
    return Chart(
        "depth" if not name else f"depth-{file_name(*name)}",
        f"{task.capitalize()} by length and depth",
        tuple(panels),
        f"{measure[:1].upper()}{measure[1:]}; each cell: {counted(found)}. {about(results)}",
        HOW_TO_READ,
        columns=side_by_side(panels, 4),
    )


def _cell(results: Results, row: object) -> Record:
    found = record(results, [row])  # type: ignore[list-item]
    return found | {"column": short_length(found["length"]), "short": f"{found['score']:.2f}"}
