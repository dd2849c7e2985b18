"""Write the page of each scheme: how it works, formula, picture, options, exports and measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pe_patch import SCHEMES
from pe_patch.advice.candidates import CANDIDATES
from pe_patch.cli.catalogue import catalogue, field_docstrings
from pe_patch.core.scheme import Scheme

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "benchmarks" / "results" / "real"
MECHANISMS = {
    "rotary": "Rotary", "remapped": "Remapped distances", "none": "None", "distance bias": "Bias by distance",
    "content-relative": "Relative to the content", "latent attention": "Latent attention", "absolute": "Absolute",
    "two-dimensional": "Two-dimensional",
}  # fmt: skip
"""Headings of the groups of schemes, in the order of the pages."""
UNTRAINED = {
    "yes": "It works. Texts within the trained window do not change.",
    "weak": "It works, and raises the loss on every text a little.",
    "no": "The model must be trained with it.",
}
"""The default sentence about a scheme without training. The key `untrained` of its text replaces it."""


SYMBOLS_LINK = "[Symbols](index.md#symbols)"
SYMBOLS = """## Symbols

| symbol | meaning |
| --- | --- |
| $i$, $j$ | positions of a query and of a key |
| $L$, $N$ | the trained window, and the length of the text, in tokens |
| $s$ | the factor, $N / L$ unless a page says otherwise |
| $\\theta$, $w_k$ | the base of the frequencies, and the frequency of pair $k$ in radians per token |
| $r$, $d$, $D$ | the rotary dimensions of a head, the width of a head, the width of the model |
| $\\rho_k$ | turns of pair $k$ inside the trained window, $L w_k / 2\\pi$ |
| $\\gamma_k$ | the share of a frequency that is kept |
| $m$ | a factor on cos and sin |
| $\\delta(i,j)$ | the distance by which a query sees a key |
| $H$, $h$, $m_h$ | the number of heads, a head from 1 to $H$, and its slope |
"""


def texts() -> dict[str, dict[str, Any]]:
    """Return the written texts by scheme, in the order of their groups."""
    written = yaml.safe_load((HERE / "schemes.yaml").read_text(encoding="utf-8"))
    if missing := set(SCHEMES) ^ set(written):
        raise ValueError(f"docs/hooks/schemes.yaml and the registry differ: {', '.join(sorted(missing))}.")
    order = {mechanism: place for place, mechanism in enumerate(MECHANISMS)}
    return dict(sorted(written.items(), key=lambda each: order[SCHEMES[each[0]].mechanism]))


def page(name: str, text: Mapping[str, Any], entry: Mapping[str, Any], picture: str | None) -> str:
    """Return the page of a scheme as Markdown.

    Args:
        name: The scheme.
        text: Its written text.
        entry: Its entry in the catalogue.
        picture: The caption of its picture; None without one.
    """
    scheme = SCHEMES[name]
    parts = [
        f"# {text['title']}",
        text["how"],
        formulas(text["tex"]),
        SYMBOLS_LINK,
        snippet(name, text.get("example", {})),
    ]
    if picture is not None:
        images = "\n".join(
            f"![{text['title']}: {picture}](../images/schemes/{name}-{colour}.svg#only-{colour})"
            for colour in ("light", "dark")
        )
        parts += [images, f"*{picture}*"]
    parts += [
        f"**When to use it.** {text['use']}",
        f"**When not.** {text['avoid']}",
        f"**Without training.** {text.get('untrained') or UNTRAINED[entry['works untrained']]}",
        f"**Paper.** {linked(scheme.paper)}",
    ]
    if measured := "\n".join(measurements(name)):
        parts += ["## Results", measured]
    if options := "\n".join(option_rows(scheme)):
        parts += ["## Options", "| option | type and default | meaning |\n| --- | --- | --- |\n" + options]
    parts.append(f"Class: [`{scheme.__name__}`](../reference/schemes.md#{scheme.__module__}.{scheme.__name__}).")
    return "\n\n".join(parts) + "\n"


def formulas(tex: str) -> str:
    """Return formulas as Markdown; an empty line separates two."""
    return "\n\n".join(f"$$\n{each.strip()}\n$$" for each in tex.split("\n\n"))


def snippet(name: str, example: Mapping[str, Any]) -> str:
    """Return the call that patches a model."""
    words = {"searched": "factors", "texts": "texts"}
    options = "".join(f", {key}={words.get(str(value), repr(value))}" for key, value in example.items())
    if "factors" in options:
        options += ", factor=4"
    return f'```python\npatch_model(model, "{name}"{options})\n```'


def linked(paper: str) -> str:
    """Return a reference whose arXiv numbers are links."""
    words = []
    for word in paper.split(" "):
        bare = word.rstrip(",;.")
        if bare.replace(".", "").isdigit() and "." in bare:
            word = f"[{bare}](https://arxiv.org/abs/{bare}){word[len(bare) :]}"
        elif bare.startswith("http"):
            word = f"<{bare}>{word[len(bare) :]}"
        words.append(word)
    return " ".join(words) + "."


def option_rows(scheme: type[Scheme]) -> Iterator[str]:
    """Yield one row for each option: name, type and default, and the docstring below it in the class."""
    meanings = field_docstrings(scheme)
    options = sorted(scheme.declared_options(), key=lambda option: not option.required)
    for option in options:
        default = "required" if option.required else f"`{option.default!r}`"
        kind = option.annotation.replace(" | ", " or ")
        meaning = " ".join(meanings.get(option.name, "").split()).replace("|", "\\|")
        yield f"| `{option.name}` | `{kind}`, {default} | {meaning} |"


def measurements(name: str) -> Iterator[str]:
    """Yield the lines on a scheme from the measurements on SmolLM2 and from the published figures."""
    stored = RESULTS / "extension_smollm2.json"
    cases = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {"cases": {}}
    rows = []
    for label, case in cases["cases"].items():
        if name not in (label, label.split(",")[0], label.split(" ")[0]):
            continue
        for key, found in sorted(case["measured"].items(), key=lambda each: int(each[0].split()[1])):
            kind, length = key.split()
            if kind in ("needle", "passkey"):
                what = "one of eight facts" if kind == "needle" else "the only fact"
                shown = f"{found['score']:.2f} ({found['low']:.2f} to {found['high']:.2f}, {found['questions']})"
            else:
                what, shown = f"loss on {kind.capitalize()}, nats per token", f"{found['loss']:.3f}"
            rows.append(f"| {label} | {int(length):,} | {what} | {shown} |")
    if rows:
        yield f"{cases['model']}; its window is {cases['window']:,} tokens. Answers: share, 95 % interval, number.\n"
        yield "| case | tokens | what | result |"
        yield "| --- | ---: | --- | --- |"
        yield from rows
    for each in CANDIDATES["rope"]:
        if each.scheme == name:
            yield f"\nWhat the papers report, and what was measured here: {each.why.rstrip('.')}."


def index() -> str:
    """Return the page that lists all schemes by mechanism."""
    entries = {entry["name"]: entry for entry in catalogue()["schemes"]}
    how = "`pe-patch list schemes` prints them, `pe-patch list schemes NAME` the options of one."
    lines = ["# Schemes", "", f"All {len(entries)} schemes by mechanism. {how}", ""]
    group = ""
    for name, text in texts().items():
        if (mechanism := SCHEMES[name].mechanism) != group:
            group = mechanism
            lines += [
                "",
                f"## {MECHANISMS[group]}",
                "",
                "| scheme | in one line | without training |",
                "| --- | --- | --- |",
            ]
        entry = entries[name]
        also = "".join(f", `{alias}`" for alias in entry["aliases"])
        lines.append(
            f"| [{text['title']}]({name}.md) `{name}`{also} | {entry['summary']} | {entry['works untrained']} |"
        )
    return "\n".join(lines) + "\n\n" + SYMBOLS


def families() -> str:
    """Return the table of the supported families."""
    lines = ["| `model_type` | what it is | native positions | latent attention |", "| --- | --- | --- | --- |"]
    for entry in (each for each in catalogue()["families"] if each["adapter"] == "row"):
        lines.append(f"| `{entry['name']}` | {entry['summary']} | {entry['native']} | {entry['mla']} |")
    return "\n".join(lines)


MODEL_TYPES = Path(__file__).parents[2] / "benchmarks" / "results" / "model_types.json"
NATIVE = {"rope": "rotation", "learned": "table", "alibi": "ALiBi", "nope": "none"}


def model_types() -> str:
    """Return the table of all causal model types of Transformers, and how many are supported."""
    from pe_patch.adapters import ADAPTERS
    from pe_patch.adapters.inferred import VERIFIED

    content = json.loads(MODEL_TYPES.read_text(encoding="utf-8"))
    found = content["types"]
    supported = [name for name, each in found.items() if each["supported"]]
    rows = sum(found[name]["status"] == "row" for name in supported)
    lines = [
        f"Transformers {content['transformers']} registers {len(found)} types for `AutoModelForCausalLM`. "
        f"{len(supported)} are supported: {rows} by a row, {len(supported) - rows} by inference.",
        "",
        "| `model_type` | what it is | how | native positions | layers that attend | takes | to latents |",
        "| --- | --- | --- | --- | ---: | --- | --- |",
    ]
    for name in supported:
        each = found[name]
        known = ADAPTERS[each["family"]].summary if each["family"] in ADAPTERS else VERIFIED.get(each["family"], "")
        within = "" if each["family"] == name else f", as `{each['family']}`"
        attending = "all" if each["attending"] == each["layers"] else "some"
        lines.append(
            f"| `{name}` | {known} | {each['status']}{within} | {NATIVE[each['native']]} | {attending} | "
            f"{', '.join(each['mechanisms'])} | {'yes' if each['latent'] else ''} |"
        )
    lines += ["", "## Types that are not supported", "", "| `model_type` | why |", "| --- | --- |"]
    lines += [f"| `{name}` | {_why(each)} |" for name, each in found.items() if not each["supported"]]
    return "\n".join(lines)


def _why(found: dict[str, Any]) -> str:
    """Return why a type is not supported, in one line of a table."""
    wrong = [f"{name}: {each}" for name, each in found["checks"].items() if not each.startswith(("holds", "does not"))]
    reason = found["reason"] or "; ".join(wrong)
    reason = reason.split("none can be inferred: ")[-1].split(" If its forward")[0].split(" The best guess")[0]
    if found["status"] == "not built":
        reason = f"cannot be built tiny: {reason}"
    return reason.rstrip(".").replace("|", "\\|")[:220]
