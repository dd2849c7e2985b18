"""Run the Python snippets of README and the documentation on a small model, and parse every command that they show."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pe_patch import ADAPTERS, SCHEMES, unpatch_model
from pe_patch.cli import main as cli
from pe_patch.data.packaged import DEMO_MODEL
from pe_patch.patching.api import find_patch

from .chromium import FOUND, Chromium

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "hooks"))
PAGES = ("README.md", *(f"docs/{name}.md" for name in (
    "index", "get-started", "choose", "fine-tune", "write-your-own", "migrate", "how-it-works",
)))  # fmt: skip
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORTER = {
    "target_length=32768": "target_length=1024",
    "window=1024": "window=64",
    "i % 4 == 3": "i % 2 == 1",
    '"original_max_position_embeddings": 8192': '"original_max_position_embeddings": 256',
}
"""Lengths for the demo's model, whose window is 256 tokens."""


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


def commands() -> Iterator[Any]:
    for path in ("README.md", *(str(each.relative_to(ROOT)) for each in sorted((ROOT / "docs").glob("*.md")))):
        for block in (*snippets(path, "bash"), *snippets(path, "sh")):
            for line in block.splitlines():
                if line.startswith("pe-patch ") and " | " not in line and "..." not in line.replace('"..."', ""):
                    yield pytest.param(
                        shlex.split(line, comments=True)[1:], id=f"{path}: {line.partition('#')[0].strip()[:80]}"
                    )


@pytest.mark.parametrize("words", commands())
def test_every_command_parses(words: list[str]) -> None:
    group: Any = typer.main.get_command(cli.app)
    words = cli.spread(words)
    if words[0].startswith("-"):
        group.make_context("pe-patch", words, resilient_parsing=True)
        return
    group.commands[words[0]].make_context(
        words[0], words[1:], parent=group.context_class(group, info_name="pe-patch")
    ).close()


@pytest.fixture
def on_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Return the names that snippets use; the hub name that they load is the demo's model here."""
    monkeypatch.chdir(tmp_path)
    for loader in (AutoModelForCausalLM, AutoTokenizer, AutoConfig):
        original = loader.from_pretrained
        monkeypatch.setattr(
            loader, "from_pretrained",
            lambda name, *args, original=original, **more: original(
                DEMO_MODEL if name == HUB_NAME else name, *args, **more
            ),
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "inputs": {"input_ids": torch.arange(3, 20)[None], "max_new_tokens": 2},
    }


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "python")])
def test_the_snippets_run(page: str, on_the_demo: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    schemes, families = dict(SCHEMES), dict(ADAPTERS)
    names = dict(on_the_demo)
    exec("from pe_patch import *\nfrom transformers import *", names)
    try:
        for block in snippets(page, "python"):
            for long, short in SHORTER.items():
                block = block.replace(long, short)
            for line in statements(block):
                if line.startswith(("patch_model(", "with patched(")) and "on_existing" not in line:
                    unpatched(names["model"])
                exec(line, names)
    finally:
        forget(schemes, families)


def statements(block: str) -> list[str]:
    """Return the statements of a snippet, each as its source."""
    lines = block.splitlines(keepends=True)
    starts = [
        min([each.lineno, *(d.lineno for d in getattr(each, "decorator_list", []))]) for each in ast.parse(block).body
    ]
    ends = [*starts[1:], len(lines) + 1]
    return ["".join(lines[start - 1 : end - 1]) for start, end in zip(starts, ends, strict=True)]


def unpatched(model: Any) -> None:
    if find_patch(model) is not None:
        unpatch_model(model)


def forget(schemes: dict[str, Any], families: dict[str, Any]) -> None:
    """Remove what snippets have registered."""
    for registry, known in ((SCHEMES, schemes), (ADAPTERS, families)):
        for name in [name for name in registry if name not in known]:
            registry.remove(name)


def test_every_scheme_has_a_page_whose_call_and_options_are_right() -> None:
    pages = pytest.importorskip("scheme_pages")
    entries = {entry["name"]: entry for entry in pages.catalogue()["schemes"]}
    for name, text in pages.texts().items():
        shown = pages.page(name, text, entries[name], None)
        assert f'patch_model(model, "{name}"' in shown and pages.formulas(text["tex"]) in shown
        SCHEMES[name].check_options({**text.get("example", {}), **({"factor": 4} if name == "longrope" else {})})
        for option in SCHEMES[name].declared_options():
            row = next(line for line in shown.splitlines() if line.startswith(f"| `{option.name}` |"))
            meaning = row.rsplit("|", 2)[1].strip()
            assert len(meaning) > 8, f"{name}.{option.name} has no docstring"


def test_links_between_pages_lead_somewhere() -> None:
    generated = {
        "schemes/index.md",
        "reference/command-line.md",
        "changelog.md",
        *(f"schemes/{name}.md" for name in SCHEMES),
    }
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            to = (path.parent / target).resolve()
            inside = str(to.relative_to(ROOT / "docs")) if to.is_relative_to(ROOT / "docs") else ""
            assert to.exists() or inside in generated, f"{path.name}: {target}"


def test_the_readme_fits_on_a_screen() -> None:
    assert len(read("README.md").encode()) <= 8 * 1024


@pytest.mark.thorough
def test_the_site_is_built_and_searched_without_a_network(tmp_path: Path) -> None:
    """In a browser that is offline; no page may ask for anything outside its folder."""
    pytest.importorskip("mkdocs")
    if FOUND is None:
        pytest.skip("There is no Chromium here.")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    browser = Chromium(tmp_path / "profile")
    try:
        browser.look(1400)
        browser.open((site / "schemes" / "yarn.html").as_uri())
        browser.wait("document.querySelector('math') !== null && document.querySelector('.md-search__input') !== null")
        browser.run(
            "(() => { const field = document.querySelector('.md-search__input'); field.focus(); field.value = 'ramp';"
            "field.dispatchEvent(new Event('keyup', {bubbles: true})); })()"
        )
        browser.wait("(document.querySelector('.md-search-result__list')?.innerText ?? '').includes('YaRN')")
        assert [url for url in browser.requests() if not url.startswith(("file:", "data:", "about:"))] == []
        assert browser.complaints() == []
    finally:
        browser.close()
