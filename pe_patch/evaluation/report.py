"""Results as a page that stands alone: verdict, tables, pictures, and how to get the same numbers."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pe_patch.evaluation import charts
from pe_patch.evaluation.results import Results, write_atomically
from pe_patch.evaluation.tables import Pivot, interval, pivots

CAPTIONS = {
    "loss": "Loss on the same last tokens at every length; lower is better, and a flat line means that "
    "distance does no harm.",
    "retrieval": "Share of questions answered exactly, by length and by where the answer stands in the text.",
    "frequencies": "How many tokens each pair of rotated dimensions takes for one turn. A pair whose wavelength lies "
    "above the trained window never made a full turn in training: past that window it shows the model angles it has "
    "not seen, unless a scheme stretches it.",
}


def write_report(
    results: Results,
    directory: str | os.PathLike[str],
    *,
    title: str = "Evaluation",
    verdict: str | None = None,
    command: str | None = None,
    notes: Sequence[str] = (),
    frequencies: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write index.html, the pictures as PNG, results.jsonl and config.json; returns the page's path.

    `verdict` is one sentence (default: the best retrieval at the greatest length). `frequencies` maps a scheme's name
    to its inverse frequencies [pairs], for the third picture. Everything shown is escaped.
    """
    folder = results.save(directory)
    pictures = []
    for name, draw in _charts(results, frequencies or {}).items():
        light, dark = draw(charts.LIGHT), draw(charts.DARK)
        if light is None or dark is None:
            continue
        write_atomically(folder / f"{name}.png", light)
        caption = CAPTIONS[name]
        pictures.append({"light": _base64(light), "dark": _base64(dark), "caption": caption, "alt": caption})
    page = _template().render(
        title=title,
        verdict=verdict or best_retrieval(results),
        command=command,
        notes=notes,
        tables=[_table(pivot) for pivot in pivots(results)],
        pictures=pictures,
        measured_on=list(dict.fromkeys(row.measured_on for row in results.rows if row.length == _longest(results))),
        config=[(name.replace("_", " "), _plain(value)) for name, value in results.config.items()],
    )
    write_atomically(folder / "index.html", page)
    return folder / "index.html"


def best_retrieval(results: Results) -> str:
    """A sentence that names the scheme that answers most at the greatest length, and the others' range."""
    found = next((pivot for pivot in pivots(results) if pivot.counts), None)
    if found is None:
        return "Only loss was measured here; that alone does not show that the context is used."
    last = {scheme: cell for scheme, cells in found.cells.items() if (cell := cells[-1]) is not None}
    best = max(last, key=lambda scheme: last[scheme].score)
    cell = last[best]
    sentence = (
        f"At {found.lengths[-1]} tokens {best} answers {cell.score:.0%} of {cell.samples} questions "
        f"({found.task}; 95 % interval {interval(cell)})"
    )
    if cell.control is not None:
        sentence += f", against {cell.control:.0%} of the same questions within the trained window"
    return sentence + "."


def _charts(
    results: Results, frequencies: Mapping[str, np.ndarray]
) -> dict[str, Callable[[charts.Colours], bytes | None]]:
    return {
        "loss": lambda colours: charts.loss_chart(results, colours),
        "retrieval": lambda colours: charts.retrieval_chart(results, colours),
        "frequencies": lambda colours: charts.wavelength_chart(results, frequencies, colours),
    }


def _table(pivot: Pivot) -> dict[str, Any]:
    counted = {cell.samples for cells in pivot.cells.values() for cell in cells if cell is not None}
    unit = "questions" if pivot.counts else "tokens"
    return {
        "title": f"{pivot.task.capitalize()}: {pivot.measure}",
        "caption": f"Columns: tokens given to the model. Each number counts {_range(counted)} {unit}; below it the "
        f"95 % interval. {'More' if pivot.counts else 'Less'} is better; the best of each column is in colour.",
        "lengths": [f"{length:,}" for length in pivot.lengths],
        "rows": [
            (scheme, [_cell(cell, column, pivot) for column, cell in enumerate(cells)])
            for scheme, cells in pivot.cells.items()
        ],
    }


def _cell(cell: Any, column: int, pivot: Pivot) -> dict[str, Any]:
    if cell is None:
        return {"score": "-", "interval": "", "best": False}
    scores = [round(other.score, 3) for cells in pivot.cells.values() if (other := cells[column]) is not None]
    best = (max if pivot.counts else min)(scores)
    return {
        "score": f"{cell.score:.3f}",
        "interval": interval(cell),
        "best": len(scores) > 1 and round(cell.score, 3) == best,
    }


def _range(counts: set[int]) -> str:
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"


def _longest(results: Results) -> int:
    return max(results.values("length"))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pe_patch.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
