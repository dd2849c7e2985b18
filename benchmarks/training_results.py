"""The results of `training.py` as a table and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

COLOURS = {"better": "#009e73", "not significant": "#8a8f98", "worse": "#d55e00"}


def markdown(result: dict[str, Any]) -> str:
    """What was trained, and one line for each scheme."""
    host, setting, rows = result["machine"], result["setting"], result["schemes"]
    window = setting["window"]
    seeds = max(row["seeds"] for row in rows)
    minutes = sum(run["seconds"] for run in result["runs"]) / 60
    lines = [
        "# Trained from scratch with each scheme, against no positions at all",
        "",
        f"A Llama of {setting['layers']} layers, hidden size {setting['hidden']}, {setting['heads']} heads and a "
        f"window of {window} tokens, {setting['steps']} steps of {setting['batch']} x {window} tokens "
        f"({result['tokens']:,} in all) of Python's standard library. Losses are nats per token on the same last "
        f"{setting['targets']} tokens of {setting['spots']} places in held-out files, with "
        f"{window - setting['targets']} and {2 * window - setting['targets']} tokens before them: mean of {seeds} "
        "seeds +- its standard error. Differences to `nope` are taken seed by seed; the verdict is their 95 % interval "
        "(Student's t).",
        "",
        f"`python benchmarks/training.py`, float32, {host['threads']} thread of {host['cpu']}, shared with other work: "
        f"{minutes:.0f} minutes of training; torch {host['torch']}, transformers {host['transformers']}, Python "
        f"{host['python']}.",
        "",
        f"| scheme | parameters | loss at {window} | minus `nope` | | loss at {2 * window} | minus `nope` | |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        cells = [cell for length in (window, 2 * window) for cell in _cells(row, str(length))]
        lines.append(f"| {row['scheme']} | {row['parameters']:,} | " + " | ".join(cells) + " |")
    lines += ["", "`one_hot` and `learned` have no position beyond the window.", ""]
    return "\n".join(lines)


def _cells(row: dict[str, Any], length: str) -> list[str]:
    if length not in row:
        return ["-", "-", ""]
    found = row[length]
    mean = _with_error(f"{found['loss']:.3f}", found["error"])
    if row["scheme"] == "nope":
        return [mean, "", ""]
    return [mean, _with_error(f"{found['to_nope']:+.3f}", found["to_nope_error"]), found["verdict"]]


def _with_error(value: str, error: float) -> str:
    return value if math.isnan(error) else f"{value} +- {error:.3f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """A PNG: difference to `nope` with 95 % intervals, within the window and at twice that."""
    from pe_patch.evaluation.charts import dots

    setting = result["setting"]
    nope = next(row for row in result["schemes"] if row["scheme"] == "nope")
    points = []
    for length in (setting["window"], 2 * setting["window"]):
        column = f"at {length} tokens (nope: {nope[str(length)]['loss']:.3f})"
        for row in result["schemes"]:
            found = row.get(str(length))
            point: dict[str, Any] = {"label": row["scheme"], "column": column, "value": None}
            if found is not None:
                gap, half = found["to_nope"], found["half_width"]
                point |= {"value": gap, "number": f"{gap:+.3f}"}
                point |= {} if math.isnan(half) else {"low": gap - half, "high": gap + half}
            if row is not nope:
                points.append(point)
    subtitle = (
        f"Nats per token, with 95 % intervals of the paired difference; an empty line has no position there. "
        f"{nope['seeds']} seeds of {result['tokens']:,} tokens; {result['machine']['cpu']}, float32."
    )
    chart = dots(points, name="training", title="Loss minus that of nope, trained from scratch", subtitle=subtitle)
    path.write_bytes(chart.png())
