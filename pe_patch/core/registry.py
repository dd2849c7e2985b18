"""Registries that users and installed packages can add to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """Entries by name: those of the library, those that were registered, and those of installed packages.

    A package adds entries by an entry point of the group. The entry point is loaded when a name is first looked up or
    the entries are first listed, not when this library is imported.
    """

    def __init__(self, group: str) -> None:
        """Make an empty registry.

        Args:
            group: the entry-point group, such as `pe_patch.schemes`.
        """
        self.group = group
        self._entries: dict[str, Entry] = {}
        self._builtin: frozenset[str] | None = None

    def add(self, name: str, entry: Entry) -> None:
        """Add an entry, or replace the one of this name."""
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Remove an entry that was added."""
        del self._entries[name]

    def is_builtin(self, name: str) -> bool:
        """Return whether an entry came with the library."""
        return name in (self._entries if self._builtin is None else self._builtin)

    def seal(self) -> None:
        """Mark what is in the registry now as the library's part."""
        self._builtin = frozenset(self._entries)

    def load_entry_points(self) -> None:
        """Load the entry points of the group, each once; warn about one that fails."""
        if self._builtin is None or self.group is None:
            return
        group, self.group = self.group, None
        for point in entry_points(group=group):
            try:
                point.load()
            except Exception as error:
                warnings.warn(
                    f"The entry point {point.name!r} ({point.value}) of the group {group!r} could not be loaded: "
                    f"{type(error).__name__}: {error}. Update or remove its package.",
                    stacklevel=2,
                )

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            self.load_entry_points()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self.load_entry_points()
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        self.load_entry_points()
        return len(self._entries)
