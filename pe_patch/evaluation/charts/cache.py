"""Loss and retrieval against the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from .chart import Chart, data
from .theme import LIGHT, SHAPES, Colours


@dataclass(frozen=True)
class CacheLine:
    """One way to a smaller cache, over several sizes: rows with bytes, a loss and a share of answers each."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    colour: int
    """Number of the colour and the marker."""
    dashed: bool = False


def cache_chart(lines: Sequence[CacheLine], original: Mapping[str, Any], title: str, colours: Colours = LIGHT) -> bytes:
    """Loss and retrieval against what a token leaves in the cache, as PNG; the original is a horizontal line."""
    whole = original["cached_bytes_per_token"]
    shown = {
        "loss": ("loss on held-out text (nats per token)", alt.Scale(zero=False)),
        "retrieval": (
            f"questions answered exactly (of {original['questions']})",
            alt.Scale(domain=[0, 1.02], nice=False),
        ),
    }
    panels = tuple(_panel(lines, original, measure, *look, colours) for measure, look in shown.items())
    subtitle = f"Dotted: the original, which keeps {whole:,} bytes for each token."
    return Chart("cache", title, panels, subtitle, columns=2).png(colours)


def _panel(
    lines: Sequence[CacheLine],
    original: Mapping[str, Any],
    measure: str,
    title: str,
    scale: alt.Scale,
    colours: Colours,
) -> alt.LayerChart:
    whole, names = original["cached_bytes_per_token"], [line.name for line in lines]
    found = [
        {"line": line.name, "size": row["cached_bytes_per_token"], "value": row[measure]}
        for line in lines
        for row in line.rows
    ]
    sizes = sorted({one["size"] for one in found})
    labels = {size: [f"{size:,}", f"{size / whole:.2%}".replace(".00%", "%")] for size in sizes}
    # Vega has no table of labels: a chain of conditions over numbers, which is all that is put into the expression
    words = "".join(f"datum.value == {size} ? {words!r} : " for size, words in labels.items()) + "datum.value"
    x = alt.X(
        "size:Q", title="cache: bytes per token in all layers, and share of the original",
        scale=alt.Scale(type="log", base=2, nice=False, padding=12),
        axis=alt.Axis(values=sizes, labelExpr=words, grid=False),
    )  # fmt: skip
    palette = colours["series"][1:]
    y = alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6))

    def by_line(values: list[Any]) -> alt.Scale:
        return alt.Scale(domain=names, range=values)

    legend = alt.Legend(title=None, orient="bottom", columns=4, labelLimit=320)
    look = {
        "color": alt.Color(
            "line:N", scale=by_line([palette[line.colour % len(palette)] for line in lines]), legend=legend
        ),
        "opacity": alt.Opacity("line:N", scale=by_line([0.65 if line.dashed else 1.0 for line in lines]), legend=None),
    }
    shape = alt.Shape("line:N", scale=by_line([SHAPES[line.colour % len(SHAPES)] for line in lines]), legend=legend)
    # in a legend's filled signs dashes are only ragged edges
    dash = alt.StrokeDash("line:N", scale=by_line([[5, 4] if line.dashed else [1, 0] for line in lines]), legend=None)
    base = alt.Chart(data(found)).encode(x=x, y=y, **look)
    level = alt.Chart(data([{"value": original[measure]}])).encode(y=y)
    return alt.layer(
        level.mark_rule(style="original", strokeDash=[2, 3], strokeWidth=1.6),
        base.mark_line(strokeWidth=2).encode(strokeDash=dash),
        base.mark_point(filled=True, size=75).encode(shape=shape),
    ).properties(width=460, height=330)
