"""Draw the training loss of a run and its held-out results."""

from __future__ import annotations

from typing import Any

from ..evaluation.results import is_loss

SMOOTHED = 0.1
"""Share of the steps so far over which the line averages."""


def picture(steps: list[dict[str, Any]], rows: list[dict[str, Any]]) -> bytes:
    """Return a PNG with the loss of each step and, for each length, the held-out losses and scores by step."""
    from ..evaluation.charts.chart import Chart, data
    from ..evaluation.charts.libraries import alt

    x = alt.X("step:Q", title="step")
    window = max(1, round(SMOOTHED * len(steps)))
    lines = [
        {"step": step["step"], "loss": step["loss"], "mean": _mean(steps[max(0, at - window + 1) : at + 1])}
        for at, step in enumerate(steps)
    ]
    y = alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False))
    base = alt.Chart(data(lines))
    dots = base.mark_circle(size=12, opacity=0.35).encode(x=x, y=y)
    mean = base.mark_line().encode(x=x, y=alt.Y("mean:Q", title="nats per token"))
    panels: list[Any] = [alt.layer(dots, mean).properties(width=400, height=230, title="training loss")] * bool(steps)
    for title, losses in (("held-out loss", True), ("held-out score", False)):
        points = _measured([row for row in rows if is_loss(row["measure"]) is losses])
        if points:
            scale = alt.Scale(zero=False) if losses else alt.Scale(domain=[0, 1])
            panels.append(
                alt.layer(
                    alt.Chart(data(points))
                    .mark_line(point=True)
                    .encode(x=x, y=alt.Y("score:Q", title=None, scale=scale), color=alt.Color("kind:N", title=None))
                ).properties(width=400, height=230, title=title)
            )
    return Chart("curve", "Training", tuple(panels), columns=min(len(panels), 2)).png()


def _measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one point for each step, length and task: the mean over depths of the task's first measure."""
    first: dict[str, str] = {}
    scores: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        measure = row["measure"].partition(", depth")[0]
        if first.setdefault(row["task"], measure) == measure:
            kind = f"{row['task']}, {row['length']:,}" + (", original" if row["original"] else "")
            scores.setdefault((row["step"], kind), []).append(row["score"])
    return [{"step": step, "kind": kind, "score": sum(values) / len(values)} for (step, kind), values in scores.items()]


def _mean(steps: list[dict[str, Any]]) -> float:
    return sum(step["loss"] for step in steps) / len(steps)
