"""Generate docs/mla.md and its pictures from the results of `mla_sweep.py` alone."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS

from pe_patch.convert.measure import share_name
from pe_patch.evaluation.charts import LIGHT, CacheLine, cache_chart
from pe_patch.evaluation.results import write_atomically

CONTROL = "original"
MARKERS = "osD^vPX*"
WITHIN, ANSWERED = 0.02, 0.95
"""What is asked of a healed conversion at 1/4: growth of the loss at most, share of questions at least."""

TOKENS = {512: 0.118, 2048: 0.114, 8192: 0.099, 65536: 0.091}
"""Change of the loss by the number of calibration tokens, from `pe-patch convert`; the last is in the plain sweep."""
SAME = ("method", "kv_rank", "rope_dim")
"""What two conversions have in common that differ in nothing but their calibration."""

Run = dict[str, Any]


def write_page(result: dict[str, Any], folder: Path) -> Path:
    """The page, `images/mla_sweep.png` and `images/mla_heal.png`."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    write_atomically(images / "mla_sweep.png", _sizes(result))
    write_atomically(images / "mla_heal.png", _course(result))
    write_atomically(folder / "mla.md", "\n".join(map(_wrapped, _page(result))) + "\n")
    return folder / "mla.md"


def _wrapped(line: str) -> str:
    """A paragraph or a list item in lines of 130; a row of a table stays one line."""
    if line.startswith(("|", "!", "#")):
        return line
    return textwrap.fill(line, 130, subsequent_indent="  " * line.startswith("- "), break_on_hyphens=False)


def _page(result: dict[str, Any]) -> Iterator[str]:
    setting, host, original = result["setting"], result["machine"], result["original"]
    control, runs = _control(result), _conversions(result)
    minutes = sum(run["processor_seconds"] for run in result["runs"]) / 60
    yield "# Latent attention from a trained model"
    yield ""
    yield (
        "The table below compares conversions to multi-head latent attention at the same cache size, before and after "
        "healing. The demo's model has 0.57 million parameters, 2 layers, 4 heads of 32, separate keys and values for "
        "every head, and a window of 256 tokens. Its cache takes "
        f"{original['cached_numbers_per_token_and_layer']:g} numbers for each token and layer, "
        f"{original['cached_bytes_per_token']:,} bytes in all. The results are from one small model and one seed. They "
        "may not hold for a large model."
    )
    yield ""
    yield from _commands()
    yield ""
    yield from _findings(result, runs, control)
    yield ""
    yield "![Loss and retrieval against the size of the cache](images/mla_sweep.png)"
    yield ""
    yield "| cache | method | rope_dim + latent | loss | change | answered | healed: loss | change | answered | |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    yield _line("1", CONTROL, "", control, "")
    for run in runs:
        size = share_name(run["options"]["cache_ratio"])
        latents = f"2 x {run['healed']['kv_rank']}" if "svd" in run["options"] else str(run["healed"]["kv_rank"])
        keys = f"4 x {run['healed']['rope_dim']}" if "mha2mla" in run["kind"] else str(run["healed"]["rope_dim"])
        yield _line(size, run["kind"], f"{keys} + {latents}", run, _against_best(run, runs))
    yield ""
    yield (
        f"The loss is in nats per token on {original['loss_measured_on']}. The answered columns give the share of "
        f"{original['questions']} questions about one of 8 facts hidden in 256 tokens of the same files that the model "
        "answers exactly. The cache size is measured on the model's own cache object, in float32. The column "
        '"rope_dim + latent" gives the cached numbers of rotary keys and latents for each token and layer. A change is '
        "relative to the original. The last column compares the healed loss with the lowest loss of the same size "
        '("least"). The differences are taken spot by spot, with a normal 95 % interval over the spots. The interval '
        "does not include the variation between seeds. If two widths were healed, the picture shows the one chosen "
        "before healing."
    )
    yield ""
    yield "## Healing"
    yield ""
    yield (
        f"Healing uses `recipes/configs/{result['recipe']}` with {setting['steps']} steps of {setting['batch']} x 256 "
        f"tokens ({setting['steps'] * setting['batch'] * 256:,} in all, the same for every row) and a learning rate of "
        f"{setting['learning_rate']:g}. It trains every weight. The objective is the loss on the text plus "
        f"{setting['distill']:g} times the divergence from the original's distribution. Conversions are calibrated on "
        f"{result['calibration_tokens']:,} tokens of the same mixture (60 % text, 40 % text with hidden facts). Part "
        "of the gain comes from training as such: the original, trained for as long in the same way, goes from "
        f"{original['loss']:.4f} to {control['healed']['loss']:.4f} ({control['healed']['loss_change']:+.1%})."
    )
    yield ""
    yield "![Loss and retrieval while a conversion at 1/4 is healed](images/mla_heal.png)"
    yield ""
    yield from _tried()
    yield "## How many dimensions go on rotating"
    yield ""
    yield (
        "Each cell is the loss and the share answered before healing, for every width that fits. They are measured on "
        f"text that no result above is measured on ({setting['rope_spots']} passages and {setting['rope_questions']} "
        "questions in files that the model was trained on), with a quarter of the calibration. The width with the "
        "lowest loss (bold) is the one healed above. At 1/4 and 1/8, half of that width was healed as well."
    )
    yield ""
    yield from _widths(result)
    yield ""
    yield from _plain_text(_conversions(result))
    yield (
        "`python benchmarks/mla_sweep.py` produces all results except the settings tried before and the sweep on plain "
        f"text. Healing took {minutes:.0f} minutes of one core, with {host['threads']} thread on 2 cores of "
        f"{_short(host['cpu'])} shared with other work, in float32 (torch {host['torch'].split('+')[0]}, transformers "
        f"{host['transformers']}, Python {host['python']}). Finished runs are kept in "
        "`benchmarks/results/mla_sweep.json`."
    )


