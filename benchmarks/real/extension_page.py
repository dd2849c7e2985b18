"""The table and the picture of `extension.py`."""

from __future__ import annotations

from typing import Any


def lengths_of(content: dict[str, Any]) -> list[int]:
    """Return the measured lengths."""
    return sorted({int(key.split()[1]) for case in content["cases"].values() for key in case["measured"]})


def markdown(content: dict[str, Any]) -> str:
    """Return one table for each kind of measurement, with one line for each case."""
    lengths = lengths_of(content)
    any_case = next(iter(content["cases"].values()))
    lines = [
        f"# {content['model']}: {lengths[0]:,} to {lengths[-1]:,} tokens",
        "",
        f"Its window is {content['window']:,} tokens. {any_case['dtype']}, {any_case['machine']['threads']} threads of "
        f"{any_case['machine']['cpu']}, seed 0. Text that no training here has read.",
    ]
    for title, names in (
        ("One of eight facts: share of exact answers, 95 % interval, questions", ("needle",)),
        ("The only fact: share of exact answers, 95 % interval, questions", ("passkey",)),
        ("English: loss of the same last tokens, nats per token", ("english",)),
        ("Python code: loss of the same last tokens, nats per token", ("code",)),
        ("Seconds of all measurements of a length", ("english", "needle", "passkey", "code")),
    ):
        shown = [n for n in lengths if any(_found(case, names, n) for case in content["cases"].values())]
        lines += ["", f"## {title}", "", "| case |" + "".join(f" {length:,} |" for length in shown)]
        lines.append("| --- |" + " ---: |" * len(shown))
        for label, case in content["cases"].items():
            cells = [_cell(_found(case, names, length), len(names) > 1) for length in shown]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _found(case: dict[str, Any], names: tuple[str, ...], length: int) -> list[dict[str, Any]]:
    return [case["measured"][key] for name in names if (key := f"{name} {length}") in case["measured"]]


def _cell(found: list[dict[str, Any]], seconds: bool) -> str:
    if not found:
        return "-"
    if seconds:
        return f"{sum(each['seconds'] for each in found):,.0f}"
    (each,) = found
    if "loss" in each:
        return f"{each['loss']:.3f}"
    return f"{each['score']:.2f} ({each['low']:.2f} to {each['high']:.2f}, {each['questions']})"


def draw(content: dict[str, Any]) -> bytes:
    """Return a PNG: retrieval and loss by length, and loss by position in the longest text."""
    import altair as alt

    from pe_patch.evaluation.charts.chart import Chart, data
    from pe_patch.evaluation.charts.components import length_axis, scheme_encoding, window_rule

    lengths, labels, panels = lengths_of(content), list(content["cases"]), []
    look = scheme_encoding(labels, labels)

    def panel(points: list[dict[str, Any]], title: str, scale: Any, unit: str, ticks: list[int], axis: str) -> Any:
        x = length_axis(ticks, axis)
        base = alt.Chart(data(points)).encode(x=x, y=alt.Y("value:Q", title=unit, scale=scale), color=look["color"])
        layers = [base.mark_line(), base.mark_point(filled=True, size=40, opacity=1).encode(shape=look["shape"])]
        return alt.layer(*layers, *window_rule(content["window"], ticks, x)).properties(
            width=420, height=260, title=title
        )

    share = alt.Scale(domain=[0, 1])
    for name, title in (("needle", "one of eight facts"), ("passkey", "the only fact")):
        points = [
            {"scheme": label, "length": length, "value": case["measured"][f"{name} {length}"]["score"]}
            for label, case in content["cases"].items()
            for length in lengths
            if f"{name} {length}" in case["measured"]
        ]
        panels.append(panel(points, title, share, "share of exact answers", lengths, "tokens given to the model"))
    worst = 1.5 * min(
        found["loss"] for case in content["cases"].values() for found in case["measured"].values() if "loss" in found
    )
    clipped = alt.Scale(zero=False, domainMax=worst + 1, clamp=True)
    for name, title in (("english", "English"), ("code", "Python code")):
        points = [
            {"scheme": label, "length": bucket["last"] + 1, "value": bucket["loss"]}
            for label, case in content["cases"].items()
            if (found := case["measured"].get(f"{name} {lengths[-1]}"))
            for bucket in found["buckets"]
            if bucket["last"] >= 255
        ]
        if points:
            ticks = sorted({point["length"] for point in points})
            panels.append(
                panel(points, f"{title}: loss by position in {lengths[-1]:,} tokens", clipped, "nats per token", ticks,
                      "position, up to")
            )  # fmt: skip
    case = next(iter(content["cases"].values()))
    subtitle = (
        f"{content['model']}, {case['dtype']}, seed 0. Losses above {worst + 1:.1f} are drawn there. The table beside "
        "this picture has the numbers of questions and the intervals."
    )
    return Chart("extension", "At the window and beyond it", tuple(panels), subtitle, columns=2).png()
