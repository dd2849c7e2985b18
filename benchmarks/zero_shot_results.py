"""The results of `zero_shot.py` as tables and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
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


def draw(result: dict[str, Any], path: Path) -> None:
    """Retrieval and perplexity of every scheme at the two targets, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    rows, names, setting = index(result), labels(result), result["setting"]
    targets = sorted({(row["factor"], row["length"]) for row in result["rows"] if row["length"] > setting["window"]})
    style = dict(zip(targets, (("#56b4e9", "o", -0.17), ("#d55e00", "s", 0.17)), strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.36 * len(names) + 2), sharey=True, layout="constrained")
    for factor, length in targets:
        colour, marker, offset = style[factor, length]
        found = [rows[name, factor, length] for name in names]
        places = [place + offset for place in range(len(names))]
        known = {"fmt": marker, "color": colour, "markersize": 5, "capsize": 2, "linewidth": 1.2}
        share = [row["retrieval"]["score"] for row in found]
        lows = [max(0.0, row["retrieval"]["score"] - row["retrieval"]["low"]) for row in found]
        highs = [max(0.0, row["retrieval"]["high"] - row["retrieval"]["score"]) for row in found]
        left.errorbar(share, places, xerr=[lows, highs], label=f"{length:,} tokens (x{factor})", **known)
        middle = [row["perplexity"] for row in found]
        ends = [(row["loss"]["low"], row["loss"]["high"]) for row in found]
        spread = None if None in ends[0] else [
            [value - math.exp(low) for value, (low, _) in zip(middle, ends, strict=True)],
            [math.exp(high) - value for value, (_, high) in zip(middle, ends, strict=True)],
        ]  # fmt: skip
        right.errorbar(middle, places, xerr=spread, **known)
    native = rows[names[0], targets[0][0], setting["window"]]
    right.axvline(native["perplexity"], color="#444444", linewidth=1, linestyle="--")
    right.annotate(
        f" {names[0]} at {setting['window']}", (native["perplexity"], 1), xycoords=("data", "axes fraction"),
        va="bottom", ha="center", fontsize=8,
    )  # fmt: skip
    left.set(yticks=range(len(names)), yticklabels=names, xlim=(-0.03, 1.03), xlabel="questions answered (share)")
    left.invert_yaxis()
    right.set_xscale("log")
    right.xaxis.set_major_locator(ticker.FixedLocator([20, 30, 50, 70, 100, 150, 200, 300]))
    right.xaxis.set_major_formatter(ticker.ScalarFormatter())
    right.minorticks_off()
    right.set_xlabel("perplexity of the same held-out tokens")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"The demo's model (window {setting['window']}) without training; {result['machine']['cpu']}, float32",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
