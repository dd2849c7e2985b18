"""Results as a page that stands alone: verdict, tables, charts, and how to get the same numbers.

What else a page should show, such as a comparison's table of schemes against what each of them does, is handed over as
`Section`s, which stand directly below the verdict:

    from pe_patch.evaluation.charts import dots
    from pe_patch.evaluation.report import Entry, Section, write_report

    table = Section(
        "Schemes at 8 x the window",
        text="One paragraph.",
        columns=["scheme", "retrieval", "loss"],
        rows=[["yarn", Entry("0.94", 0.94, small="0.81 to 0.99", hint="35 questions", best=True), Entry("2.91", 2.91)]],
        caption="Each number counts 35 questions; more is better.",
        sortable=True,
        charts=[dots([{"label": "yarn", "column": "retrieval", "value": 0.94, "low": 0.81, "high": 0.99,
                       "samples": "35 questions", "measured_on": "..."}],
                     name="schemes", title="Schemes at 8 x the window", subtitle="35 questions, model, text")],
    )
    write_report(results, "report", sections=[table])

`dots` makes one panel for each `column`; the picture beside the page is `schemes.png`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import vl_convert

from ..errors import PePatchError
from .charts import DARK, LIGHT, Chart, charts_of, theme
from .results import Results, write_atomically
from .sections import Entry, Section, effective_sections, examples_section, rows_section, score_sections
from .tables import interval, pivots

__all__ = ["Entry", "Section", "best_retrieval", "write_report"]


def write_report(
    results: Results,
    directory: str | os.PathLike[str],
    *,
    title: str = "Evaluation",
    verdict: str | None = None,
    command: str | None = None,
    notes: Sequence[str] = (),
    frequencies: Mapping[str, np.ndarray] | None = None,
    sections: Sequence[Section] = (),
    overwrite: bool = False,
) -> Path:
    """Write index.html, each chart as PNG, results.jsonl and config.json; returns the page's path.

    `verdict` is one sentence (default: the best retrieval at the greatest length). `frequencies` maps a scheme's name
    to its inverse frequencies [pairs], for the chart of wavelengths. `sections` stand between the verdict and the
    tables that every evaluation has. Everything shown is escaped. The page asks for nothing over a network: it holds
    the library of its charts, and its policy forbids every script but the two that it came with. A directory that holds
    something else than an evaluation raises `OutputError` unless `overwrite=True`.
    """
    if not results.rows:
        raise PePatchError("There are no rows to report.")
    folder = results.save(directory, overwrite=overwrite)
    measured_on = results.values("measured_on")
    own = charts_of(results, frequencies)
    details = [examples_section(results), rows_section(results, measured_on)]
    page = {
        "sections": sections,
        "scores": [*effective_sections(results), *score_sections(results)],
        "charts": own,
        "details": [section for section in details if section is not None],
    }
    charts = [*(chart for section in sections for chart in _within(section)), *own]
    _check_names(charts)
    for chart in charts:
        write_atomically(folder / f"{chart.name}.png", chart.png())
    hashes = [(f"hash of the {what}", _plain(results.values(f"{what}_hash"))) for what in ("text", "tokenizer")]
    scripts = [_library(), _source("report.js")]
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            **page,
            title=title,
            verdict=verdict or best_retrieval(results),
            command=command,
            notes=notes,
            measured_on=measured_on,
            config=[*((name.replace("_", " "), _plain(value)) for name, value in results.config.items()), *hashes],
            specifications=_json({chart.name: chart.specifications() for chart in charts}),
            themes=_json({"light": theme(LIGHT), "dark": theme(DARK)}),
            style=_source("report.css"),
            scripts=scripts,
            digests=[_digest(script) for script in scripts],
        )
    )
    write_atomically(folder / "index.html", html)
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


def _within(section: Section) -> Iterator[Chart]:
    yield from section.charts
    for part in section.parts:
        yield from _within(part)


def _check_names(charts: Sequence[Chart]) -> None:
    names = [chart.name for chart in charts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PePatchError(f"Two charts are called {', '.join(twice)}; each needs a name of its own, for its picture.")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)


def _json(value: Any) -> str:
    """JSON that an HTML parser reads as one piece of text, whatever names are in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed as one script, minified, that puts `vegaEmbed` into the window."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    if "</script" in script.lower() or "<script" in script.lower():
        raise PePatchError("The charts' library contains a script tag, and cannot stand within a page.")
    return script


@cache
def _source(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """What a Content-Security-Policy calls a script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pe_patch.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
