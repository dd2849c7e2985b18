"""What there is to choose from: schemes, families and tasks, each with a clause and its paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from ..errors import unknown

Entries = list[dict[str, Any]]


def catalogue() -> dict[str, Entries]:
    """All entries by kind, as JSON-able dicts."""
    from ..adapters import ADAPTERS
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
                "works untrained": scheme.training_free,
                "paper": scheme.paper,
            }
            for name, scheme in SCHEMES.items()
        ],
        "families": [
            {
                "name": name,
                "native": adapter.native,
                "mla": "has it" if adapter.folds_scale else "converts" if adapter.projections else "",
                "summary": adapter.summary,
            }
            for name, adapter in ADAPTERS.items()
        ],
        "tasks": [{"name": name, "summary": task.summary, "paper": task.paper} for name, task in TASKS.items()],
    }


def part(found: Mapping[str, Entries], kind: str) -> Entries:
    """One kind of entries; an unknown kind raises with the nearest."""
    if kind not in found:
        raise unknown("list", kind, found)
    return found[kind]


def tables(found: Mapping[str, Entries]) -> Iterator[Table]:
    """One table for each kind."""
    for kind, entries in found.items():
        table = Table(title=kind.capitalize(), title_justify="left")
        for column in entries[0] if entries else ():
            table.add_column(column, overflow="fold")
        for entry in entries:
            table.add_row(*map(_cell, entry.values()))
        yield table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return ", ".join(value) if isinstance(value, list) else str(value)