def _commands() -> Iterator[str]:
    yield "```bash"
    yield "pe-patch convert MODEL --to mla --cache-ratio 1/4 --out converted     # measured before and after"
    yield "pe-patch convert MODEL --to mla --sweep --output sweep                # methods and sizes, no training"
    yield "accelerate launch recipes/finetune.py recipes/configs/tiny_mla_heal.yaml   # transmla at 1/4, healed"
    yield "python benchmarks/mla_sweep.py                                        # this page"
    yield "```"


def _findings(result: dict[str, Any], runs: Sequence[Run], control: Run) -> Iterator[str]:
    """Sentences made from the numbers."""
    quarter = [run for run in runs if run["options"]["cache_ratio"] == 1 / 4]
    reached = [run for run in quarter if _reaches(run)]
    missed = [run for run in quarter if not _reaches(run)]
    yield (
        f"- At 1/4 after healing, these conversions keep the loss within {WITHIN:.0%} of the original's and answer at "
        f"least {ANSWERED:.0%} of the questions (change of the loss / share answered): {_listed(reached) or 'none'}. "
        f"These do not: {_listed(missed) or 'none'}."
    )
    for size in sorted({run["options"]["cache_ratio"] for run in runs}, reverse=True):
        there = [run for run in runs if run["options"]["cache_ratio"] == size]
        if len(there) < 2:
            continue
        best = min(there, key=lambda run: run["healed"]["loss"])
        equal = [run for run in there if run is not best and _gap(run, best)[0] - _gap(run, best)[1] <= 0]
        worst = max(there, key=lambda run: run["healed"]["loss"])
        said = f"- At {share_name(size)} after healing, {_name(best)} has the lowest loss ({_change(best, 'healed')}"
        said += f", not significantly different from {', '.join(map(_name, equal))})" if equal else ")"
        said += f" and {_name(worst)} the highest ({_change(worst, 'healed')}). {_answering(there, 'healed')}."
        before = min(there, key=lambda run: run["untuned"]["loss"])
        said += f" Before healing, {_name(before)} has the lowest loss ({_change(before, 'untuned')}). "
        yield said + f"{_answering(there, 'untuned')}."


def _answering(runs: Sequence[Run], when: str) -> str:
    """Who answers most and who fewest, or that the 95 % intervals of the two overlap."""
    ordered = sorted(runs, key=lambda run: -run[when]["retrieval"])
    most, least = ordered[0], ordered[-1]
    if most[when]["retrieval_interval"][0] <= least[when]["retrieval_interval"][1]:
        low, high = (f"{run[when]['retrieval']:.1%}" for run in (least, most))
        if low == high:
            return f"All answer {low}"
        return f"The shares answered do not differ significantly ({low} to {high})"
    return (
        f"{_name(most)} answers most questions ({most[when]['retrieval']:.1%}) and {_name(least)} fewest "
        f"({least[when]['retrieval']:.1%})"
    )


def _reaches(run: Run) -> bool:
    return run["healed"]["loss_change"] <= WITHIN and run["healed"]["retrieval"] >= ANSWERED


def _name(run: Run) -> str:
    return f"`{run['kind']}` (rope_dim {run['options']['rope_dim']})"


def _change(run: Run, when: str) -> str:
    return f"{run[when]['loss_change']:+.1%}"


