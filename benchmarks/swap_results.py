"""The results of `swap.py` as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CLOSE = 1.02
"""A model has come back when its loss is within 2 % of the original's, and stays there."""
ORIGINAL = {"demo": "rope (original)", "bloom": "bloom: alibi (original)"}
"""The model as it was, which is measured and not trained."""
TITLES = {"demo": "The demo model: RoPE for a bias by distance", "bloom": "A BLOOM: its ALiBi for RoPE"}
SHORT = {"demo": "Demo, RoPE to a bias", "bloom": "BLOOM, ALiBi to RoPE"}
DASHES = {"as it starts": [1, 0], "warm start": [5, 3]}


def original(runs: list[dict[str, Any]], base: str, seed: int) -> dict[str, float] | None:
    """What the base had before anything was changed."""
    found = [run["curve"][0] for run in runs if run["run"] == ORIGINAL[base]]
    own = [run["curve"][0] for run in runs if run["run"] == ORIGINAL[base] and run["seed"] == seed]
    return next(iter(own or found), None)


def back_at(curve: list[dict[str, float]], bound: float) -> int | None:
    """The first measured step from which on the loss stays within the bound; None where it does not come to that."""
    beyond = [at for at, point in enumerate(curve) if point["loss"] > bound]
    at = 1 + max(beyond, default=-1)
    return int(curve[at]["step"]) if at < len(curve) else None


def markdown(result: dict[str, Any]) -> str:
    """One line for each run."""
    runs = result["runs"]
    host, steps = runs[0]["machine"], max(run["curve"][-1]["step"] for run in runs)
    minutes = sum(run["seconds"] for run in runs) / 60
    lines = [
        "# Another family of scheme in a trained model: how far it falls, and how fast it comes back",
        "",
        f"Runs of {steps} steps of 16 x 256 tokens of Python's standard library, 60 % of the sequences text and 40 % "
        "text with facts hidden in it; learning rate 1e-3, the last 40 % of the steps falling to 5 % of it. Loss: nats "
        "per token on the same last 128 tokens of 64 places in held-out files, 128 tokens before them. Retrieval: "
        "share of 65 questions about 8 facts hidden in held-out text. Back: the first measured step, every 25, from "
        "which on the loss stays within 2 % of the original's. Warm: after `pe_patch.training.warm_start` on 16,384 "
        "tokens of the training text, without hidden facts, before any step. `trained on` is the model's own scheme "
        "under the same training: a model that was not done learning gets better for that reason too, the BLOOM above "
        "all.",
        "",
        f"`python benchmarks/swap.py`, float32, {host['threads']} thread of {host['cpu']}, shared with other work: "
        f"{minutes:.0f} minutes of processor time in all, evaluation included; torch {host['torch']}, transformers "
        f"{host['transformers']}.",
    ]  # fmt: skip
    for base, title in TITLES.items():
        own = [run for run in runs if run["base"] == base]
        if not own:
            continue
        lines += ["", f"## {title}", ""]
        lines.append("| run | seed | loss at 0 | at 25 | at 100 | at the end | retrieval at 0 | at the end | back |")
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for run in sorted(own, key=lambda run: run["scheme"] is not None):
            start = original(runs, base, run["seed"])
            back = None if start is None else back_at(run["curve"], CLOSE * start["loss"])
            at = {point["step"]: point for point in run["curve"]}
            losses = [at[step]["loss"] if step in at else None for step in (0, 25, 100)] + [run["curve"][-1]["loss"]]
            cells = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
            ends = [f"{run['curve'][index]['retrieval']:.2f}" for index in (0, -1)]
            shown = "" if start is None else "never" if back is None else str(back)
            lines.append(f"| {run['run']} | {run['seed']} | {' | '.join(cells)} | {' | '.join(ends)} | {shown} |")
    fits = [run for run in runs if "warm_start" in run]
    if fits:
        lines += ["", "## What the warm start found", ""]
        lines.append("| run | seed | KL before | after | loss before | after | chosen | seconds |")
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |")
        for run in fits:
            fit = run["warm_start"]
            values = [f"{fit[name]:.3f}" for name in ("before", "after", "loss_before", "loss_after")]
            lines.append(
                f"| {run['run']} | {run['seed']} | {' | '.join(values)} | {fit['chosen']} | "
                f"{run['warm_start_seconds']:.0f} |"
            )
        lines += ["", "KL: from the native attention to the scheme's, mean over queries, heads and layers. The losses"]
        lines += ["are those on the tokens that it was fitted to, text alone."]
    return "\n".join([*lines, ""])


