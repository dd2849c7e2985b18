"""Loss by position."""

from __future__ import annotations

import altair as alt

from ..results import Results, Row
from .chart import Chart
from .loss import BY_POSITION
from .parts import Record, about, length_axis, lines, tooltips, window_mark

HOW_TO_READ = (
    "Lower is better. Each point pools the positions of a bucket, and stands at its last; buckets double. A line that "
    "rises beyond the trained window belongs to a model that reads worse there. Different positions predict different "
    "tokens: compare schemes, not positions."
)


def position_chart(results: Results) -> Chart | None:
    """Loss by the number of tokens before the one predicted, at each scheme's greatest length; None without any."""
    rows = [row for row in results.rows if BY_POSITION in row.measure and row.details.get("buckets")]
    longest = {row.scheme: row for row in sorted(rows, key=lambda row: row.length)}
    found = [one for row in longest.values() for one in _buckets(row)]
    if not found:
        return None
    edges = sorted({one["length"] for one in found})
    y = alt.Y("score:Q", title="nats per token", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6))
    x = length_axis(edges, "tokens before the one predicted")
    tips = tooltips("scheme", "number", "samples", "measured_on", extra={"positions": "tokens before it"})
    marks = lines(found, results.values("scheme"), x, y, tips)
    marks += window_mark(results.config.get("native_window"), edges, x)
    panel = alt.layer(*marks).properties(width=560, height=260)
    least, most = min(one["counted"] for one in found), max(one["counted"] for one in found)
    subtitle = f"Each point: {least:,} to {most:,} tokens. {about(results)}"
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
