"""A file of finished work, so that a stopped evaluation resumes where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import PePatchError

Entry = dict[str, Any]


def key_of(**values: Any) -> str:
    """Hash values to sixteen hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=repr).encode()).hexdigest()[:16]


class Journal:
    """Entries by key, in memory and optionally in the file `journal.jsonl` of a folder.

    Each entry is one line, which is synced to the disk before `put` returns. Opening a journal drops an incomplete last
    line, which a crash leaves behind.

    Args:
        folder: Folder of the file. It is created if needed. None keeps the entries in memory only.

    Raises:
        PePatchError: Another line is damaged.
    """

    NAME = "journal.jsonl"

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.path = None if folder is None else Path(folder) / self.NAME
        self._entries: dict[str, Entry] = {}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read(self.path)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        """Return the entry of a key, or None."""
        return self._entries.get(key)

    def value(self, key: str, name: str) -> Any:
        """Return one value of an entry.

        Raises:
            PePatchError: The entry is damaged and lacks it.
        """
        try:
            return self._entries[key][name]
        except KeyError as error:
            raise self.damaged(key, error) from error

    def damaged(self, key: str, error: Exception) -> PePatchError:
        """Return the error for an entry that does not hold what it must."""
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        return PePatchError(
            f"{self.path}: the line with the key {key!r} is damaged ({detail}). Delete it to measure it again, or "
            "the file to start over."
        )

    def put(self, key: str, entry: Entry) -> None:
        """Store a JSON-able entry."""
        self._entries[key] = entry
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **entry}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(complete.split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
                    raise ValueError("it is not an object with a key")
                self._entries[entry.pop("key")] = entry
            except (ValueError, RecursionError) as error:
                raise PePatchError(
                    f"{path}, line {number} is damaged ({error}). Delete the line to measure it again, or the file to "
                    "start over."
                ) from error
        if len(complete) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(complete))
