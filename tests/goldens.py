"""Read the numbers that the authors' own code gave; `data/README.md` says where each comes from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _all() -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / "data" / "goldens.json").read_text())["goldens"]


def load(prefix: str) -> dict[str, dict[str, Any]]:
    """Return every entry whose key begins with `prefix`."""
    entries = {key: entry for key, entry in _all().items() if key.startswith(prefix)}
    assert entries, f"no golden entry begins with {prefix!r}"
    return entries
