"""The page in a real browser: it draws its charts, runs no injected script, uses no network, and fits a phone."""

import struct
from pathlib import Path
from urllib.parse import urlparse

import pytest

from pe_patch.evaluation.charts import DARK, LIGHT
from pe_patch.evaluation.report import write_report
from pe_patch.evaluation.results import Results
from tests.chromium import FOUND, Chromium
from tests.test_report import row

pytestmark = pytest.mark.skipif(FOUND is None, reason="There is no Chromium here.")

EVIL = "<script>window.ran = 1; alert('&')</script><img src=x onerror='window.ran = 2'>"
LONG = "a_scheme_with_a_name_of_some_length, fine-tuned for 300 steps"
TASKS = ("needle", "passkey", EVIL, "key_value")
DRAWN = "document.documentElement.dataset.drawn"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the address of a page with every kind of chart and hostile text in every field."""
    rows, lengths = [], (64, 128, 256, 512)
    buckets = [{"first": 2**n, "last": 2 ** (n + 1) - 1, "loss": 5 - n / 2, "tokens": 2**n} for n in range(8)]
    asked = {"without_context": 0.0, "measured_on": f"35 questions, {EVIL}"}
    answers = [{"question": f"... which word? {EVIL}", "prediction": EVIL, "references": [EVIL, "b"], "score": 0.0}]
    for number, scheme in enumerate(("base", f"yarn {EVIL}", LONG)):
        for step, length in enumerate(lengths):
            score = 1 - step * 0.3 / (number + 1)
            rows += [
                row(scheme, task, length, score, depth, measure="exact answers", details={"examples": answers}, **asked)
                for task in TASKS
                for depth in ((0.1, 0.5, 0.9) if task == "needle" else (None,))
            ]
            loss = 3 + step / (number + 1)
            rows.append(row(scheme, "perplexity", length, loss, low=loss - 0.2, high=loss + 0.2))
            positions = {"measure": "nats per token, by position", "details": {"buckets": buckets}}
            rows.append(row(scheme, "perplexity", length, loss, low=loss - 0.2, high=loss + 0.2, **positions))
    folder = tmp_path_factory.mktemp("report")
    config = {"model": EVIL, "native_window": 128, "text": EVIL}
    frequencies = {"base": [10000.0 ** (-pair / 16) for pair in range(16)]}
    write_report(Results(rows, config), folder, title=EVIL, command=EVIL, notes=[EVIL], frequencies=frequencies)
    return (folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def show(chromium, page, width=1200, scheme="light", phone=False):
    chromium.look(width, 900, scheme, phone)
    chromium.open(page)
    chromium.wait(f"{DRAWN} === '{scheme}'")


def unfold(chromium):
    """Open folded sections and wait for their charts."""
    chromium.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    chromium.wait("[...document.querySelectorAll('[data-chart]')].every((place) => place.querySelector('svg'))")


@pytest.mark.parametrize(
    ("width", "scheme", "phone"), [(1200, "light", False), (1200, "dark", False), (390, "light", True)]
)
def test_every_chart_is_drawn_and_the_page_fits(chromium, page, width, scheme, phone):
    show(chromium, page, width, scheme, phone)
    unfold(chromium)
    sizes = chromium.run("""[...document.querySelectorAll('[data-chart]')].map((place) => {
        const box = place.querySelector('svg').getBoundingClientRect();
        return [place.dataset.chart, place.querySelectorAll('svg path').length, box.width, box.height, box.right];
    })""")
    # a panel for each scheme and for each of four tasks: tasks, answers, depth; loss, positions, wavelengths
    assert len(sizes) == 3 + 4 + 3 + 1 + 1 + 1
    assert all(marks > 5 and w > 150 and h > 100 and right <= width for _, marks, w, h, right in sizes), sizes
    assert chromium.run("document.documentElement.scrollWidth") == width
    # legends, titles and labels wrap or are shortened; none is cut off by the edge of its chart
    cut = chromium.run("""[...document.querySelectorAll('[data-chart] svg')].flatMap((chart) => {
        const frame = chart.getBoundingClientRect();
        return [...chart.querySelectorAll('text, .role-legend-symbol path')].filter((part) => {
            const box = part.getBoundingClientRect();
            return box.top < frame.top - 2 || box.bottom > frame.bottom + 2
                || box.left < frame.left - 2 || box.right > frame.right + 2;
        }).map((part) => `${chart.closest('[data-chart]').dataset.chart}: ${part.textContent || 'sign'}`);
    })""")
    assert cut == []
    assert chromium.complaints() == []
    # a screenshot that is not blank does not compress to nothing
    picture = chromium.picture()
    assert struct.unpack(">II", picture[16:24]) == (width, 900) and len(picture) > 20_000


def test_no_injected_script_runs_and_no_network_is_used(chromium, page):
    show(chromium, page)
    unfold(chromium)
    assert chromium.run("window.ran === undefined && document.querySelectorAll('main img').length === 0")
    assert chromium.run("document.title") == EVIL
    assert chromium.requests() == [page] and chromium.complaints() == []


def test_the_policy_blocks_a_foreign_script(chromium, page, tmp_path):
    whole = Path(urlparse(page).path).read_text()
    (tmp_path / "index.html").write_text(whole.replace("</main>", f"{EVIL}</main>"))
    show(chromium, (tmp_path / "index.html").as_uri())
    assert chromium.run("window.ran === undefined")
    assert any("Content Security Policy" in str(complaint) for complaint in chromium.complaints())


def test_the_charts_follow_the_readers_colour_scheme(chromium, page):
    papers = []
    show(chromium, page)
    for scheme in ("light", "dark", "light"):
        chromium.look(1200, scheme=scheme)
        chromium.wait(f"{DRAWN} === '{scheme}'")
        papers.append(
            chromium.run("""[getComputedStyle(document.body).backgroundColor,
            ...[...document.querySelectorAll('[data-chart] svg')].map((chart) => chart.style.backgroundColor)]""")
        )
    rgb = [
        f"rgb({', '.join(str(int(colours['paper'][n : n + 2], 16)) for n in (1, 3, 5))})" for colours in (LIGHT, DARK)
    ]
    assert [set(found) for found in papers] == [{rgb[0]}, {rgb[1]}, {rgb[0]}]
    assert chromium.complaints() == []


def middle(chromium, script):
    """Scroll to an element and return its place in the window."""
    return chromium.run(f"""(() => {{
        const element = {script};
        element.scrollIntoView({{ block: 'center' }});
        const box = element.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    }})()""")


def mouse(chromium, kind, place):
    buttons = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
    chromium.tell("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], **buttons)


def faint(chart):
    """Count the muted lines of a chart."""
    return f"""[...document.querySelectorAll('[data-chart={chart}] .mark-line path')]
        .filter((line) => Number(line.getAttribute('opacity') ?? line.style.opacity ?? 1) < 0.5).length"""


def test_a_click_on_a_legend_mutes_the_others_in_all_charts(chromium, page):
    show(chromium, page)
    assert chromium.run(faint("loss")) == chromium.run(faint("retrieval")) == 0
    place = middle(chromium, "document.querySelector('[data-chart=loss] .role-legend-symbol path')")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        mouse(chromium, kind, place)
    chromium.wait(f"{faint('loss')} === 2")
    # in each of four panels two of three schemes
    chromium.wait(f"{faint('retrieval')} === 8")
    assert chromium.complaints() == []


def test_a_tooltip_shows_the_details_of_a_point(chromium, page):
    show(chromium, page)
    place = middle(
        chromium, "[...document.querySelectorAll('[data-chart=retrieval] .mark-symbol.role-mark path')].at(-1)"
    )
    mouse(chromium, "mouseMoved", [place[0] - 40, place[1] - 40])
    mouse(chromium, "mouseMoved", place)
    chromium.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    words = chromium.run("document.querySelector('#vg-tooltip-element').innerText")
    # what `row` in the other test says of every point: score and interval of the last length, 10 questions, control 1.0
    for told in ("0.700", "0.600 to 0.800", "10 questions", "1.000 at 64 tokens", "without context", EVIL):
        assert told in words, words
    assert chromium.run("window.ran === undefined && document.querySelectorAll('img').length === 0")


def test_every_row_can_be_sorted_and_filtered(chromium, page):
    show(chromium, page)
    unfold(chromium)
    table = "[...document.querySelectorAll('details')].find((fold) => fold.innerText.startsWith('Every row'))"
    column = f"[...{table}.querySelectorAll('tbody tr')].map((row) => row.cells[3].textContent)"
    button = f"{table}.querySelectorAll('th button')[3]"
    assert chromium.run(f"{button}.textContent") == "length"
    assert chromium.run(f"{column}.length") == 3 * 4 * 8
    chromium.run(f"{button}.click()")
    chromium.run(f"{button}.click()")
    # as numbers; as text, 512 would come before 64
    assert list(dict.fromkeys(chromium.run(column))) == ["512", "256", "128", "64"]
    field = f"{table}.querySelector('input')"
    chromium.run(f"{field}.value = 'base passkey'; {field}.dispatchEvent(new Event('input'))")
    assert chromium.run(f"[...{table}.querySelectorAll('tbody tr')].filter((row) => !row.hidden).length") == 4


def test_without_scripts_the_page_shows_the_pngs(chromium, page):
    chromium.tell("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.look(1200)
        chromium.open(page)
        widths = chromium.run("[...document.images].map((image) => image.naturalWidth)")
    finally:
        chromium.tell("Emulation.setScriptExecutionDisabled", value=False)
    assert len(widths) == 6 and all(width > 400 for width in widths)


RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
"""Groups of axe's rules that the page keeps: the Web Content Accessibility Guidelines 2.1, levels A and AA."""


def check_accessibility(chromium):
    """Return what axe-core finds against the page that is open: rule, reason and the first element."""
    axe = pytest.importorskip("axe_core_python")
    chromium.run((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8") + "; true")
    chromium.run(
        f"axe.run(document, {{runOnly: {RULES}}}).then((found) => {{ window.found = found.violations; }}); true"
    )
    chromium.wait("window.found !== undefined")
    return chromium.run("window.found.map((each) => [each.id, each.help, each.nodes[0].html.slice(0, 200)])")


@pytest.mark.parametrize(
    ("width", "scheme", "phone"), [(1200, "light", False), (1200, "dark", False), (390, "light", True)]
)
def test_the_page_is_accessible(chromium, page, width, scheme, phone):
    show(chromium, page, width, scheme, phone)
    unfold(chromium)
    assert check_accessibility(chromium) == []
