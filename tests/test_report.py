"""The page is self-contained, escapes its text, and shows the numbers of the rows."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import altair as alt
import numpy as np
import pytest

import pe_patch
from pe_patch.errors import PePatchError
from pe_patch.evaluation.charts import CacheLine, cache_chart, charts_of, dots
from pe_patch.evaluation.report import Entry, Section, best_retrieval, write_report
from pe_patch.evaluation.results import Results, Row, pivots

EVIL = "<script>alert('&')</script>"


def row(scheme, task, length, score, depth=None, **changes):
    measured = {
        "scheme": scheme,
        "task": task,
        "measure": "exact answers, 8 needles" if task == "needle" else "nats per token, fixed targets",
        "length": length,
        "tokens": length,
        "depth": depth,
        "score": score,
        "low": max(0.0, score - 0.1),
        "high": score + 0.1,
        "samples": 10,
        "control": 1.0,
        "control_length": 64,
        "seconds": 1.0,
        "peak_memory": 2**20,
        "memory_kind": "resident memory above start",
        "seed": 0,
        "text_hash": "a",
        "tokenizer_hash": "b",
        "measured_on": f"somewhere {EVIL}",
    }
    return Row(**(measured | changes))


@pytest.fixture(scope="module")
def results():
    scores = {"base": (1.0, 0.2), f"yarn {EVIL}": (1.0, 0.9)}
    rows = [
        row(scheme, "needle", length, score + step, depth)
        for scheme, pair in scores.items()
        for length, score in zip((64, 512), pair, strict=True)
        for depth, step in ((0.1, 0.0), (0.9, 0.1 if score < 1 else 0.0))
    ]
    rows += [row(scheme, "perplexity", n, 3.0 + n / 1000) for scheme in scores for n in (64, 512)]
    return Results(rows, {"model": EVIL, "native_window": 64, "seed": 0})


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    frequencies = {"base": 10000.0 ** (-np.arange(8) / 8), f"yarn {EVIL}": 80000.0 ** (-np.arange(8) / 8)}
    write_report(results, folder, title=EVIL, command=EVIL, notes=[EVIL], frequencies=frequencies)
    return folder


class Page(HTMLParser):
    """Collect tags with their attributes, the text between them, and the data of scripts."""

    def __init__(self, folder):
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], [], [], ""
        self.whole = (folder / "index.html").read_text()
        self.feed(self.whole)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        (self.scripts if self.inside == "script" else self.text).append(data)

    def attributes(self, tag):
        return [given for name, given in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder)


def test_names_and_texts_are_escaped(page):
    assert EVIL not in page.whole
    # two scripts with data and two of the page, none from a name
    assert [given.get("id") for given in page.attributes("script")] == ["specifications", "themes", None, None]
    # title twice (tab and heading), verdict, two tables, command, note, two measured-on lines, configuration
    assert page.whole.count("&lt;script&gt;") >= 9
    assert EVIL in "".join(page.text)


def test_a_name_with_markup_reaches_the_charts_unchanged(page, results):
    found = json.loads(page.scripts[0])
    assert "<" not in page.scripts[0] and "<" not in page.scripts[1]
    data = [row for rows in found["loss"][0]["datasets"].values() for row in rows]
    named = {row["scheme"]: row for row in data if row.get("length") == 512}
    assert set(named) == {"base", f"yarn {EVIL}"} and named["base"]["measured_on"] == f"somewhere {EVIL}"


def test_the_page_needs_no_network(page):
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {name for name, _ in page.tags}
    assert all("src" not in given for given in page.attributes("script"))
    pictures = [given["src"] for given in page.attributes("img")]
    assert pictures == [given["href"] for given in page.attributes("a") if not given["href"].startswith("#")]
    assert set(pictures) == {"loss.png", "retrieval.png", "depth.png", "frequencies.png"}
    assert not re.search(r"https?://|@import|url\(", "".join(page.text) + page.scripts[0] + page.scripts[3])
    [policy] = [given["content"] for given in page.attributes("meta") if "http-equiv" in given]
    assert policy.startswith("default-src 'none'; script-src 'unsafe-eval' 'sha256-")
    assert "prefers-color-scheme: dark" in page.whole and 'name="viewport"' in page.whole


def test_the_files_of_a_report(folder):
    pictures = {"loss.png", "retrieval.png", "depth.png", "frequencies.png"}
    assert {path.name for path in folder.iterdir()} == {*pictures, "index.html", "results.jsonl", "config.json"}
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n")
    assert len(Results.load(folder).rows) == 12
    # most of it is the chart library, which is included once
    assert 0.8e6 < (folder / "index.html").stat().st_size < 1.2e6


def test_depths_are_pooled_and_the_best_score_of_each_length_is_marked(results, folder):
    found = {pivot.task: pivot for pivot in pivots(results)}
    cell = found["needle"].cells["base"][1]
    assert cell.score == pytest.approx(0.25) and cell.samples == 20
    # Clopper and Pearson for 5 of 20
    assert (cell.low, cell.high) == (pytest.approx(0.0866, abs=1e-4), pytest.approx(0.4910, abs=1e-4))
    page = (folder / "index.html").read_text()
    hint = 'title="20 questions; 1.000 within the trained window"'
    assert re.search(rf'<td class="best" data-value="0.95\d*" {hint}>0.950<small>', page)
    assert re.search(rf'<td data-value="0.25" {hint}>0.250<small>0.09 to 0.49<', page)


def test_the_verdict_names_the_best_scheme_at_the_longest_length(results):
    sentence = best_retrieval(results)
    assert sentence.startswith("At 512 tokens yarn") and "95% of 20 questions" in sentence
    only_loss = Results([entry for entry in results.rows if entry.task == "perplexity"])
    assert "does not show that the context is used" in best_retrieval(only_loss)


def test_charts_without_data_are_left_out(results, tmp_path):
    only_loss = Results([entry for entry in results.rows if entry.task == "perplexity"], results.config)
    write_report(only_loss, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["loss.png"]
    with pytest.raises(PePatchError, match="no rows"):
        write_report(Results(), tmp_path)


def panels(results, name):
    """Return the data of each panel of a chart, which its layers share."""
    [chart] = [chart for chart in charts_of(results) if chart.name == name]
    return [[row for rows in panel["datasets"].values() for row in rows] for panel in chart.specifications()]


def test_the_charts_show_the_numbers_of_the_rows(results):
    base, _ = panels(results, "depth")
    assert {(row["length"], row["depth"]): row["short"] for row in base} == {
        (64, "10%"): "1.00", (64, "90%"): "1.00", (512, "10%"): "0.20", (512, "90%"): "0.30",
    }  # fmt: skip
    [points] = panels(results, "retrieval")
    pooled = next(row for row in points if row.get("length") == 512 and row.get("scheme") == "base")
    assert pooled["score"] == pytest.approx(0.25) and pooled["samples"] == "20 questions"
    # Clopper and Pearson for 5 of 20
    assert pooled["interval"] == "0.087 to 0.491" and pooled["control"] == "1.000 at 64 tokens"
    assert any(row.get("note") == "trained window 64" for row in points)


def test_the_specifications_are_vega_lite(results):
    frequencies = {"base": 10000.0 ** (-np.arange(8) / 8)}
    for chart in charts_of(many(results), frequencies):
        for specification in chart.specifications():
            alt.Chart.from_dict(specification, validate=True)
            assert specification["width"] == "container" and "config" not in specification


def many(results):
    """Copy the rows to three more tasks, and add a loss by position."""
    rows = [replace(entry, task=f"task {n}") for entry in results.rows if entry.task == "needle" for n in range(3)]
    buckets = [{"first": 1, "last": 1, "loss": 4.0, "tokens": 8}, {"first": 2, "last": 3, "loss": 3.0, "tokens": 16}]
    rows += [
        replace(entry, measure="nats per token, by position", details={"buckets": buckets})
        for entry in results.rows
        if entry.task == "perplexity"
    ]
    return Results(results.rows + rows, results.config)


def test_many_tasks_have_a_heat_map_and_a_mean(results, tmp_path):
    base, _ = panels(many(results), "tasks")
    assert {row["line"] for row in base} == {"needle", *(f"task {n}" for n in range(3))}
    assert {row["short"] for row in base if row["length"] == 512} == {"0.25"}
    write_report(many(results), tmp_path)
    page = Page(tmp_path)
    assert "Mean of 4 tasks: each task weighing the same" in page.text and "Tables of the 4 tasks" in page.text
    [points] = panels(many(results), "positions")
    assert [(row["length"], row["score"]) for row in points if row.get("scheme") == "base"] == [(1, 4.0), (3, 3.0)]


def test_lower_is_better_for_everything_derived_from_a_loss(results):
    shown = [replace(entry, measure=name) for entry in results.rows if entry.task == "perplexity"
             for name in ("LongPPL", "word perplexity, as lm-eval's rolling", "bits_per_byte")]  # fmt: skip
    assert not any(pivot.higher_is_better for pivot in pivots(Results(shown)))
    assert "does not show that the context is used" in best_retrieval(Results(shown))


def test_a_single_length_gives_dot_plots(results):
    longest = Results([entry for entry in results.rows if entry.length == 512], results.config)
    [needle] = panels(longest, "retrieval")
    assert {row["label"]: row["value"] for row in needle} == {
        "base": pytest.approx(0.25), f"yarn {EVIL}": pytest.approx(0.95),
    }  # fmt: skip


def test_a_verdict_does_not_compare_a_score_with_itself(results):
    inside = [replace(row, control_length=row.length) for row in results.rows]
    assert "against" in best_retrieval(results)
    assert "against" not in best_retrieval(Results(inside, results.config))


def test_nats_have_the_heading_loss(results, tmp_path):
    page = write_report(results, tmp_path / "report").read_text(encoding="utf-8")
    assert "Loss: nats per token" in page and "Perplexity: nats" not in page
    assert "loss: nats per token" in str(results) and "perplexity: nats" not in str(results)


def test_sections_follow_the_verdict(results, tmp_path):
    row = {"label": EVIL, "column": "bytes", "value": 4096.0, "low": 4000.0, "high": 5000.0, "samples": "3 runs"}
    chart = dots([row, row | {"label": "other", "value": None}], name="costs", title="Costs")
    table = Section("Costs of each", columns=["scheme", "bytes"], rows=[[EVIL, Entry("4,096", 4096, hint=EVIL)]],
                    caption="3 runs", sortable=True, charts=[chart])  # fmt: skip
    write_report(results, tmp_path, sections=[table, Section("Folded", text="all of it", folded=True)])
    page = Page(tmp_path)
    text = "".join(page.text)
    assert EVIL not in page.whole and text.index("answers 95%") < text.index("Costs of each") < text.index("Needle:")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PePatchError, match="Two charts are called costs"):
        write_report(results, tmp_path, sections=[table, table])
    with pytest.raises(PePatchError, match="label, column and value"):
        dots([{"label": "base", "value": 1.0}], name="costs", title="Costs")


def test_the_cache_chart_is_a_png():
    original = {"cached_bytes_per_token": 4096, "loss": 3.0, "retrieval": 1.0, "questions": 50}
    rows = [{"cached_bytes_per_token": 4096 // n, "loss": 3.0 + n / 10, "retrieval": 1 - n / 20} for n in (2, 4, 8)]
    lines = [CacheLine(f"svd {EVIL}", rows, 0), CacheLine("other", rows[:2], 1, dashed=True)]
    assert cache_chart(lines, original, EVIL).startswith(b"\x89PNG\r\n")


def test_the_users_altair_settings_do_not_matter_or_change(results):
    before = [[chart.specifications() for chart in charts_of(results)]]
    with alt.theme.enable("dark"), alt.data_transformers.enable("default", max_rows=1):
        before.append([chart.specifications() for chart in charts_of(results)])
        assert alt.theme.active == "dark" and alt.data_transformers.options == {"max_rows": 1}
    assert json.dumps(before[0]) == json.dumps(before[1])


def test_the_package_draws_without_matplotlib():
    sources = {path: path.read_text(encoding="utf-8") for path in Path(pe_patch.__file__).parent.rglob("*.py")}
    assert len(sources) > 100
    assert [path for path, text in sources.items() if re.search(r"^\s*(import|from) matplotlib", text, re.M)] == []


def test_the_effective_length_is_shown_for_ruler_tasks(tmp_path):
    scores = {64: (1.0, 0.9), 512: (0.9, 0.82), 1024: (0.7, 0.9)}
    rows = [
        row("yarn", task, length, score, measure="share of references found")
        for length, pair in scores.items()
        for task, score in zip(("niah_single_1", "vt"), pair, strict=True)
    ]
    page = write_report(Results(rows, {"native_window": 64}), tmp_path).read_text()
    # means .95, .86 and .80; the threshold is .856
    assert re.search(r"Effective length.*?yarn.*?512.*?0\.870", page, re.S)
    assert "not measured: niah_single_2" in page and "2 of RULER&#39;s thirteen" in page
    other = Results([row("a", "needle", 64, 1.0)])
    assert "Effective length" not in write_report(other, tmp_path).read_text()
