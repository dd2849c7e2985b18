"""Assemble long English and Python from Debian packages.

    python benchmarks/real/get_text.py                      # 60 MB to download, into build/real/text

Writes `english/` and `code/`, one file for each document. pe_patch splits a folder into training and test documents by
a hash of their names, so no document is in both. Needs Debian or Ubuntu (`apt-get download`, `dpkg-deb`) and lxml. The
licences of the packages allow measuring on them; none of their text may be committed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import TEXT
from lxml import html

ENDINGS = {"english": ".txt", "code": ".py"}
LEAST_CHARACTERS = 2_000
"""Shorter documents are left out."""


@dataclass(frozen=True)
class Package:
    """A Debian package and its documents.

    Attributes:
        name: name of the package.
        kind: folder that the documents go to.
        folder: folder of the unpacked package.
        pattern: documents in it.
        skipped: files to leave out, such as indexes and lists of links.
    """

    name: str
    kind: str
    folder: str
    pattern: str
    skipped: frozenset[str] = frozenset()


PACKAGES = (
    Package(
        "anarchism", "english", "usr/share/doc/anarchism/html", "*.html",
        frozenset({"alinks.html", "biblio.html", "index.html", "links.html"}),
    ),
    Package(
        "debian-handbook", "english", "usr/share/doc/debian-handbook/html/en-US", "*.html",
        frozenset({"ix01.html", "index.html"}),
    ),
    Package("jargon-text", "english", "usr/share/doc/jargon-text", "jargon.txt.gz"),
    Package("python3-sympy", "code", "usr/lib/python3/dist-packages/sympy", "**/*.py"),
    Package("python3-django", "code", "usr/lib/python3/dist-packages/django", "**/*.py"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TEXT)
    output = parser.parse_args().output
    if (output / "sources.json").exists():
        raise SystemExit(f"{output} is complete. Delete it to assemble it again.")
    sources = []
    for package in PACKAGES:
        folder = output / package.kind
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as content:
            version = unpack(package, Path(content))
            documents = characters = 0
            for name, text in read_all(package, Path(content)):
                (folder / f"{package.name}-{name}").write_text(text, encoding="utf-8")
                documents, characters = documents + 1, characters + len(text)
        if not documents:
            raise SystemExit(f"{package.name} {version} has no document {package.folder}/{package.pattern}.")
        sources.append(
            {"package": package.name, "version": version, "kind": package.kind, "documents": documents,
             "characters": characters}
        )  # fmt: skip
        print(f"{package.kind}: {package.name} {version}, {documents} documents, {characters:,} characters", flush=True)
    (output / "sources.json").write_text(json.dumps(sources, indent=2) + "\n")


def unpack(package: Package, content: Path) -> str:
    """Download a package, unpack it into a folder, and return its version."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", package.name], cwd=folder, check=True)
        (archive,) = map(str, Path(folder).glob("*.deb"))
        subprocess.run(["dpkg-deb", "--extract", archive, str(content)], check=True)
        return subprocess.check_output(["dpkg-deb", "--field", archive, "Version"], text=True).strip()


def read_all(package: Package, content: Path) -> Iterator[tuple[str, str]]:
    """Yield a file name and the text of each document that is long enough."""
    folder = content / package.folder
    for path in sorted(folder.glob(package.pattern)):
        if path.name in package.skipped:
            continue
        text = read(path)
        if len(text) >= LEAST_CHARACTERS:
            yield "-".join(path.relative_to(folder).with_suffix("").parts) + ENDINGS[package.kind], text


def read(path: Path) -> str:
    """Return the text of a document, without markup and without empty lines in a row."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", errors="replace")
    if path.suffix == ".html":
        text = html.document_fromstring(raw).text_content()
        lines = (line.strip() for line in text.splitlines())
        text = "\n".join(line for line in lines if line)
    return text


if __name__ == "__main__":
    main()