def _listed(runs: Sequence[Run]) -> str:
    return ", ".join(f"{_name(run)} {_change(run, 'healed')} / {run['healed']['retrieval']:.1%}" for run in runs)


def _line(size: str, kind: str, made_of: str, run: Run, verdict: str) -> str:
    before, after = run["untuned"], run["healed"]
    cells = [size, kind, made_of]
    for row in (before, after):
        change = f"{row['loss_change']:+.1%}" if abs(row["loss_change"]) > 1e-9 else ""
        cells += [f"{row['loss']:.3f}", change, f"{row['retrieval']:.3f}"]
    return "| " + " | ".join([*cells, verdict]) + " |"


def _against_best(run: Run, runs: Sequence[Run]) -> str:
    there = [one for one in runs if one["options"]["cache_ratio"] == run["options"]["cache_ratio"]]
    best = min(there, key=lambda one: one["healed"]["loss"])
    if run is best:
        return "least"
    gap, half = _gap(run, best)
    return f"{gap:+.3f} +- {half:.3f}" + ("" if gap - half > 0 else ", not significant")


def _gap(run: Run, best: Run) -> tuple[float, float]:
    """Mean difference of the healed losses over the places, and half of its 95 % interval."""
    pairs = zip(run["healed"]["spots"], best["healed"]["spots"], strict=True)
    gaps = [ours - theirs for ours, theirs in pairs]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.fmean(gaps), 1.96 * error


def _control(result: dict[str, Any]) -> Run:
    return next(run for run in result["runs"] if run["kind"] == CONTROL)


def _conversions(result: dict[str, Any]) -> list[Run]:
    """By size, and in the order of the methods."""
    order = list(result["ropes"])
    runs = [run for run in result["runs"] if run["kind"] != CONTROL]
    return sorted(runs, key=lambda run: (-run["options"]["cache_ratio"], order.index(run["kind"])))


def _widths(result: dict[str, Any]) -> Iterator[str]:
    every = sorted({one["rope_dim"] for sizes in result["ropes"].values() for tried in sizes.values() for one in tried})
    yield "| cache | method | " + " | ".join(f"rope_dim {width}" for width in every) + " |"
    yield "| --- | --- |" + " ---: |" * len(every)
    for size in next(iter(result["ropes"].values())):
        for kind, sizes in result["ropes"].items():
            best = min(sizes[size], key=lambda one: one["loss"])["rope_dim"]
            cells = {one["rope_dim"]: f"{one['loss']:.2f} / {one['retrieval']:.2f}" for one in sizes[size]}
            cells[best] = f"**{cells[best]}**"
            yield f"| {size} | {kind} | " + " | ".join(cells.get(width, "-") for width in every) + " |"


def _tried() -> Iterator[str]:
    """Settings that were tried on one conversion before the sweep, and are no part of it."""
    file = RESULTS / "mla_heal_settings.json"
    if not file.exists():
        return
    tried = json.loads(file.read_text(encoding="utf-8"))
    yield tried["said"]
    yield ""
    yield "| rope_dim | steps x sequences | learning rate | distillation | temperature | loss | change | answered |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for one in tried["rows"]:
        yield (
            f"| {one['rope_dim']} | {one['steps']} x {one['batch']} | {one['learning_rate']:g} | {one['distill']:g} | "
            f"{one['temperature']:g} | {one['loss']:.3f} | {one['loss'] / tried['original'] - 1:+.1%} | "
            f"{one['retrieval']:.3f} |"
        )
    yield ""


