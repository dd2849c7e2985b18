"""A point with its interval for each scheme, in one panel for each column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from ...errors import PePatchError
from .chart import Chart, data
from .parts import side_by_side, tooltips

SHOWN = {"label": "", "column": "measured", "number": "value", "interval": "95 % interval"}
MORE = ("samples", "tokens", "control", "without_context", "measured_on")


def dots(
    rows: Sequence[Mapping[str, Any]],
    *,
    name: str,
    title: str,
    subtitle: str = "",
    caption: str = "",
    domain: tuple[float, float] | None = None,
) -> Chart:
    """One panel for each `column`, one line for each `label`, in the order in which they first occur.

    A row has `label`, `column` and `value`, may have `low` and `high` (the 95 % interval), `number` (the value as it
    is shown; default four digits that count) and what its tooltip tells in words: `samples`, `tokens`, `control`,
    `without_context`, `measured_on`. A `value` of None is left out of the panel, its label stays. Every panel has a
    scale of its own, or `domain`. No rows, or a row that lacks one of the three, raises `PePatchError`.
    """
    if not rows or any(missing for row in rows if (missing := {"label", "column", "value"} - set(row))):
        raise PePatchError("A chart of dots needs rows, each with label, column and value.")
    labels = list(dict.fromkeys(str(row["label"]) for row in rows))
    columns = list(dict.fromkeys(str(row["column"]) for row in rows))
    records = [_record(row) for row in rows]
    panels = [_panel([one for one in records if one["column"] == column], column, labels, domain) for column in columns]
    return Chart(name, title, tuple(panels), subtitle, caption, columns=side_by_side(panels, 3))


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    value, low, high = row["value"], row.get("low"), row.get("high")
    bounded = low is not None and high is not None
    return {
        "label": str(row["label"]),
        "scheme": str(row["label"]),
        "column": str(row["column"]),
        "value": value,
        "low": low if bounded else None,
        "high": high if bounded else None,
        "number": row.get("number") or (_shown(value)),
        "interval": f"{_shown(low)} to {_shown(high)}" if bounded else "none",
        **{key: str(row[key]) for key in MORE if row.get(key) is not None},
    }


def _shown(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _panel(found: list[dict[str, Any]], column: str, labels: list[str], domain: tuple[float, float] | None) -> Any:
    tips = tooltips(*(key for key in MORE if any(key in one for one in found)), extra=SHOWN | {"label": "scheme"})
    # headings first, what was measured on last
    tips = [*tips[-len(SHOWN) :], *tips[: -len(SHOWN)]]
    names = alt.Axis(grid=True, ticks=False, domain=False, labelLimit=150)
    style = "~s" if max(abs(one["value"] or 0) for one in found) >= 10_000 else ",.4~r"
    scale = alt.Scale(zero=False, padding=14) if domain is None else alt.Scale(domain=list(domain))
    x = alt.X("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=4, format=style))
    y = alt.Y("label:N", title=None, scale=alt.Scale(domain=labels), axis=names)
    # scales over nothing make Vega warn: what is not there is left out here
    base = alt.Chart(data([one for one in found if one["value"] is not None])).encode(y=y)
    bounded = [one for one in found if one["value"] is not None and one["low"] is not None]
    colour = alt.Color("scheme:N", scale=alt.Scale(domain=labels), legend=None)
    shape = alt.Shape("scheme:N", scale=alt.Scale(domain=labels), legend=None)
    rule = alt.Chart(data(bounded)).mark_rule(strokeWidth=2)
    marks = [
        *([rule.encode(y=y, x=alt.X("low:Q"), x2="high:Q", color=colour, tooltip=tips)] if bounded else []),
        base.mark_point(filled=True, size=90, opacity=1).encode(x=x, color=colour, shape=shape, tooltip=tips),
        base.mark_text(dy=-11, style="note").encode(x=x, text="number:N", tooltip=tips),
    ]  # fmt: skip
    return alt.layer(*marks).properties(width=260, height=34 * len(labels) + 10, title=column)
