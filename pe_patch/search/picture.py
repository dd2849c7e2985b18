"""Draw the scores of a search by generation, and its factors next to those of PI, NTK and YaRN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..evaluation.charts.chart import Chart, data
from ..evaluation.charts.components import scheme_encoding
from ..evaluation.charts.libraries import alt
from .evolution import Scored
from .space import Factors

SEARCHED = "searched"
WIDTH, HEIGHT = 430, 300
WIDE_RANGE = 8
"""The ratio of the highest to the lowest score above which the axis is logarithmic."""


def search_chart(
    title: str,
    subtitle: str,
    *,
    history: Sequence[Scored],
    curve: Sequence[float],
    baselines: Mapping[str, float],
    factors: Mapping[str, Factors],
    best: Factors,
) -> Chart:
    """Draw two panels: the scores by generation, and the factors by rotated pair.

    Args:
        title: the title of the chart.
        subtitle: the line under the title.
        history: all scored candidates.
        curve: the best score up to each generation.
        baselines: the scores of the known schemes by name.
        factors: the factors of the known schemes by name.
        best: the factors of the best candidate.
    """
    names = [*factors, SEARCHED]
    panels = (_scores(history, curve, baselines, names), _factors({**factors, SEARCHED: best}, names))
    return Chart("search", title, panels, subtitle, columns=2)


def _scores(
    history: Sequence[Scored], curve: Sequence[float], baselines: Mapping[str, float], names: list[str]
) -> alt.LayerChart:
    # The scores of the start may be so high that the best line would look flat, so they do not set the axis.
    later = [scored.score for scored in history if scored.generation > 0]
    close = [*later, *curve, min(baselines.values(), default=curve[0])]
    low, high = min(close), max(close)
    wide = low > 0 and high > WIDE_RANGE * low
    margin = 0.05 * (high - low or abs(high) or 1.0)
    scale = alt.Scale(type="log") if wide else alt.Scale(domain=[low - margin, high + margin], nice=False)
    left_out = [f"{name} {score:.3f}" for name, score in baselines.items() if not wide and score > high + margin]
    above = f"above: {', '.join(left_out)}" if left_out else ""
    look = scheme_encoding(names, names)
    x = alt.X(
        "generation:Q", title="generation", scale=alt.Scale(nice=False, padding=6),
        axis=alt.Axis(tickMinStep=1, format="d", grid=False),
    )  # fmt: skip
    y = alt.Y("score:Q", title="loss (nats per token)", scale=scale)
    each = [{"scheme": SEARCHED, "generation": scored.generation, "score": scored.score} for scored in history]
    best = [{"scheme": SEARCHED, "generation": g, "score": score} for g, score in enumerate(curve)]
    known = [{"scheme": name, "score": score} for name, score in baselines.items()]
    line = alt.Chart(data(best)).encode(x=x, y=y, color=look["color"])
    return alt.layer(
        alt.Chart(data(known))
        .mark_rule(clip=True, strokeDash=[4, 3], strokeWidth=1.6)
        .encode(y=y, color=look["color"]),
        alt.Chart(data(each))
        .mark_point(clip=True, filled=True, size=14, opacity=0.35)
        .encode(x=x, y=y, color=look["color"]),
        line.mark_line(strokeWidth=2),
    ).properties(width=WIDTH, height=HEIGHT, title=above)


def _factors(factors: Mapping[str, Factors], names: list[str]) -> alt.LayerChart:
    rows = [
        {"scheme": name, "pair": k, "factor": value}
        for name, values in factors.items()
        for k, value in enumerate(values)
    ]
    look = scheme_encoding(names, names)
    base = alt.Chart(data(rows)).encode(
        x=alt.X(
            "pair:Q",
            title="rotated pair, fastest first",
            scale=alt.Scale(nice=False, padding=6),
            axis=alt.Axis(tickMinStep=1, format="d", grid=False),
        ),
        y=alt.Y("factor:Q", title="divisor of its frequency", scale=alt.Scale(type="log", base=2)),
        color=look["color"],
    )
    marks = (base.mark_line(strokeWidth=1.8), base.mark_point(filled=True, size=40).encode(shape=look["shape"]))
    return alt.layer(*marks).properties(width=WIDTH, height=HEIGHT)
