"""Many tasks at a glance."""

from __future__ import annotations

import altair as alt

from ..results import Results, is_loss
from .chart import Chart
from .parts import MEASURED, about, counted, heat_map, records, short_length, side_by_side, tooltips

FEWEST = 4
HOW_TO_READ = "Each task's own score from 0 (dark blue) to 1 (yellow), depths pooled; texts grow from left to right."


def task_chart(results: Results) -> Chart | None:
    """For each scheme a heat map of tasks against lengths; None for fewer tasks than `FEWEST`."""
    pairs = list(dict.fromkeys((row.task, row.measure) for row in results.rows if not is_loss(row.measure)))
    if len(pairs) < FEWEST:
        return None
    several = {task for task, _ in pairs if [name for name, _ in pairs].count(task) > 1}
    found = []
    for task, measure in pairs:
        line = f"{task}, {measure}" if task in several else task
        for one in records(results, task=task, measure=measure):
            found.append(one | {"line": line, "column": short_length(one["length"]), "short": f"{one['score']:.2f}"})
    order = list(dict.fromkeys(one["line"] for one in found))
    lengths = [short_length(length) for length in sorted({one["length"] for one in found})]
    x = alt.X(
        "column:N", title="tokens given to the model", sort=lengths, scale=alt.Scale(domain=lengths),
        axis=alt.Axis(labelAngle=0, domain=False, ticks=False, labelOverlap="parity"),
    )  # fmt: skip
    y = alt.Y(
        "line:N", title=None, sort=order, scale=alt.Scale(domain=order),
        axis=alt.Axis(domain=False, ticks=False, labelLimit=150),
    )  # fmt: skip
    tips = tooltips("scheme", "task", "measure", *MEASURED[2:])
    panels = []
    for scheme in dict.fromkeys(one["scheme"] for one in found):
        marks = heat_map([one for one in found if one["scheme"] == scheme], x, y, tips)
        size = {"width": max(150, 44 * len(lengths)), "height": 24 * len(order)}
        panels.append(alt.layer(*marks).properties(title=scheme, **size))
    subtitle = f"Each cell: {counted(found)}. {about(results)}"
    return Chart("tasks", "Every task by length", tuple(panels), subtitle, HOW_TO_READ, columns=side_by_side(panels, 3))
