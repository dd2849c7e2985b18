"""The chart of many tasks: a heat map of tasks against lengths."""

from __future__ import annotations

from ..results import Results, is_loss
from .chart import Chart
from .components import MEASURED, heat_map, model_and_text, panel_columns, records, sample_range, short_length, tooltips
from .libraries import alt

MIN_TASKS = 4
"""With fewer tasks the other charts suffice."""
HOW_TO_READ = (
    "The score of each task from 0 (dark blue) to 1 (yellow), depths pooled. The length grows from left to right."
)


def task_chart(results: Results) -> Chart | None:
    """Draw a heat map of tasks against lengths for each scheme; None for fewer than `MIN_TASKS` tasks."""
    pairs = list(dict.fromkeys((row.task, row.measure) for row in results.rows if not is_loss(row.measure)))
    if len(pairs) < MIN_TASKS:
        return None
    several = {task for task, _ in pairs if [name for name, _ in pairs].count(task) > 1}
    points = []
    for task, measure in pairs:
        line = f"{task}, {measure}" if task in several else task
        for point in records(results, task=task, measure=measure):
            points.append(
                point | {"line": line, "column": short_length(point["length"]), "short": f"{point['score']:.2f}"}
            )
    order = list(dict.fromkeys(point["line"] for point in points))
    lengths = [short_length(length) for length in sorted({point["length"] for point in points})]
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
    for scheme in dict.fromkeys(point["scheme"] for point in points):
        marks = heat_map([point for point in points if point["scheme"] == scheme], x, y, tips)
        size = {"width": max(150, 44 * len(lengths)), "height": 24 * len(order)}
        panels.append(alt.layer(*marks).properties(title=scheme, **size))
    subtitle = f"Each cell: {sample_range(points)}. {model_and_text(results)}"
    return Chart(
        "tasks", "Every task by length", tuple(panels), subtitle, HOW_TO_READ, columns=panel_columns(panels, 3)
    )
