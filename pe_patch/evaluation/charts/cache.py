"""The chart of loss and retrieval against the size of the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chart import Chart, data
from .libraries import alt
from .theme import LIGHT, SHAPES, Colours


@dataclass(frozen=True)
class CacheLine:
    """One method of making the cache smaller, at several sizes."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    """For each size a mapping with `cached_bytes_per_token`, `loss` and `retrieval`."""
    colour: int
    """Index of the colour and the marker."""
    dashed: bool = False


def cache_chart(lines: Sequence[CacheLine], original: Mapping[str, Any], title: str, colours: Colours = LIGHT) -> bytes:
    """Draw loss and retrieval against the cache bytes per token.

    Args:
        lines: One line per method.
        original: The original model, with the keys of a line's rows and `questions`. It is a horizontal line.
        title: Title of the picture.
        colours: Colours of the picture.

    Returns:
        The picture as PNG.
    """
    whole = original["cached_bytes_per_token"]
    shown = {
        "loss": ("loss on held-out text (nats per token)", alt.Scale(zero=False)),
        "retrieval": (
            f"questions answered exactly (of {original['questions']})",
            alt.Scale(domain=[0, 1.02], nice=False),
        ),
    }
    panels = tuple(_panel(lines, original, measure, *look, colours) for measure, look in shown.items())
    subtitle = f"Dotted: the original, which caches {whole:,} bytes per token."
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
    points = [
        {"line": line.name, "size": row["cached_bytes_per_token"], "value": row[measure]}
        for line in lines
        for row in line.rows
    ]
    sizes = sorted({point["size"] for point in points})
    labels = {size: [f"{size:,}", f"{size / whole:.2%}".replace(".00%", "%")] for size in sizes}
    # Vega has no label table. This chain of conditions contains only numbers, so nothing needs escaping.
    label_expression = "".join(f"datum.value == {size} ? {text!r} : " for size, text in labels.items()) + "datum.value"
    x = alt.X(
        "size:Q", title="cache: bytes per token in all layers, and share of the original",
        scale=alt.Scale(type="log", base=2, nice=False, padding=12),
        axis=alt.Axis(values=sizes, labelExpr=label_expression, grid=False),
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
    # dashes would only fray the edges of the legend's filled markers
    dash = alt.StrokeDash("line:N", scale=by_line([[5, 4] if line.dashed else [1, 0] for line in lines]), legend=None)
    base = alt.Chart(data(points)).encode(x=x, y=y, **look)
    level = alt.Chart(data([{"value": original[measure]}])).encode(y=y)
    return alt.layer(
        level.mark_rule(style="original", strokeDash=[2, 3], strokeWidth=1.6),
        base.mark_line(strokeWidth=2).encode(strokeDash=dash),
        base.mark_point(filled=True, size=75).encode(shape=shape),
    ).properties(width=460, height=330)
