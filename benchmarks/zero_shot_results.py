"""The results of `zero_shot.py` as tables and as a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Rows = dict[tuple[str, int, int], dict[str, Any]]


def markdown(result: dict[str, Any]) -> str:
    """The table of every scheme by target and length, then every figure with its interval."""
    host, setting, rows = result["machine"], result["setting"], index(result)
    columns = list(dict.fromkeys((factor, length) for _, factor, length in rows))
    any_row = result["rows"][0]
    heads = [f"x{factor}: {length:,}" for factor, length in columns]
    lines = [
        "# Without training, beyond the window of the demo's model",
        "",
        f"Each cell is retrieval / perplexity: the share of {any_row['retrieval']['questions']} questions about one of "
        f"8 facts hidden in held-out text that were answered exactly, and the exponential of the mean loss on the same "
        f"last 128 tokens of {setting['spots']} places in held-out text. Window {setting['window']}; the target is x4 "
        f"or x8, and a scheme has the options for its target at every length. One model, seed {setting['seed']}, "
        f"float32.",
        "",
        f"`python benchmarks/zero_shot.py`, {result['seconds']:.0f} s on {host['cpu']}, {host['threads']} thread, "
        f"shared with other work; torch {host['torch']}, transformers {host['transformers']}, Python {host['python']}.",
        "",
        "| scheme | options | " + " | ".join(heads) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for label in labels(result):
        cells = [cell(rows[label, factor, length]) for factor, length in columns]
        lines.append(f"| {label} | {options(rows, label)} | " + " | ".join(cells) + " |")
    lines += ["", *[f"- {note}" for note in result["notes"]], "", "## With intervals (95 %)", ""]
    lines += ["Exact binomial for retrieval; normal over the places in the text for the loss, in nats per token.", ""]
    lines += ["| scheme | target | tokens | retrieval | loss |", "| --- | --- | ---: | --- | --- |"]
    for row in result["rows"]:
        retrieval, loss = row["retrieval"], row["loss"]
        lines.append(
            f"| {row['label']} | x{row['factor']} | {row['length']:,} | {retrieval['score']:.2f} "
            f"({retrieval['low']:.2f} to {retrieval['high']:.2f}) | {interval(loss)} |"
        )
    return "\n".join(lines) + "\n"


def index(result: dict[str, Any]) -> Rows:
    return {(row["label"], row["factor"], row["length"]): row for row in result["rows"]}


def labels(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["label"] for row in result["rows"]))


def cell(row: dict[str, Any]) -> str:
    return f"{row['retrieval']['score']:.2f} / {row['perplexity']:.1f}"


def interval(loss: dict[str, Any]) -> str:
    known = loss["low"] is not None
    return f"{loss['score']:.3f}" + (f" ({loss['low']:.3f} to {loss['high']:.3f})" if known else "")


def options(rows: Rows, label: str) -> str:
    """What the scheme was given or made of it, once where it is the same for every target."""
    stated: dict[int, dict[str, Any]] = {
        factor: row["stated"] for (name, factor, _), row in rows.items() if name == label
    }
    names = list(dict.fromkeys(name for one in stated.values() for name in one))
    given = [row["options"] for (name, *_), row in rows.items() if name == label]
    factors = [str(one["factor"]) for one in given if "factor" in one]
    said = ["factor " + " or ".join(dict.fromkeys(factors))] if factors else []
    for name in names:
        values = list(dict.fromkeys(str(one[name]) for one in stated.values()))
        title = "window" if name == "near_window" else name
        said.append(title if values == ["True"] else f"{title} {' or '.join(values)}")
    return ", ".join(said)


REFERENCE = "yarn"
"""The scheme from which the picture takes differences."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: retrieval of every scheme at the two targets, and its loss less that of YaRN on the same places."""
    from pe_patch.evaluation.charts import dots

    rows, names, setting = index(result), labels(result), result["setting"]
    targets = sorted({(row["factor"], row["length"]) for row in result["rows"] if row["length"] > setting["window"]})
    shares, differences = [], []
    for factor, length in targets:
        where = f"{length:,} tokens (x{factor})"
        reference = rows[REFERENCE, factor, length]["loss"]["by_spot"]
        for name in names:
            row = rows[name, factor, length]
            share = row["retrieval"]
            ends = {"low": share["low"], "high": share["high"]}
            column = f"answered, {where}"
            shares.append(
                {"label": name, "column": column, "value": share["score"], "number": f"{share['score']:.2f}", **ends}
            )
            column = f"loss less YaRN's, {where}"
            gap, half = paired(row["loss"]["by_spot"], reference)
            ends = {} if name == REFERENCE else {"low": gap - half, "high": gap + half}
            differences.append({"label": name, "column": column, "value": gap, "number": f"{gap:+.3f}", **ends})
    native = rows[names[0], targets[0][0], setting["window"]]
    subtitle = (
        f"The demo's model, window {setting['window']}, where its loss is {native['loss']['score']:.3f}. "
        f"{result['rows'][0]['retrieval']['questions']} questions. Loss in nats per token, paired over the same "
        f"{setting['spots']} places. Bars: 95 %. {result['machine']['cpu']}, float32."
    )
    left = dots(shares, name="zero_shot", title="Without training", subtitle=subtitle)
    right = dots(differences, name="zero_shot", title="", reference=0.0, scale="symlog")
    path.write_bytes(replace(left, panels=(*left.panels, *right.panels), columns=2).png())


def paired(losses: list[float], reference: list[float]) -> tuple[float, float]:
    """Return the mean difference of paired losses, and half the width of its 95 % interval by Student's t."""
    from pe_patch.evaluation.metrics import student_quantile

    gaps = [ours - theirs for ours, theirs in zip(losses, reference, strict=True)]
    return mean(gaps), student_quantile(len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5
