"""List schemes, model families and tasks, each with a summary and its paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from ..errors import unknown

Entries = list[dict[str, Any]]


def catalogue() -> dict[str, Entries]:
    """Return all entries by kind, as dicts for JSON."""
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
                "mla": "has it" if adapter.scaling_includes_mscale else "converts" if adapter.projections else "",
                "summary": adapter.summary,
            }
            for name, adapter in ADAPTERS.items()
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
            table.add_row(*map(_cell, entry.values()))
        yield table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return ", ".join(value) if isinstance(value, list) else str(value)
