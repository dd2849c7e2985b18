"""The table and the picture of `extension.py`."""

from __future__ import annotations

from typing import Any

from measures import TARGETS


def lengths_of(content: dict[str, Any]) -> list[int]:
    """Return the measured lengths."""
    return sorted({int(key.split()[1]) for case in content["cases"].values() for key in case["measured"]})


def markdown(content: dict[str, Any]) -> str:
    """Return one table for each kind of measurement, with one line for each case."""
    lengths = lengths_of(content)
    any_case = next(iter(content["cases"].values()))
    threads = sorted({case["machine"]["threads"] for case in content["cases"].values()})
    lines = [
        f"# {content['model']}: {lengths[0]:,} to {lengths[-1]:,} tokens",
        "",
        f"Its window is {content['window']:,} tokens. {any_case['dtype']}, {' or '.join(map(str, threads))} threads of "
        f"{any_case['machine']['cpu']}, seed 0. Text that no training here has read. Of questions: share of exact "
        "answers with its 95 % interval, and their number. The interval takes all answers as independent; eight "
        "questions share a text, so that the true one may be wider.",
    ]
    short = [length for length in lengths if length < TARGETS]
    long = [length for length in lengths if length >= TARGETS]
    for title, names, among in (
        ("One of eight facts", ("needle",), lengths),
        ("The only fact", ("passkey",), lengths),
        ("English, short texts: loss of the whole text, nats per token", ("english",), short),
        ("Python code, short texts: loss of the whole text, nats per token", ("code",), short),
        (f"English: loss of the same last {TARGETS:,} tokens, nats per token", ("english",), long),
        (f"Python code: loss of the same last {TARGETS:,} tokens, nats per token", ("code",), long),
        ("Seconds of all measurements of a length", ("english", "needle", "passkey", "code"), lengths),
    ):
        shown = [n for n in among if any(_found(case, names, n) for case in content["cases"].values())]
        if not shown:
            continue
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
    for name, title in (("english", "English"), ("code", "Python code")):
        among = [int(key.split()[1]) for case in content["cases"].values() for key in case["measured"] if name in key]
        if not among:
            continue
        longest = max(among)
        points = [
            {"scheme": label, "length": bucket["last"] + 1, "value": bucket["loss"]}
            for label, case in content["cases"].items()
            if (found := case["measured"].get(f"{name} {longest}"))
            for bucket in found["buckets"]
            if bucket["last"] >= 255
        ]
        values = [point["value"] for point in points]
        by_case = [[point["value"] for point in points if point["scheme"] == label] for label in labels]
        best = min((each for each in by_case if each), key=lambda each: sum(each) / len(each))
        # A scheme that fails would otherwise press all others into one line.
        top = min(max(values), 1.5 * max(best))
        scale = alt.Scale(domain=[min(values), top], clamp=True, nice=False, padding=8)
        ticks = sorted({point["length"] for point in points})
        headline = f"{title}: loss by position in {longest:,} tokens"
        panels.append(panel(points, headline, scale, "nats per token", ticks, "position, up to"))
    case = next(iter(content["cases"].values()))
    subtitle = (
        f"{content['model']}, {case['dtype']}, seed 0. A loss above the end of its axis is drawn at that end. The "
        "table of the same name has the numbers of questions and the intervals."
    )
    return Chart("extension", "At the window and beyond it", tuple(panels), subtitle, columns=2).png()
