"""The picture of a search: scores by generation, and the factors found beside those of PI, NTK and YaRN."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt

from ..evaluation.charts.chart import Chart, data
from ..evaluation.charts.components import scheme_encoding

if TYPE_CHECKING:
    from .result import SearchResult

SEARCHED = "searched"
WIDTH, HEIGHT = 430, 300
WIDE_RANGE = 8
"""Greatest over least score from which the axis is logarithmic."""


def search_chart(found: SearchResult) -> Chart:
    """Two panels: every candidate and the best so far by generation; factors by rotated pair."""
    names = [*found.known, SEARCHED]
    subtitle = (
        f"Loss in nats per token, {found.measured_on}. Lines across: the schemes as they are. "
        f"{len(found.history)} candidates for {found.model}, not trained."
    )
    title = f"{found.method}: {found.target.window:,} to {found.target.length:,} tokens"
    return Chart("search", title, (_scores(found, names), _factors(found, names)), subtitle, columns=2)


def _scores(found: SearchResult, names: list[str]) -> alt.LayerChart:
    scores = [one.score for one in found.history] + list(found.baselines.values())
    wide = min(scores) > 0 and max(scores) > WIDE_RANGE * min(scores)
    scale = alt.Scale(type="log") if wide else alt.Scale(zero=False)
    look = scheme_encoding(names, names)
    x = alt.X(
        "generation:Q", title="generation", scale=alt.Scale(nice=False, padding=6),
        axis=alt.Axis(tickMinStep=1, format="d", grid=False),
    )  # fmt: skip
    y = alt.Y("score:Q", title="loss (nats per token)", scale=scale)
    each = [{"scheme": SEARCHED, "generation": one.generation, "score": one.score} for one in found.history]
    best = [{"scheme": SEARCHED, "generation": g, "score": score} for g, score in enumerate(found.curve)]
    known = [{"scheme": name, "score": score} for name, score in found.baselines.items()]
    line = alt.Chart(data(best)).encode(x=x, y=y, color=look["color"])
    return alt.layer(
        alt.Chart(data(known)).mark_rule(strokeDash=[4, 3], strokeWidth=1.6).encode(y=y, color=look["color"]),
        alt.Chart(data(each)).mark_point(filled=True, size=14, opacity=0.35).encode(x=x, y=y, color=look["color"]),
        line.mark_line(strokeWidth=2),
    ).properties(width=WIDTH, height=HEIGHT)


def _factors(found: SearchResult, names: list[str]) -> alt.LayerChart:
    lists = {**found.known, SEARCHED: found.best.factors}
    rows = [{"scheme": n, "pair": k, "factor": value} for n, values in lists.items() for k, value in enumerate(values)]
    look = scheme_encoding(names, names)
    base = alt.Chart(data(rows)).encode(
        x=alt.X(
            "pair:Q",
            title="rotated pair, fastest first",
            scale=alt.Scale(nice=False, padding=6),
            axis=alt.Axis(tickMinStep=1, format="d", grid=False),
        ),
        y=alt.Y("factor:Q", title="factor that its frequency is divided by", scale=alt.Scale(type="log", base=2)),
        color=look["color"],
    )
    marks = (base.mark_line(strokeWidth=1.8), base.mark_point(filled=True, size=40).encode(shape=look["shape"]))
    return alt.layer(*marks).properties(width=WIDTH, height=HEIGHT)