def _plain_text(runs: Sequence[Run]) -> Iterator[str]:
    """What the command's own sweep finds, which calibrates on text without hidden facts."""
    file = RESULTS / "mla_sweep_text.jsonl"
    if not file.exists():
        return
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    yield "## Calibrated on plain text"
    yield ""
    yield (
        "`pe-patch convert demo --to mla --sweep` calibrates on text without hidden facts. The keys and values of the "
        "facts are tokens that this text never contains. The command uses the library's default widths. Each cell is "
        f"the loss and the share of {rows[0]['questions']} questions answered, before healing:"
    )
    yield ""
    sizes = list(dict.fromkeys(row["asked_ratio"] for row in rows[1:]))
    yield "| method | " + " | ".join(share_name(size) for size in sizes) + " |"
    yield "| --- |" + " ---: |" * len(sizes)
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        cells = [_cell(row) for row in rows[1:] if row["method"] == method]
        yield f"| {method} | " + " | ".join(cells) + " |"
    yield ""
    for row in rows[1:]:
        same = [run for run in runs if all(run["untuned"].get(key) == row.get(key) for key in SAME)]
        if row["asked_ratio"] == 1 / 4 and same:
            mixed = same[0]["untuned"]
            yield (
                f"- `{row['method']}` at 1/4 with rope_dim {row['rope_dim']} answers {row['retrieval']:.0%} if "
                f"calibrated on plain text, and {mixed['retrieval']:.0%} if calibrated on text with hidden facts. Its "
                f"loss is {row['loss']:.3f} and {mixed['loss']:.3f}, respectively."
            )
    yield ""
    yield (
        "The number of calibration tokens also matters. The table shows `transmla` at 1/4 of the cache, calibrated on "
        "plain text:"
    )
    yield ""
    yield "| calibration tokens | " + " | ".join(f"{tokens:,}" for tokens in TOKENS) + " |"
    yield "| --- |" + " ---: |" * len(TOKENS)
    yield "| loss against the original's | " + " | ".join(f"{change:+.1%}" for change in TOKENS.values()) + " |"
    yield ""
    yield (
        "A conversion warns if it has fewer than 32 calibration tokens for each number that the original caches for a "
        "token and layer. The limit is 8,192 tokens here, and 12,288 for SmolLM2 135M. To reproduce a column, run "
        "`pe-patch convert demo --to mla --cache-ratio 1/4 --calibration-tokens 2048`."
    )
    yield ""


def _cell(row: dict[str, Any]) -> str:
    return "-" if "note" in row else f"{row['loss']:.2f} / {row['retrieval']:.2f} (rope_dim {row['rope_dim']})"


def _short(cpu: str) -> str:
    return f"{cpu.split(' Processor')[0]} (AVX2)" if "AVX2" not in cpu else cpu


def _sizes(result: dict[str, Any]) -> bytes:
    """Untuned and healed, one colour for each method, at the width chosen before healing."""
    lines = []
    for colour, kind in enumerate(result["ropes"]):
        chosen = [run for run in _conversions(result) if run["kind"] == kind and _chosen(result, run)]
        for when in ("untuned", "healed"):
            lines.append(CacheLine(f"{kind}, {when}", [run[when] for run in chosen], colour, when == "untuned"))
    setting = result["setting"]
    title = (
        f"The demo's model, converted (dashed) and healed for {setting['steps']} steps of {setting['batch']} x 256 "
        "tokens (solid); one seed"
    )
    return cache_chart([line for line in lines if line.rows], result["original"], title)


def _chosen(result: dict[str, Any], run: Run) -> bool:
    tried = result["ropes"][run["kind"]][share_name(run["options"]["cache_ratio"])]
    return run["options"]["rope_dim"] == min(tried, key=lambda one: one["loss"])["rope_dim"]


def _course(result: dict[str, Any]) -> bytes:
    """Loss and retrieval at 1/4 while training goes on."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.6, 4.9), dpi=130, facecolor="white", layout="constrained")
    axes = figure.subplots(1, 2)
    runs = [_control(result), *(run for run in _conversions(result) if run["options"]["cache_ratio"] == 1 / 4)]
    kinds = [CONTROL, *result["ropes"]]
    for run in runs:
        index = kinds.index(run["kind"])
        control, narrow = run["kind"] == CONTROL, run["kind"] != CONTROL and not _chosen(result, run)
        style = {
            "color": "#1f2328" if control else LIGHT["series"][index],
            "marker": "." if control else MARKERS[index - 1],
            "linestyle": ":" if control else "--" if narrow else "-",
            "markersize": 5,
        }
        label = "original, trained as long" if control else f"{run['kind']}, rope_dim {run['options']['rope_dim']}"
        steps = [point["step"] for point in run["curve"]]
        for axis, measure in zip(axes, ("loss", "retrieval"), strict=True):
            axis.plot(steps, [point[measure] for point in run["curve"]], label=label, **style)
    for axis in axes:
        axis.set_xlabel(f"optimiser steps of {result['setting']['batch']} x 256 tokens")
        axis.grid(axis="y", color=LIGHT["faint"], linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss on held-out text (nats per token)")
    bound = result["original"]["loss"] * (1 + WITHIN)
    band = {"color": "#009e73", "alpha": 0.14, "linewidth": 0, "label": f"within {WITHIN:.0%} of the original"}
    axes[0].axhspan(result["original"]["loss"], bound, **band)
    axes[0].set_ylim(top=result["original"]["loss"] * 1.13)  # what starts above comes down within a few steps
    axes[1].set_ylabel("questions answered exactly (of 50)")
    axes[1].set_ylim(-0.03, 1.04)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("A quarter of the cache, while it is healed", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
