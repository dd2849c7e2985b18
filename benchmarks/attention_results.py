"""The results of `attention.py` as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KINDS = ("forward", "forward + backward")


def _cell(row: dict[str, Any] | None, kind: str, key: str) -> str:
    if row is None:
        return ""
    return "-" if "left_out" in row else f"{row[kind][key]:.2f}"


def table(result: dict[str, Any]) -> str:
    """Markdown: one row for each scheme, time and memory by length."""
    setting, host = result["setting"], result["machine"]
    lengths = sorted({row["length"] for row in result["rows"]})
    rows = {(row["scheme"], row["length"]): row for row in result["rows"]}
    names = list(dict.fromkeys(row["scheme"] for row in result["rows"]))
    where = host["gpu"] if setting["device"].startswith("cuda") else f"{host['cpu']}, {host['threads']} thread(s)"
    lines = [
        f"# Attention against plain causal attention of the same shape\n\n{where}; torch {host['torch']}, transformers "
        f"{host['transformers']}; batch {setting['batch']}, {setting['heads']} heads of {setting['head_dim']}, "
        f"{setting['dtype']}. Made by `benchmarks/attention.py`.\n"
    ]
    for title, key, note in (
        ("Time", "ratio", "Over PyTorch's causal `scaled_dot_product_attention`, measured in turns."),
        (
            "Memory", "of_qkv_and_output",
            "Allocated above the inputs at the highest point, over the size of query, key, value and output together.",
        ),
    ):  # fmt: skip
        for kind in KINDS:
            lines.append(f"## {title}, {kind}\n\n{note} `-`: left out or not possible, see the JSON.\n")
            lines.append("| scheme | " + " | ".join(f"{length:,}" for length in lengths) + " |")
            lines.append("| --- |" + " ---: |" * len(lengths))
            lines += [
                f"| {name} | " + " | ".join(_cell(rows.get((name, n)), kind, key) for n in lengths) + " |"
                for name in names
            ]
            lines.append("")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of the time ratios at the longest length that every scheme has, and memory by length as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [row for row in result["rows"] if "left_out" not in row]
    lengths = sorted({row["length"] for row in measured})
    shown = 8192 if 8192 in lengths else lengths[-1]
    at = [row for row in measured if row["length"] == shown]
    host, setting = result["machine"], result["setting"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 0.33 * len(at) + 2.2), gridspec_kw={"width_ratios": [1.25, 1]}, layout="constrained"
    )
    place = range(len(at))
    longest = min(12.0, max(row[kind]["ratio"] for row in at for kind in KINDS) * 1.12)
    for kind, offset, colour in zip(KINDS, (-0.2, 0.2), ("#3b6fb6", "#e08a3c"), strict=True):
        values = [row[kind]["ratio"] for row in at]
        left.barh([n + offset for n in place], [min(v, longest) for v in values], height=0.38, color=colour, label=kind)
        for n, value in zip(place, values, strict=True):
            left.text(min(value, longest * 0.9), n + offset, f" {value:.2f}", va="center", fontsize=7.5)
    left.axvline(1, color="#444444", linewidth=1, linestyle="--")
    left.set(yticks=list(place), yticklabels=[row["scheme"] for row in at], xlim=(0, longest))
    left.invert_yaxis()
    left.set_xlabel(f"time over plain causal attention, {shown:,} tokens")
    left.legend(frameon=False, loc="lower right")
    names = list(dict.fromkeys(row["scheme"] for row in at))
    outside = {row["scheme"] for row in at if " in Transformers" in row["scheme"] or "dense" in row["scheme"]}
    for name in names:
        own = sorted((row["length"], row[KINDS[1]]["bytes"] / 2**20) for row in measured if row["scheme"] == name)
        loud = name in outside
        right.plot(
            *zip(*own, strict=True), marker="o", markersize=3, linewidth=1.6 if loud else 0.9,
            color=None if loud else "#9db4d3", label=name if loud else None, zorder=3 if loud else 2,
        )  # fmt: skip
    right.plot([], [], color="#9db4d3", label="each of ours")
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MiB above the inputs, forward + backward")
    right.set_xticks(lengths, [f"{n // 1024}k" for n in lengths], minor=False)
    right.minorticks_off()
    right.legend(frameon=False, fontsize=8)
    right.grid(alpha=0.25)
    where = host["gpu"] if setting["device"].startswith("cuda") else f"{host['cpu']}, {host['threads']} thread(s)"
    figure.suptitle(
        f"{where}, torch {host['torch']}, {setting['dtype']}, {setting['heads']} heads of {setting['head_dim']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
