"""Numbers that the authors' own code gave (see each entry's `source`); copied here so that a clone has them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _all() -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / "data" / "goldens.json").read_text())["goldens"]


def load(prefix: str) -> dict[str, dict[str, Any]]:
    """Every entry whose key begins with `prefix`."""
    found = {key: entry for key, entry in _all().items() if key.startswith(prefix)}
    assert found, f"no golden entry begins with {prefix!r}"
    return found
