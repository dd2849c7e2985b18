"""The chart of loss by position."""

from __future__ import annotations

from ..results import Results, Row
from .chart import Chart
from .components import Record, length_axis, line_layers, model_and_text, tooltips, window_rule
from .libraries import alt
from .loss import BY_POSITION

HOW_TO_READ = (
    "Lower is better. Each point pools the positions of a bucket and is drawn at the last of them; buckets double in "
    "size. A line that rises beyond the trained window shows that the model predicts worse there. Different positions "
    "predict different tokens: compare schemes, not positions."
)


def position_chart(results: Results) -> Chart | None:
    """Draw loss against the number of preceding tokens, at each scheme's longest length; None if not measured."""
    rows = [row for row in results.rows if BY_POSITION in row.measure and row.details.get("buckets")]
    longest = {row.scheme: row for row in sorted(rows, key=lambda row: row.length)}
    points = [point for row in longest.values() for point in _buckets(row)]
    if not points:
        return None
    edges = sorted({point["length"] for point in points})
    y = alt.Y("score:Q", title="nats per token", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6))
    x = length_axis(edges, "tokens before the one predicted")
    tips = tooltips("scheme", "number", "samples", "measured_on", extra={"positions": "tokens before it"})
    marks = line_layers(points, results.values("scheme"), x, y, tips)
    marks += window_rule(results.config.get("native_window"), edges, x)
    panel = alt.layer(*marks).properties(width=560, height=260)
    least, most = min(point["counted"] for point in points), max(point["counted"] for point in points)
    subtitle = f"Each point: {least:,} to {most:,} tokens. {model_and_text(results)}"
    return Chart("positions", "Loss by position", (panel,), subtitle, HOW_TO_READ)


def _buckets(row: Row) -> list[Record]:
    return [
        {
            "scheme": row.scheme,
            "length": bucket["last"],
            "positions": f"{bucket['first']:,} to {bucket['last']:,}",
            "score": bucket["loss"],
            "low": bucket.get("low"),
            "high": bucket.get("high"),
            "number": f"{bucket['loss']:.3f}",
            "counted": bucket["tokens"],
            "samples": f"{bucket['tokens']:,} tokens",
            "measured_on": row.measured_on,
        }
        for bucket in row.details["buckets"]
    ]
