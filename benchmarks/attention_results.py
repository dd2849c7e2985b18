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
    """A PNG: time and memory of every scheme at the longest length that every scheme has."""
    from pe_patch import SCHEMES
    from pe_patch.evaluation.charts import dots

    measured = [row for row in result["rows"] if "left_out" not in row]
    lengths = sorted({row["length"] for row in measured})
    shown = 8192 if 8192 in lengths else lengths[-1]
    at = [row for row in measured if row["length"] == shown]
    host, setting = result["machine"], result["setting"]
    panels = [(f"time, {kind}", kind, "ratio") for kind in KINDS]
    panels.append((f"memory, {KINDS[1]}", KINDS[1], "of_qkv_and_output"))
    points = [
        {
            "label": row["scheme"],
            "column": column,
            "value": row[kind][key],
            "number": f"{row[kind][key]:.2f}",
            "group": "pe_patch" if row["scheme"].split(",")[0] in SCHEMES else "others",
        }
        for column, kind, key in panels
        for row in at
    ]
    where = host["gpu"] if setting["device"].startswith("cuda") else f"{host['cpu']}, {host['threads']} thread(s)"
    subtitle = (
        f"{shown:,} tokens, {setting['heads']} heads of {setting['head_dim']}, {setting['dtype']}; {where}, torch "
        f"{host['torch']}. Time over plain causal attention (dotted line); memory above the inputs over query, key, "
        "value and output. "
        "Others: a dense mask, and the attention of BLOOM and T5 in Transformers."
    )
    chart = dots(
        points,
        name="attention",
        title="Attention against plain causal attention",
        subtitle=subtitle,
        reference=1.0,
        scale="log",
    )
    path.write_bytes(chart.png())
