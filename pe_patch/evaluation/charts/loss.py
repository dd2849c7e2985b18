"""Loss against length."""

from __future__ import annotations

import altair as alt

from ..results import Results, is_loss
from .chart import Chart
from .dots import dots
from .parts import MEASURED, about, counted, length_axis, lines, records, side_by_side, tooltips, window_mark

BY_POSITION = "by position"
HOW_TO_READ = (
    "Lower is better. On the same targets a flat line means that distance does no harm, a falling one that the "
    "additional context is used."
)


def loss_chart(results: Results) -> Chart | None:
    """A panel for each measure of loss, a line for each scheme; None where no loss was measured."""
    measures = [name for name in results.values("measure") if is_loss(name) and BY_POSITION not in name]
    pairs = [(row.task, row.measure) for row in results.rows if row.measure in measures]
    found = {pair: records(results, task=pair[0], measure=pair[1]) for pair in dict.fromkeys(pairs)}
    if not found:
        return None
    everything = [one for some in found.values() for one in some]
    title = "Loss by length"
    subtitle = f"Each point: {counted(everything)}; bars and bands: 95 % interval. {about(results)}"
    lengths = sorted({one["length"] for one in everything})
    if len(lengths) == 1:
        rows = [one | {"label": one["scheme"], "column": one["measure"], "value": one["score"]} for one in everything]
        return dots(rows, name="loss", title=f"{title}: {lengths[0]:,} tokens", subtitle=subtitle, caption=HOW_TO_READ)
    names, window, x = results.values("scheme"), results.config.get("native_window"), length_axis(lengths)
    panels = []
    for (_, measure), some in found.items():
        # a perplexity is the exponential of a loss, and may be a thousand times another
        nats = measure.startswith("nats")
        scale = alt.Scale(zero=False) if nats else alt.Scale(type="log", nice=True)
        y = alt.Y("score:Q", title="nats per token" if nats else None, scale=scale, axis=alt.Axis(tickCount=6))
        marks = lines(some, names, x, y, tooltips(*MEASURED)) + window_mark(window, lengths, x)
        panels.append(alt.layer(*marks).properties(width=400, height=250, title=_panel_title(measure)))
    return Chart("loss", title, tuple(panels), subtitle, HOW_TO_READ, columns=side_by_side(panels, 2))


def _panel_title(measure: str) -> str:
    return measure.removeprefix("nats per token, ")
