"""Answers against length."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from ..results import Results, is_loss
from .chart import Chart
from .dots import dots
from .parts import MEASURED, Record, about, counted, length_axis, lines, records, side_by_side, tooltips, window_mark

HOW_TO_READ = (
    "Higher is better. A scheme reads its context where its line stays up beyond the trained window and its interval "
    "clear of the others'."
)


def retrieval_chart(results: Results) -> Chart | None:
    """A panel for each task, a line for each scheme, depths pooled; None where nothing was asked."""
    rows = [row for row in results.rows if not is_loss(row.measure)]
    pairs = dict.fromkeys((row.task, row.measure) for row in rows)
    found = {pair: records(results, task=pair[0], measure=pair[1]) for pair in pairs}
    if not found:
        return None
    everything = [one for some in found.values() for one in some]
    title = "Answers by length"
    subtitle = f"Each point: {counted(everything)}; bars and bands: 95 % interval. {about(results)}"
    lengths = sorted({one["length"] for one in everything})
    if len(lengths) == 1:
        tasks = [task for task, _ in found]
        names = {pair: ", ".join(pair) if tasks.count(pair[0]) > 1 else pair[0] for pair in found}
        marks = [
            one | {"label": one["scheme"], "column": names[one["task"], one["measure"]], "value": one["score"]}
            for one in everything
        ]
        domain = (0.0, 1.0) if max(one["score"] for one in everything) <= 1 else None
        title = f"{title}: {lengths[0]:,} tokens"
        return dots(marks, name="retrieval", title=title, subtitle=subtitle, caption=HOW_TO_READ, domain=domain)
    panels = [_panel(results, some, pair, lengths, sole=len(found) == 1) for pair, some in found.items()]
    return Chart("retrieval", title, tuple(panels), subtitle, HOW_TO_READ, columns=side_by_side(panels, 3))


def _panel(
    results: Results, found: Sequence[Record], pair: tuple[str, str], lengths: Sequence[int], sole: bool
) -> alt.LayerChart:
    task, measure = pair
    # a share, but for measures of other libraries that reach 100
    top = max(1, *(one["score"] for one in found))
    shares = alt.Axis(tickCount=5, format=".0%" if top == 1 else "~g")
    y = alt.Y("score:Q", title=None, scale=alt.Scale(domain=[0, top]), axis=shares)
    x = length_axis(lengths)
    marks = lines(found, results.values("scheme"), x, y, tooltips(*MEASURED))
    marks += window_mark(results.config.get("native_window"), lengths, x)
    heading = {"text": task, "subtitle": measure}
    width, height = (560, 280) if sole else (300, 190)
    return alt.layer(*marks).properties(width=width, height=height, title=heading)
