"""Share folders, models and texts between the scripts of this folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from measure import RESULTS as ALL_RESULTS
from measure import machine

__all__ = ["MODELS", "RESULTS", "TEXT", "TITLES", "machine", "read", "write"]

RESULTS = ALL_RESULTS / "real"
MODELS = Path("build/real/models")
TEXT = Path("build/real/text")
TITLES = {
    "smollm2": "SmolLM2 135M Instruct, 4-bit weights (Q4_1), dequantised",
    "gemma3": "Gemma 3 270M base, 4-bit weights (Q4_K_M), dequantised",
}


def read(name: str) -> dict[str, Any]:
    """Return the stored results of a script; empty if there are none."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(name: str, content: dict[str, Any]) -> None:
    """Store the results of a script."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, default=str, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
