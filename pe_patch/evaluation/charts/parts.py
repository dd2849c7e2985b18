"""What several charts share: records with all that a tooltip says, the axis of lengths, the legend, lines, cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from ..results import Results, Row, sample_unit
from .chart import Panel, data
from .theme import DARK_INK, LIGHT_INK

Record = dict[str, Any]

TOOLTIPS = {
    "scheme": "scheme",
    "task": "task",
    "measure": "measure",
    "asked": "length asked for",
    "tokens": "tokens given",
    "depth": "answer stands at",
    "number": "score",
    "interval": "95 % interval",
    "samples": "counted",
    "control": "within the window",
    "without_context": "without context",
    "measured_on": "measured on",
}
PICKED = "picked"
_SHORT = "datum.value >= 1024 && datum.value % 1024 == 0 ? datum.value / 1024 + 'k' : format(datum.value, ',')"


def record(results: Results, rows: Sequence[Row]) -> Record:
    """One mark: rows that differ in nothing but their depth, pooled, and in words what a tooltip shows of them."""
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
    """One record for each scheme, task, measure and length of the rows selected; depths are pooled."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.select(**wanted):
        groups.setdefault((row.scheme, row.task, row.measure, row.length), []).append(row)
    return [record(results, rows) for rows in groups.values()]


def counted(found: Iterable[Mapping[str, Any]]) -> str:
    """How many questions or tokens each mark counts, such as "35 questions" or "20 to 35 questions"."""
    sizes = {(int(words[0].replace(",", "")), words[1]) for one in found if (words := one["samples"].split(" "))}
    (least, what), (most, _) = min(sizes), max(sizes)
    return f"{least:,} {what}" if least == most else f"{least:,} to {most:,} {what}"


def about(results: Results) -> str:
    """Which model and which text, as far as the configuration says."""
    config = results.config
    known = [f"{name}: {config[name]}" for name in ("model", "text", "seed") if config.get(name) is not None]
    return ", ".join(known)[:1].upper() + ", ".join(known)[1:]


def tooltips(*names: str, extra: Mapping[str, str] | None = None) -> list[alt.Tooltip]:
    """The named fields of a record under their headings; `extra` has further fields and headings."""
    headings = {name: TOOLTIPS[name] for name in names} | dict(extra or {})
    return [alt.Tooltip(f"{name}:N", title=heading) for name, heading in headings.items()]


MEASURED = (
    "scheme", "task", "asked", "tokens", "number", "interval", "samples", "control", "without_context", "measured_on",
)  # fmt: skip
"""What a tooltip tells of a measurement."""


def series(names: Sequence[str], shown: Sequence[str]) -> dict[str, Any]:
    """Colour and sign for each scheme, the same in every chart; a legend of those shown, that wraps where it must."""
    shown = [name for name in names if name in shown]
    longest = max(map(len, shown))
    fitting = f"max(1, min({len(shown)}, floor((containerSize()[0] - 60) / {28 + 6.6 * min(longest, 40):.0f})))"
    # a picture has no element around it
    columns = alt.ExprRef(f"containerSize()[0] > 0 ? {fitting} : 4")
    scale = alt.Scale(domain=list(names))
    legend = alt.Legend(title=None, values=shown, orient="top", columns=columns, labelLimit=270, symbolOpacity=1)
    return {
        "color": alt.Color("scheme:N", scale=scale, legend=legend),
        "shape": alt.Shape("scheme:N", scale=scale, legend=legend),
    }


def picked() -> alt.Parameter:
    """The schemes touched in the legend; all, as long as none is."""
    return alt.selection_point(name=PICKED, fields=["scheme"], bind="legend")


def faded(pick: alt.Parameter, full: float = 1.0, muted: float = 0.08) -> Any:
    return alt.condition(pick, alt.value(full), alt.value(muted))


def length_axis(lengths: Sequence[int], title: str | None = "tokens given to the model") -> alt.X:
    """Powers of two at equal steps, a tick at each length that was measured."""
    axis = alt.Axis(
        values=list(lengths), labelExpr=_SHORT, grid=False, labelOverlap="parity", labelFlush=False, title=title
    )
    scale = alt.Scale(type="log", base=2, domain=[lengths[0], lengths[-1]], nice=False, padding=10)
    return alt.X("length:Q", scale=scale, axis=axis)


def window_mark(window: int | None, lengths: Sequence[int], x: alt.X) -> list[Panel]:
    """A dotted line where the trained window ends, if that lies among the lengths."""
    if not window or not lengths[0] <= window <= lengths[-1]:
        return []
    right = window * window > lengths[0] * lengths[-1]
    base = alt.Chart(data([{"length": window, "note": f"trained window {window:,}"}])).encode(x=x)
    note = base.mark_text(
        style="note", align="right" if right else "left", dx=-4 if right else 4, y=0, dy=-4, baseline="bottom"
    )
    return [base.mark_rule(strokeDash=[2, 3], strokeWidth=1.3), note.encode(text="note:N")]


def lines(found: Sequence[Record], names: Sequence[str], x: Any, y: Any, tips: list[alt.Tooltip]) -> list[Panel]:
    """A line with a sign at every measurement for each scheme, its interval as a band and as a bar."""
    pick, look = picked(), series(names, [one["scheme"] for one in found])
    base = alt.Chart(data(found)).encode(x=x, color=look["color"])
    # without any interval there must be no such layer: Vega warns of a scale over nothing
    bounded = alt.Chart(data([one for one in found if one["low"] is not None])).encode(x=x, color=look["color"])
    ends = {"y": alt.Y("low:Q"), "y2": alt.Y2("high:Q")}
    intervals = [
        bounded.mark_area().encode(**ends, opacity=faded(pick, 0.10, 0.0)),
        bounded.mark_rule(strokeWidth=1.4).encode(**ends, opacity=faded(pick, 0.55, 0.04)),
    ]
    return [
        *(intervals if any(one["low"] is not None for one in found) else []),
        base.mark_line(strokeWidth=2).encode(y=y, opacity=faded(pick)),
        base.mark_point(filled=True, size=70)
        .encode(y=y, shape=look["shape"], opacity=faded(pick), tooltip=tips)
        .add_params(pick),
    ]


def heat_map(found: Sequence[Record], x: Any, y: Any, tips: list[alt.Tooltip], *, text_size: float = 11) -> list[Panel]:
    """Shares from 0 to 1 as colours, with the number in each cell; `found` has `score` and `short` (the number)."""
    base = alt.Chart(data(found)).encode(x=x, y=y)
    ink = alt.condition("datum.score > 0.45", alt.value(DARK_INK), alt.value(LIGHT_INK))
    colour = alt.Color("score:Q", scale=alt.Scale(domain=[0, 1], range="heatmap", clamp=True), legend=None)
    return [
        base.mark_rect().encode(color=colour, tooltip=tips),
        base.mark_text(fontSize=text_size).encode(text="short:N", color=ink, tooltip=tips),
    ]


def short_length(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def side_by_side(panels: Sequence[Any], most: int) -> int:
    """How many panels stand in a row: at most so many, and the rows about equally full."""
    return -(-len(panels) // -(-len(panels) // most))
