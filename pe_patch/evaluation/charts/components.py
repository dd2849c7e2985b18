"""Parts that several charts share: records for marks and tooltips, axes, legends, lines and heat maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..results import Results, Row, sample_unit
from .chart import Panel, data
from .libraries import alt
from .theme import DARK_INK, LIGHT_INK

Record = dict[str, Any]
"""Data of one mark, with the texts of its tooltip."""

TOOLTIPS = {
    "scheme": "scheme",
    "task": "task",
    "measure": "measure",
    "asked": "length asked for",
    "tokens": "tokens given",
    "depth": "depth of the answer",
    "number": "score",
    "interval": "95 % interval",
    "samples": "counted",
    "control": "within the window",
    "without_context": "without context",
    "measured_on": "measured on",
}
"""Heading of each field of a tooltip."""
PICKED = "picked"
"""Name of the legend selection, which templates/report.js synchronises between charts."""
_SHORT = "datum.value >= 1024 && datum.value % 1024 == 0 ? datum.value / 1024 + 'k' : format(datum.value, ',')"


def record(results: Results, rows: Sequence[Row]) -> Record:
    """Make the data of one mark from rows that differ only in depth. Several depths are pooled."""
    first = rows[0]
    names = ("scheme", "task", "measure", "length")
    same = {name: getattr(first, name) for name in names} | ({"depth": first.depth} if len(rows) == 1 else {})
    cell = results.cell(**same)
    assert cell is not None
    tokens = sorted({row.tokens for row in rows})
    missing = first.details.get("no_control") or "not measured"
    control = missing if cell.control is None else f"{cell.control:.3f} at {first.control_length:,} tokens"
    return {
        **{name: getattr(first, name) for name in names},
        "depth": f"{first.depth:.0%}" if len(rows) == 1 and first.depth is not None else "every depth measured",
        "asked": f"{first.length:,} tokens",
        "tokens": f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}",
        "score": cell.score,
        "low": cell.low,
        "high": cell.high,
        "number": f"{cell.score:.3f}",
        "interval": "none" if cell.low is None or cell.high is None else f"{cell.low:.3f} to {cell.high:.3f}",
        "samples": f"{cell.samples:,} {sample_unit(first.measure)}",
        "control": control,
        "without_context": "not measured" if cell.without_context is None else f"{cell.without_context:.3f}",
        "measured_on": "; ".join(dict.fromkeys(row.measured_on for row in rows)),
    }  # fmt: skip


def records(results: Results, **wanted: Any) -> list[Record]:
    """Make a record per scheme, task, measure and length of the selected rows. Depths are pooled."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.select(**wanted):
        groups.setdefault((row.scheme, row.task, row.measure, row.length), []).append(row)
    return [record(results, rows) for rows in groups.values()]


def sample_range(points: Iterable[Mapping[str, Any]]) -> str:
    """Return the samples per mark as text, such as "35 questions" or "20 to 35 questions"."""
    sizes = {
        (int(count.replace(",", "")), unit) for count, _, unit in (point["samples"].partition(" ") for point in points)
    }
    (lowest, unit), (highest, _) = min(sizes), max(sizes)
    return f"{lowest:,} {unit}" if lowest == highest else f"{lowest:,} to {highest:,} {unit}"


def model_and_text(results: Results) -> str:
    """Return the model, text and seed of the configuration as text."""
    config = results.config
    known = [f"{name}: {config[name]}" for name in ("model", "text", "seed") if config.get(name) is not None]
    return ", ".join(known)[:1].upper() + ", ".join(known)[1:]


def tooltips(*names: str, extra: Mapping[str, str] | None = None) -> list[alt.Tooltip]:
    """Make tooltips for fields of a record. `extra` maps further fields to their headings."""
    headings = {name: TOOLTIPS[name] for name in names} | dict(extra or {})
    return [alt.Tooltip(f"{name}:N", title=heading) for name, heading in headings.items()]


MEASURED = (
    "scheme", "task", "asked", "tokens", "number", "interval", "samples", "control", "without_context", "measured_on",
)  # fmt: skip
"""Tooltip fields of a measurement."""


def scheme_encoding(names: Sequence[str], shown: Sequence[str]) -> dict[str, Any]:
    """Make colour and shape encodings for schemes, with a legend that wraps to the width of the chart.

    Args:
        names: All schemes, so that each has the same colour in every chart.
        shown: Schemes in the legend.
    """
    shown = [name for name in names if name in shown]
    longest = max(map(len, shown))
    fitting = f"max(1, min({len(shown)}, floor((containerSize()[0] - 60) / {28 + 6.6 * min(longest, 40):.0f})))"
    # a PNG has no container element
    columns = alt.ExprRef(f"containerSize()[0] > 0 ? {fitting} : 4")
    scale = alt.Scale(domain=list(names))
    legend = alt.Legend(title=None, values=shown, orient="top", columns=columns, labelLimit=270, symbolOpacity=1)
    return {
        "color": alt.Color("scheme:N", scale=scale, legend=legend),
        "shape": alt.Shape("scheme:N", scale=scale, legend=legend),
    }


