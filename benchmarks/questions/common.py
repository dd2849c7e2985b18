"""Share results, seeds and intervals between the three experiments of this folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from measure import RESULTS as ALL_RESULTS
from measure import machine

from pe_patch.evaluation.metrics import student_quantile

__all__ = ["RESULTS", "SEEDS", "interval", "machine", "read", "shown", "write"]

RESULTS = ALL_RESULTS / "questions"
SEEDS = (0, 1, 2)


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Return the stored results of an experiment; empty if there are none."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(name: str, content: dict[str, Any], folder: Path = RESULTS) -> None:
    """Store the results of an experiment."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds, and half the width of its 95 % interval (Student's t)."""
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return float(numbers.mean()), float("nan")
    spread = numbers.std(ddof=1) / np.sqrt(len(numbers))
    return float(numbers.mean()), float(student_quantile(len(numbers) - 1) * spread)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean with its interval, or a dash without values."""
    if not len(values):
        return "-"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" if np.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"
