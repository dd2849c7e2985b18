"""The chart of loss against length."""

from __future__ import annotations

from ..results import Results, is_loss
from .chart import Chart
from .components import (
    MEASURED,
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

BY_POSITION = "by position"
HOW_TO_READ = (
    "Lower is better. On the same targets a flat line means that a longer context does no harm, and a falling line "
    "that the model uses the additional context."
)


def loss_chart(results: Results) -> Chart | None:
    """Draw loss against length, with a panel per measure and a line per scheme; None without losses."""
    measures = [name for name in results.values("measure") if is_loss(name) and BY_POSITION not in name]
    pairs = [(row.task, row.measure) for row in results.rows if row.measure in measures]
    by_measure = {pair: records(results, task=pair[0], measure=pair[1]) for pair in dict.fromkeys(pairs)}
    if not by_measure:
        return None
    all_points = [point for points in by_measure.values() for point in points]
    title = "Loss by length"
    subtitle = f"Each point: {sample_range(all_points)}; bars and bands: 95 % interval. {model_and_text(results)}"
    lengths = sorted({point["length"] for point in all_points})
    if len(lengths) == 1:
        rows = [
            point | {"label": point["scheme"], "column": point["measure"], "value": point["score"]}
            for point in all_points
        ]
        return dots(rows, name="loss", title=f"{title}: {lengths[0]:,} tokens", subtitle=subtitle, caption=HOW_TO_READ)
    names, window, x = results.values("scheme"), results.config.get("native_window"), length_axis(lengths)
    panels = []
    for (_, measure), points in by_measure.items():
        # perplexities are exponentials of losses and may differ by a factor of a thousand
        nats = measure.startswith("nats")
        scale = alt.Scale(zero=False) if nats else alt.Scale(type="log", nice=True)
        y = alt.Y("score:Q", title="nats per token" if nats else None, scale=scale, axis=alt.Axis(tickCount=6))
        marks = line_layers(points, names, x, y, tooltips(*MEASURED)) + window_rule(window, lengths, x)
        panels.append(alt.layer(*marks).properties(width=400, height=250, title=_panel_title(measure)))
    return Chart("loss", title, tuple(panels), subtitle, HOW_TO_READ, columns=panel_columns(panels, 2))


def _panel_title(measure: str) -> str:
    return measure.removeprefix("nats per token, ")
