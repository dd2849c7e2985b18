"""The page stands alone, escapes what it shows, and its numbers are those of the rows."""

import re
from html.parser import HTMLParser
from typing import ClassVar

import numpy as np
import pytest

from pe_patch.evaluation import charts
from pe_patch.evaluation.report import best_retrieval, write_report
from pe_patch.evaluation.results import Results, Row
from pe_patch.evaluation.tables import pivots

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


def test_what_a_model_or_a_file_says_is_escaped(folder):
    page = (folder / "index.html").read_text()
    assert "<script" not in page
    # title twice (tab and heading), verdict, two tables, command, note, two measured-on lines, configuration
    assert page.count("&lt;script&gt;") >= 9


def test_the_page_needs_no_network(folder):
    class Links(HTMLParser):
        found: ClassVar[list[str]] = []

        def handle_starttag(self, tag, attributes):
            assert tag not in ("script", "link", "iframe")
            self.found += [value for name, value in attributes if name in ("src", "href", "srcset")]

    page = (folder / "index.html").read_text()
    Links().feed(page)
    assert len(Links.found) == 6 and all(link.startswith("data:image/png;base64,") for link in Links.found)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_the_files_of_a_report(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.html", "loss.png", "retrieval.png", "frequencies.png", "results.jsonl", "config.json"}
    for name in ("loss.png", "retrieval.png", "frequencies.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n")
    assert len(Results.load(folder).rows) == 12


def test_depths_are_pooled_and_the_best_of_each_length_is_marked(results, folder):
    found = {pivot.task: pivot for pivot in pivots(results)}
    cell = found["needle"].cells["base"][1]
    assert cell.score == pytest.approx(0.25) and cell.samples == 20
    # Clopper and Pearson for 5 of 20
    assert (cell.low, cell.high) == (pytest.approx(0.0866, abs=1e-4), pytest.approx(0.4910, abs=1e-4))
    page = (folder / "index.html").read_text()
    assert re.search(r'<td class="best">0.950<small>', page) and re.search(r"<td>0.250<small>", page)


def test_the_verdict_names_the_best_at_the_greatest_length(results):
    sentence = best_retrieval(results)
    assert sentence.startswith("At 512 tokens yarn") and "95% of 20 questions" in sentence
    only_loss = Results([entry for entry in results.rows if entry.task == "perplexity"])
    assert "does not show that the context is used" in best_retrieval(only_loss)


def test_pictures_that_have_nothing_to_show_are_left_out(results, tmp_path):
    only_loss = Results([entry for entry in results.rows if entry.task == "perplexity"], results.config)
    write_report(only_loss, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["loss.png"]


def test_drawing_leaves_the_users_matplotlib_alone(results):
    import matplotlib

    before = matplotlib.get_backend(), dict(matplotlib.rcParams)
    assert charts.loss_chart(results, charts.DARK) != charts.loss_chart(results, charts.LIGHT)
    assert (matplotlib.get_backend(), dict(matplotlib.rcParams)) == before