def legend_selection() -> alt.Parameter:
    """Make a selection of schemes by click in the legend. Without a click it selects all."""
    return alt.selection_point(name=PICKED, fields=["scheme"], bind="legend")


def faded_unless_selected(pick: alt.Parameter, full: float = 1.0, muted: float = 0.08) -> Any:
    """Make an opacity of `full` for selected schemes and `muted` for all others."""
    return alt.condition(pick, alt.value(full), alt.value(muted))


def length_axis(lengths: Sequence[int], title: str | None = "tokens given to the model") -> alt.X:
    """Make a logarithmic axis with a tick at each measured length."""
    axis = alt.Axis(
        values=list(lengths), labelExpr=_SHORT, grid=False, labelOverlap="parity", labelFlush=False, title=title
    )
    scale = alt.Scale(type="log", base=2, domain=[lengths[0], lengths[-1]], nice=False, padding=10)
    return alt.X("length:Q", scale=scale, axis=axis)


def window_rule(window: int | None, lengths: Sequence[int], x: alt.X) -> list[Panel]:
    """Draw a dotted line at the end of the trained window if it lies within the range of the lengths."""
    if not window or not lengths[0] <= window <= lengths[-1]:
        return []
    right = window * window > lengths[0] * lengths[-1]
    base = alt.Chart(data([{"length": window, "note": f"trained window {window:,}"}])).encode(x=x)
    note = base.mark_text(
        style="note", align="right" if right else "left", dx=-4 if right else 4, y=0, dy=-4, baseline="bottom"
    )
    return [base.mark_rule(strokeDash=[2, 3], strokeWidth=1.3), note.encode(text="note:N")]


def line_layers(points: Sequence[Record], names: Sequence[str], x: Any, y: Any, tips: list[alt.Tooltip]) -> list[Panel]:
    """Draw a line per scheme with a marker per measurement, and its interval as a band and as a bar."""
    pick, look = legend_selection(), scheme_encoding(names, [point["scheme"] for point in points])
    base = alt.Chart(data(points)).encode(x=x, color=look["color"])
    # leave the layers of intervals out if there are none, since Vega warns about a scale without values
    bounded = alt.Chart(data([point for point in points if point["low"] is not None])).encode(x=x, color=look["color"])
    ends = {"y": alt.Y("low:Q"), "y2": alt.Y2("high:Q")}
    intervals = [
        bounded.mark_area().encode(**ends, opacity=faded_unless_selected(pick, 0.10, 0.0)),
        bounded.mark_rule(strokeWidth=1.4).encode(**ends, opacity=faded_unless_selected(pick, 0.55, 0.04)),
    ]
    return [
        *(intervals if any(point["low"] is not None for point in points) else []),
        base.mark_line(strokeWidth=2).encode(y=y, opacity=faded_unless_selected(pick)),
        base.mark_point(filled=True, size=70)
        .encode(y=y, shape=look["shape"], opacity=faded_unless_selected(pick), tooltip=tips)
        .add_params(pick),
    ]


def heat_map(
    points: Sequence[Record], x: Any, y: Any, tips: list[alt.Tooltip], *, text_size: float = 11
) -> list[Panel]:
    """Draw scores from 0 to 1 as colours with the number in each cell.

    Args:
        points: Records with `score` and `short`, the formatted number.
        x: Horizontal encoding.
        y: Vertical encoding.
        tips: Tooltips.
        text_size: Font size of the numbers.
    """
    base = alt.Chart(data(points)).encode(x=x, y=y)
    ink = alt.condition("datum.score > 0.45", alt.value(DARK_INK), alt.value(LIGHT_INK))
    colour = alt.Color("score:Q", scale=alt.Scale(domain=[0, 1], range="heatmap", clamp=True), legend=None)
    return [
        base.mark_rect().encode(color=colour, tooltip=tips),
        base.mark_text(fontSize=text_size).encode(text="short:N", color=ink, tooltip=tips),
    ]


def short_length(length: int) -> str:
    """Format a length: 2048 as "2k", 1000 as "1,000"."""
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def panel_columns(panels: Sequence[Any], limit: int) -> int:
    """Return the number of panels per line, at most `limit`, so that all lines have about equally many."""
    return -(-len(panels) // -(-len(panels) // limit))
