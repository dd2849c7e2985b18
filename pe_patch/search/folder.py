"""Store the settings and the scores of a search in its output folder."""

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
    """A journal with one line per scored candidate."""

    NAME = "search.jsonl"


def write_or_check_settings(
    folder: Path, settings: Mapping[str, Any], batch_size: int, *, batch_size_given: bool
) -> int:
    """Write the settings of a new search, or compare them with those in the folder.

    Args:
        folder: the output folder of the search.
        settings: the settings of this call, without the batch size.
        batch_size: sequences per forward pass.
        batch_size_given: True if the caller chose the batch size; False to take over that of an earlier run.

    Returns:
        The batch size to use. An earlier run's batch size is kept because another one may round sums differently.

    Raises:
        OptionError: if the folder holds a search with other settings, or damaged files.
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
        now = {**settings, "batch_size": batch_size if batch_size_given else before["batch_size"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OptionError(f"{path} is damaged ({error!r}); give another output folder.") from error
    if different := [name for name in now if before.get(name) != now[name]]:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in different)
        raise OptionError(
            f"{folder} holds a search with other settings: {changes}. Give another output folder, or the old settings."
        )
    return now["batch_size"]
