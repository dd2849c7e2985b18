"""The chart of answers against length."""

from __future__ import annotations

from collections.abc import Sequence

from ..results import Results, is_loss
from .chart import Chart
from .components import (
    MEASURED,
    Record,
    length_axis,
    line_layers,
    model_and_text,
    panel_columns,
    records,
    sample_range,
    tooltips,
    window_rule,
)
from .dots import dots
from .libraries import alt

HOW_TO_READ = (
    "Higher is better. A scheme uses its context if its line stays high beyond the trained window and its interval "
    "does not overlap those of the other schemes."
)


def retrieval_chart(results: Results) -> Chart | None:
    """Draw scores against length, with a panel per task and a line per scheme; None if no task asks questions.

    Depths are pooled.
    """
    rows = [row for row in results.rows if not is_loss(row.measure)]
    pairs = dict.fromkeys((row.task, row.measure) for row in rows)
    by_task = {pair: records(results, task=pair[0], measure=pair[1]) for pair in pairs}
    if not by_task:
        return None
    all_points = [point for points in by_task.values() for point in points]
    title = "Answers by length"
    subtitle = f"Each point: {sample_range(all_points)}; bars and bands: 95 % interval. {model_and_text(results)}"
    lengths = sorted({point["length"] for point in all_points})
    if len(lengths) == 1:
        tasks = [task for task, _ in by_task]
        names = {pair: ", ".join(pair) if tasks.count(pair[0]) > 1 else pair[0] for pair in by_task}
        marks = [
            point
            | {"label": point["scheme"], "column": names[point["task"], point["measure"]], "value": point["score"]}
            for point in all_points
        ]
        domain = (0.0, 1.0) if max(point["score"] for point in all_points) <= 1 else None
        title = f"{title}: {lengths[0]:,} tokens"
        return dots(marks, name="retrieval", title=title, subtitle=subtitle, caption=HOW_TO_READ, domain=domain)
    panels = [_panel(results, points, pair, lengths, sole=len(by_task) == 1) for pair, points in by_task.items()]
    return Chart("retrieval", title, tuple(panels), subtitle, HOW_TO_READ, columns=panel_columns(panels, 3))


def _panel(
    results: Results, points: Sequence[Record], pair: tuple[str, str], lengths: Sequence[int], sole: bool
) -> alt.LayerChart:
    task, measure = pair
    # scores are at most 1, except in some libraries that report percentages
    top = max(1, *(point["score"] for point in points))
    shares = alt.Axis(tickCount=5, format=".0%" if top == 1 else "~g")
    y = alt.Y("score:Q", title=None, scale=alt.Scale(domain=[0, top]), axis=shares)
    x = length_axis(lengths)
    marks = line_layers(points, results.values("scheme"), x, y, tooltips(*MEASURED))
    marks += window_rule(results.config.get("native_window"), lengths, x)
    heading = {"text": task, "subtitle": measure}
    width, height = (560, 280) if sole else (300, 190)
    return alt.layer(*marks).properties(width=width, height=height, title=heading)
