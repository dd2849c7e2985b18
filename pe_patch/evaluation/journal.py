"""What an evaluation has finished, on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import PePatchError

Entry = dict[str, Any]


def key_of(**parts: Any) -> str:
    """Sixteen hexadecimal digits that change with any of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:16]


class Journal:
    """Entries by key, in memory and, where a folder is given, in its file `journal.jsonl`.

    An entry is one line, written through to the disk before the next piece of work starts. What a crash left of a last
    line is dropped; any other damage raises `PePatchError`.
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
        """The entry of a finished piece of work, or None."""
        return self._entries.get(key)

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry (JSON-able)."""
        self._entries[key] = entry
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **entry}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._entries[entry.pop("key")] = entry
            except (ValueError, KeyError, AttributeError) as error:
                raise PePatchError(
                    f"{path}, line {number} is damaged ({error}). Remove that line to measure its part again, or the "
                    "file to start over."
                ) from error
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
