"""Generate pages and pictures of the documentation from the code, and turn formulas into MathML.

MkDocs calls the functions whose names begin with `on_`. Nothing needs a network: formulas become MathML, which browsers
draw themselves.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import command_line
import pictures
import scheme_pages

ROOT = Path(__file__).parent.parent.parent
FILE_WORKER = re.compile(r'<script src="https://unpkg\.com/iframe-worker/shim"></script>')
"""A script that the theme loads from the network. It makes the search work on pages opened from disk."""
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
REPOSITORY_LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./((?:benchmarks|recipes|tests|pe_patch|notebooks)/[^)#]*)\)")


def on_config(config: Any) -> Any:
    """Put the pages of the schemes into the navigation, by mechanism."""
    groups: dict[str, list[dict[str, str]]] = {}
    for name, text in scheme_pages.texts().items():
        group = scheme_pages.MECHANISMS[scheme_pages.SCHEMES[name].mechanism]
        groups.setdefault(group, []).append({text["title"]: f"schemes/{name}.md"})
    pages = ["schemes/index.md", *({group: entries} for group, entries in groups.items())]
    config.nav = [{"Schemes": pages} if "Schemes" in entry else entry for entry in config.nav]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and pictures."""
    for path, content in generated():
        files.append(File.generated(config, path, content=content))
    return files


def generated() -> Iterator[tuple[str, str | bytes]]:
    """Yield the path and the content of each generated file."""
    entries = {entry["name"]: entry for entry in scheme_pages.catalogue()["schemes"]}
    yield "schemes/index.md", scheme_pages.index()
    for name, text in scheme_pages.texts().items():
        picture = pictures.picture_of(name, text.get("example", {}))
        yield f"schemes/{name}.md", scheme_pages.page(name, text, entries[name], picture and picture[1])
        if picture is not None:
            for colour in ("light", "dark"):
                yield f"images/schemes/{name}-{colour}.svg", pictures.render(picture[0], dark=colour == "dark")
    for path in sorted(shown_pictures()):
        yield f"repository/{path}", (ROOT / path).read_bytes()
    yield "reference/command-line.md", command_line.page()
    yield "changelog.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")


def shown_pictures() -> set[str]:
    """Return the pictures outside this folder that pages show."""
    pages = (path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    return {path for page in pages for picture, _, path in REPOSITORY_LINK.findall(page) if picture}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Name files of the repository, which the site does not hold; show its pictures."""

    def named(match: re.Match[str]) -> str:
        picture, text, path = match.groups()
        if picture:
            return f"![{text}]({'../' * page.url.count('/')}repository/{path})"
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    markdown = markdown.replace("<!-- table of families -->", scheme_pages.families())
    if "<!-- table of model types -->" in markdown:
        markdown = markdown.replace("<!-- table of model types -->", scheme_pages.model_types())
    markdown = re.sub(r"<!-- results: (\S+) -->", lambda match: (RESULTS / match[1]).read_text("utf-8"), markdown)
    return REPOSITORY_LINK.sub(named, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Turn formulas into MathML."""
    return FORMULA.sub(_mathml, content)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Put our own script for the search on disk in place of one from the network."""
    script = (Path(__file__).parent / "file_worker.js").read_text(encoding="utf-8")
    return FILE_WORKER.sub(lambda match: f"<script>{script}</script>", output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """Do the same on the page for addresses that do not exist."""
    return on_post_page(output_content, None, config)


def _mathml(match: re.Match[str]) -> str:
    inline = match[1] == "span"
    latex = html.unescape(match[2]).strip().removeprefix("\\(" if inline else "\\[")
    latex = latex.removesuffix("\\)" if inline else "\\]").strip()
    return latex2mathml.converter.convert(latex, display="inline" if inline else "block")
