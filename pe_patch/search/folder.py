"""What a search keeps on disk: its settings, and every score."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..evaluation.journal import Journal
from ..evaluation.results import write_atomically

SETTINGS = "settings.json"


class SearchJournal(Journal):
    """One line for each scored candidate."""

    NAME = "search.jsonl"


def settle(folder: Path, settings: Mapping[str, Any], batch_size: int, *, asked: bool) -> int:
    """Write the settings of a new search, or compare them with those that the folder holds; other ones raise.

    Returns the batch size to use: unless one was `asked` for, that of the earlier run, since another one may round
    sums differently.
    """
    path = folder / SETTINGS
    if not path.exists():
        if (folder / SearchJournal.NAME).exists():
            raise OptionError(f"{folder} holds a {SearchJournal.NAME} without {SETTINGS}; give another output folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({**settings, "batch_size": batch_size}, indent=2) + "\n")
        return batch_size
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        now = {**settings, "batch_size": batch_size if asked else before["batch_size"]}
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{path} is damaged ({error!r}); give another output folder.") from error
    if different := [name for name in now if before.get(name) != now[name]]:
        told = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in different)
        raise OptionError(
            f"{folder} holds a search with other settings: {told}. Give another output folder, or the settings of then."
        )
    return now["batch_size"]
