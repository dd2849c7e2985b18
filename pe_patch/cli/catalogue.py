"""List schemes, model families and tasks, each with a summary and its paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ..errors import unknown

Entries = list[dict[str, Any]]


ANNOTATIONS = {"Factor": 'float | "auto"'}
"""Types of options in words, where their annotation is an alias."""


def untrained(name: str) -> str:
    """Return how well a scheme works without training: yes, weak or no, as `advise` judges it."""
    from ..advice.candidates import CANDIDATES
    from ..schemes.registry import SCHEMES

    answers = [each.untrained for each in CANDIDATES["rope"] if each.scheme == name]
    if answers:
        return answers[0]
    native = name in ("rope", "mla")  # what models of their families have
    return "as it is" if native else "yes" if SCHEMES[name].training_free else "no"


def options_of(scheme: Any) -> list[dict[str, Any]]:
    """Return the options of a scheme with their types and defaults, required ones first."""
    options = [
        {
            "name": option.name,
            "type": ANNOTATIONS.get(option.annotation, option.annotation),
            "required": option.required,
            "default": None if option.required else _plain(option.default),
        }
        for option in scheme.declared_options()
    ]
    return sorted(options, key=lambda option: not option["required"])


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def catalogue() -> dict[str, Entries]:
    """Return all entries by kind, as dicts for JSON."""
    from ..adapters import ADAPTERS
    from ..adapters.inferred import VERIFIED
    from ..evaluation.tasks import TASKS
    from ..schemes.registry import ALIASES, SCHEMES

    aliases: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        aliases.setdefault(name, []).append(alias)
    return {
        "schemes": [
            {
                "name": name,
                "aliases": aliases.get(name, []),
                "mechanism": scheme.mechanism,
                "summary": scheme.summary,
                "options": options_of(scheme),
                "works untrained": untrained(name),
                "paper": scheme.paper,
            }
            for name, scheme in SCHEMES.items()
        ],
        "families": [
            {
                "name": name,
                "native": adapter.native,
                "mla": "has it" if adapter.scaling_includes_mscale else "converts" if adapter.projections else "",
                "adapter": "row",
                "summary": adapter.summary,
            }
            for name, adapter in ADAPTERS.items()
        ]
        + [
            {"name": name, "native": "", "mla": "", "adapter": "inferred", "summary": summary}
            for name, summary in VERIFIED.items()
            if name not in ADAPTERS
        ],
        "tasks": [{"name": name, "summary": task.summary, "paper": task.paper} for name, task in TASKS.items()],
    }


def entries_of(entries: Mapping[str, Entries], kind: str) -> Entries:
    """Return the entries of one kind.

    Raises:
        UnknownNameError: the kind does not exist; the message names the nearest one.
    """
    if kind not in entries:
        raise unknown("list", kind, entries)
    return entries[kind]


def tables(entries_by_kind: Mapping[str, Entries]) -> Iterator[Table]:
    """Yield one terminal table for each kind."""
    for kind, entries in entries_by_kind.items():
        table = Table(title=kind.capitalize(), title_justify="left")
        for column in entries[0] if entries else ():
            table.add_column(column, overflow="fold")
        for entry in entries:
            table.add_row(*(Text(_cell(value)) for value in entry.values()))  # as text: `[str]` is no markup
        yield table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, list):
        return ", ".join(_option(each) if isinstance(each, dict) else str(each) for each in value)
    return str(value)


def _option(option: Mapping[str, Any]) -> str:
    """Return an option as in a signature: `factor: float` or `beta_fast: float = 32`."""
    default = "" if option["required"] else f" = {option['default']!r}"
    return f"{option['name']}: {option['type']}{default}"
