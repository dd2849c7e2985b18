"""The charts of scores by length and by the depth of the answer."""

from __future__ import annotations

from ..results import Results, Row
from .chart import Chart, file_name
from .components import (
    MEASURED,
    Record,
    heat_map,
    model_and_text,
    panel_columns,
    record,
    sample_range,
    short_length,
    tooltips,
)
from .libraries import alt

HOW_TO_READ = (
    "Score from 0 (dark blue) to 1 (yellow). The text grows from left to right, and the answer moves from its start to "
    "its end from top to bottom. A dark middle means that the model does not read the middle of the text."
)


def depth_charts(results: Results) -> list[Chart]:
    """Draw a chart per task with depths, with a heat map per scheme."""
    rows = [row for row in results.rows if row.depth is not None]
    pairs = list(dict.fromkeys((row.task, row.measure) for row in rows))
    tasks = [task for task, _ in pairs]
    # the shortest unique names for the PNG files
    names = [() if len(pairs) == 1 else pair if tasks.count(pair[0]) > 1 else pair[:1] for pair in pairs]
    return [_chart(results, *pair, name) for pair, name in zip(pairs, names, strict=True)]


def _chart(results: Results, task: str, measure: str, name: tuple[str, ...]) -> Chart:
    rows = [row for row in results.select(task=task, measure=measure) if row.depth is not None]
    points = [_cell(results, row) for row in rows]
    lengths = [short_length(length) for length in sorted({row.length for row in rows})]
    depths = [f"{depth:.0%}" for depth in sorted({row.depth for row in rows if row.depth is not None})]
    x = alt.X(
        "column:N", title="tokens given to the model", sort=lengths, scale=alt.Scale(domain=lengths),
        axis=alt.Axis(labelAngle=0, domain=False, ticks=False, labelOverlap="parity"),
    )  # fmt: skip
    y = alt.Y(
        "depth:N", title="depth of the answer", sort=depths, scale=alt.Scale(domain=depths),
        axis=alt.Axis(domain=False, ticks=False),
    )  # fmt: skip
    tips = tooltips("scheme", "task", "asked", "depth", *MEASURED[3:])
    panels = []
    for scheme in dict.fromkeys(row.scheme for row in rows):
        marks = heat_map([point for point in points if point["scheme"] == scheme], x, y, tips)
        size = {"width": max(150, 46 * len(lengths)), "height": max(90, 30 * len(depths))}
        panels.append(alt.layer(*marks).properties(title=scheme, **size))
    return Chart(
        "depth" if not name else f"depth-{file_name(*name)}",
        f"{task.capitalize()} by length and depth",
        tuple(panels),
        f"{measure[:1].upper()}{measure[1:]}; each cell: {sample_range(points)}. {model_and_text(results)}",
        HOW_TO_READ,
        columns=panel_columns(panels, 4),
    )


def _cell(results: Results, row: Row) -> Record:
    point = record(results, [row])
    return point | {"column": short_length(point["length"]), "short": f"{point['score']:.2f}"}