def _looks(run: dict[str, Any]) -> dict[str, str]:
    """Return what distinguishes the line of a run: colour, dashes and label."""
    name = run["run"].removeprefix("bloom: ")
    return {"scheme": name.removesuffix(", warm"), "start": list(DASHES)[bool(run["warm"])], "label": name}


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: loss and retrieval by step, a row of panels for each base, each line with its name at its end."""
    import altair as alt

    from pe_patch.evaluation.charts.chart import Chart, data
    from pe_patch.evaluation.charts.components import scheme_encoding

    trained = [run for run in result["runs"] if len(run["curve"]) > 1]
    panels = []
    for base in TITLES:
        runs = [run for run in trained if run["base"] == base and run["seed"] == 0]
        if not runs:
            continue
        points = [{**point, **_looks(run)} for run in runs for point in run["curve"]]
        names = list(dict.fromkeys(str(point["scheme"]) for point in points))
        start, last = original(result["runs"], base, 0), max(point["step"] for point in points)
        for measure, unit in (("loss", "nats per token"), ("retrieval", "share answered")):
            values = [point[measure] for point in points]
            low, high = (min(values), max(values)) if measure == "loss" else (0.0, 1.0)
            scale = alt.Scale(domain=[low, high], nice=measure == "loss")
            axis = alt.Axis(tickCount=6)
            x = alt.X("step:Q", title="step", axis=axis, scale=alt.Scale(domain=[0, last], nice=False))
            colour = scheme_encoding(names, names)["color"].legend(None)
            dash = alt.StrokeDash("start:N", legend=None, scale=alt.Scale(domain=[*DASHES], range=[*DASHES.values()]))
            lines = alt.Chart(data(points)).encode(
                x=x, y=alt.Y(f"{measure}:Q", title=unit, scale=scale), color=colour, detail="label:N"
            )
            ends = _spread([{**run["curve"][-1], **_looks(run)} for run in runs], measure, 0.055 * (high - low))
            labels = alt.Chart(data(ends)).mark_text(align="left", dx=6, fontSize=10.5)
            layers = [
                lines.mark_line(strokeWidth=1.8).encode(strokeDash=dash),
                lines.mark_point(filled=True, size=14),
                labels.encode(x=x, y=alt.Y("place:Q", title=unit, scale=scale), text="label:N", color=colour),
            ]
            if start is not None and measure == "loss":
                bound = alt.Chart(data([{"bound": CLOSE * start["loss"]}])).mark_rule(strokeDash=[2, 3], opacity=0.7)
                layers.append(bound.encode(y="bound:Q"))
            panels.append(alt.layer(*layers).properties(width=380, height=260, title=f"{SHORT[base]}: {measure}"))
    subtitle = (
        "300 training steps after the positions of a trained model were replaced; one seed. Dashed: with a warm start. "
        "'trained on': the model's own scheme under the same training. Dotted: 2 % above the loss before the change."
    )
    path.write_bytes(Chart("swap", "Recovery after a change of scheme", tuple(panels), subtitle, columns=2).png())


def _spread(ends: list[dict[str, Any]], measure: str, apart: float) -> list[dict[str, Any]]:
    """Return the ends of the lines with a `place` for each label, at least `apart` from each other."""
    ordered = sorted(ends, key=lambda end: end[measure])
    places: list[float] = []
    for end in ordered:
        places.append(max(end[measure], places[-1] + apart) if places else end[measure])
    # Labels that left the panel at the top move down again.
    for index in range(len(places) - 1, -1, -1):
        limit = max(end[measure] for end in ordered) if index == len(places) - 1 else places[index + 1] - apart
        places[index] = min(places[index], limit)
    return [{**end, "place": place} for end, place in zip(ordered, places, strict=True)]
