"""Dot plots: a point with its interval per scheme, and a panel per quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ...errors import PePatchError
from .chart import Chart, data
from .components import panel_columns, scheme_encoding, tooltips
from .libraries import alt

LABEL_TOOLTIPS = {"label": "", "column": "measured", "number": "value", "interval": "95 % interval"}
ScaleKind = Literal["linear", "log", "symlog"]
SYMLOG = 0.05
"""Values of this size and below are drawn linearly on a "symlog" axis."""
OPTIONAL_TOOLTIPS = ("samples", "tokens", "control", "without_context", "measured_on")


def dots(
    rows: Sequence[Mapping[str, Any]],
    *,
    name: str,
    title: str,
    subtitle: str = "",
    caption: str = "",
    domain: tuple[float, float] | None = None,
    reference: float | None = None,
    scale: ScaleKind = "linear",
) -> Chart:
    """Draw a panel per `column` with a line per `label`, both in order of first occurrence.

    Args:
        rows: Mappings with `label`, `column` and `value`. A `value` of None leaves the line of its label empty.
            Optional keys are `low` and `high` (the 95 % interval), `number` (the formatted value; four significant
            digits by default), `group` and the texts of the tooltip: `samples`, `tokens`, `control`,
            `without_context` and `measured_on`. Rows of one `group` share a colour and a marker, which the legend
            names; without it each label has its own.
        name: Name of the PNG, without its ending.
        title: Title of the chart.
        subtitle: What was measured.
        caption: How to read the chart.
        domain: Limits of every horizontal axis. None scales each panel to its values.
        reference: Value at which every panel has a vertical line, such as the one that means no difference.
        scale: Scale of the horizontal axes: "linear", "log", or "symlog", which is linear near zero.

    Raises:
        PePatchError: There are no rows, or a row lacks `label`, `column` or `value`.
    """
    if not rows or any(missing for row in rows if (missing := {"label", "column", "value"} - set(row))):
        raise PePatchError("A chart of dots needs rows, each with label, column and value.")
    labels = list(dict.fromkeys(str(row["label"]) for row in rows))
    columns = list(dict.fromkeys(str(row["column"]) for row in rows))
    records = [_record(row) for row in rows]
    panels = [
        _panel([point for point in records if point["column"] == column], column, labels, domain, reference, scale)
        for column in columns
    ]
    return Chart(name, title, tuple(panels), subtitle, caption, columns=panel_columns(panels, 3))


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    value, low, high = row["value"], row.get("low"), row.get("high")
    bounded = low is not None and high is not None
    return {
        "label": str(row["label"]),
        "scheme": str(row.get("group", row["label"])),
        "column": str(row["column"]),
        "value": value,
        "low": low if bounded else None,
        "high": high if bounded else None,
        "number": row.get("number") or _format_value(value),
        "interval": f"{_format_value(low)} to {_format_value(high)}" if bounded else "none",
        **{key: str(row[key]) for key in OPTIONAL_TOOLTIPS if row.get(key) is not None},
    }


def _format_value(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _panel(
    points: list[dict[str, Any]],
    column: str,
    labels: list[str],
    domain: tuple[float, float] | None,
    reference: float | None,
    scale: ScaleKind,
) -> Any:
    tips = tooltips(
        *(key for key in OPTIONAL_TOOLTIPS if any(key in point for point in points)),
        extra=LABEL_TOOLTIPS | {"label": "scheme"},
    )
    # label and value first, `measured_on` last
    tips = [*tips[-len(LABEL_TOOLTIPS) :], *tips[: -len(LABEL_TOOLTIPS)]]
    names = alt.Axis(grid=True, ticks=False, domain=False, labelLimit=180)
    style = "~s" if max(abs(point["value"] or 0) for point in points) >= 10_000 else ",.4~r"
    limits: dict[str, Any] = {"zero": False, "padding": 14} if domain is None else {"domain": list(domain)}
    constant: dict[str, Any] = {"constant": SYMLOG} if scale == "symlog" else {}
    horizontal = alt.Scale(type=scale, nice=scale == "linear", **limits, **constant)
    axis = alt.Axis(tickCount=4, format=style, grid=scale == "linear")
    x = alt.X("value:Q", title=None, scale=horizontal, axis=axis)
    y = alt.Y("label:N", title=None, scale=alt.Scale(domain=labels), axis=names)
    # leave empty layers out, since Vega warns about a scale without values
    base = alt.Chart(data([point for point in points if point["value"] is not None])).encode(y=y)
    bounded = [point for point in points if point["value"] is not None and point["low"] is not None]
    groups = list(dict.fromkeys(point["scheme"] for point in points))
    if set(groups) <= set(labels):
        scale_of_groups = alt.Scale(domain=labels)
        colour = alt.Color("scheme:N", scale=scale_of_groups, legend=None)
        shape = alt.Shape("scheme:N", scale=scale_of_groups, legend=None)
    else:
        look = scheme_encoding(groups, groups)
        colour, shape = look["color"], look["shape"]
    rule = alt.Chart(data(bounded)).mark_rule(strokeWidth=2)
    line = alt.Chart(data([{"value": reference}])).mark_rule(strokeDash=[2, 3], strokeWidth=1.3)
    above = {"dy": -11} if bounded else {"dx": 9, "align": "left"}  # a number beside its dot would hide an interval
    marks = [
        *([line.encode(x=x)] if reference is not None else []),
        *([rule.encode(y=y, x=alt.X("low:Q"), x2="high:Q", color=colour, tooltip=tips)] if bounded else []),
        base.mark_point(filled=True, size=90, opacity=1).encode(x=x, color=colour, shape=shape, tooltip=tips),
        base.mark_text(style="note", **above).encode(x=x, text="number:N", tooltip=tips),
    ]  # fmt: skip
    return alt.layer(*marks).properties(width=260, height=34 * len(labels) + 10, title=column)
