"""The table and the picture of `context_extension.py`."""

from __future__ import annotations

from typing import Any

LONG, SHORT = 2048, 256


def at(rows: list[dict[str, Any]], length: int) -> dict[str, Any]:
    return next(row for row in rows if row["length"] == length)


def markdown(found: dict[str, Any]) -> str:
    """One row for each way: answers and loss at every length, before and after."""
    lengths = found["setting"]["lengths"]
    head = ["way", "trained", *(f"{length:,}" for length in lengths), f"at {SHORT}, against the original"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(lengths) + 1)]
    original = at(found["ways"]["none"]["before"], SHORT)["loss"] if "none" in found["ways"] else None
    for way, result in found["ways"].items():
        trained = f"{result['steps']} steps, {result['tokens'] / 1e6:.2f} M tokens, {result['length']:,} each"
        for name, rows in (("no", result["before"]), (trained, result["after"])):
            cells = [f"{row['answered']:.2f} / {row['loss']:.3f}" for row in rows]
            cost = "" if original is None else f"{at(rows, SHORT)['loss'] - original:+.3f}"
            lines.append("| " + " | ".join([way if name == "no" else "", name, *cells, cost]) + " |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any]) -> bytes:
    """A PNG: before and after at the long and the short length, and after training at every length."""
    import altair as alt

    from pe_patch.evaluation.charts.chart import Chart, data

    ways, panels = list(found["ways"]), []
    for title, measure, length in (
        (f"questions answered at {LONG:,} tokens", "answered", LONG),
        (f"loss at {LONG:,} tokens", "loss", LONG),
        (f"loss at {SHORT} tokens, the model's own length", "loss", SHORT),
    ):
        rows = [
            {
                "way": way,
                "before": at(result["before"], length)[measure],
                "after": at(result["after"], length)[measure],
            }
            for way, result in found["ways"].items()
        ]
        base = alt.Chart(data(rows)).encode(y=alt.Y("way:N", sort=ways, title=None))
        scale = alt.Scale(domain=[0, 1]) if measure == "answered" else alt.Scale(zero=False)
        axis = None if measure == "answered" else "nats per token"
        x = alt.X("before:Q", title=axis, scale=scale)
        panels.append(
            alt.layer(
                base.mark_rule().encode(x=x, x2="after:Q"),
                base.mark_point(size=50).encode(x=x),
                base.mark_point(size=60, filled=True, opacity=1).encode(x=alt.X("after:Q", title=axis)),
            ).properties(width=300, height=230, title=title)
        )
    for title, measure in (("answered after training", "answered"), ("loss after training", "loss")):
        rows = [
            {"way": way, "tokens": row["length"], "value": row[measure]}
            for way, result in found["ways"].items()
            for row in result["after"]
        ]
        scale = alt.Scale(domain=[0, 1]) if measure == "answered" else alt.Scale(zero=False)
        axis = alt.Axis(values=found["setting"]["lengths"])
        panels.append(
            alt.layer(
                alt.Chart(data(rows))
                .mark_line(point=True)
                .encode(
                    x=alt.X("tokens:Q", scale=alt.Scale(type="log", base=2), title="tokens", axis=axis),
                    y=alt.Y("value:Q", title=None if measure == "answered" else "nats per token", scale=scale),
                    color=alt.Color("way:N", title=None, scale=alt.Scale(domain=ways, scheme="tableau10")),
                )
            ).properties(width=300, height=230, title=title)
        )  # fmt: skip
    setting = found["setting"]
    subtitle = (
        f"Hollow: before training, filled: after. {setting['samples']} questions about 8 hidden facts and the last 128 "
        f"tokens of {setting['spots']} places, the same at every length, in files of Python's standard library that no "
        f"model was trained on. One model, seed {setting['seed']}."
    )
    return Chart("context-extension", "From 256 to 2048 tokens in nine ways", tuple(panels), subtitle, columns=3).png()
