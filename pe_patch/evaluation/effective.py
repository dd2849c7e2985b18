"""The effective context length of a model by the rule of RULER (Hsieh et al. 2024, arXiv 2404.06654)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionError, PePatchError
from .results import Results, Row
from .tasks.ruler import RULER, RULER_ITSELF, THIRTEEN

THRESHOLD = 0.856
"""Score of Llama-2-7B-chat at 4096 tokens."""

Scores = dict[int, dict[str, float]]
"""Score by length and task."""


def effective_length(results: Results, threshold: float = THRESHOLD) -> dict[str, dict[str, Any]]:
    """Find the longest length at which the mean score over RULER's tasks is above a threshold.

    Only rows of RULER's tasks count, and only lengths at which all tasks of the scheme were measured.

    Args:
        results: Results with rows of RULER's tasks.
        threshold: Mean score, between 0 and 1.

    Returns:
        For each scheme a dict with

        - `effective`: the length, or None if no mean is above the threshold;
        - `at_least`: True if this is the longest measured length, so that the real one may be greater;
        - `averages`: the mean over the tasks by length;
        - `average`, `rising` and `falling`: the mean of `averages` over the lengths, with equal weights, and with
          weights that rise or fall linearly from the shortest length to the longest;
        - `tasks`: the names of the tasks, and `of_thirteen`, how many of them are among RULER's thirteen;
        - `benchmark`: "RULER" if all thirteen tasks were measured exactly as in RULER, else "after RULER";
        - `because`: the differences from RULER;
        - `left_out`: the tasks that are missing at a length, by length.

    Raises:
        PePatchError: No row is of one of RULER's tasks, or a scheme has no length with all of its tasks.
        OptionError: `threshold` is not between 0 and 1.

    Source: Hsieh et al. 2024, arXiv 2404.06654.
    """
    if not 0 < threshold < 1:
        raise OptionError(f"threshold must be a score between 0 and 1, got {threshold}. RULER uses {THRESHOLD}.")
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in results.rows:
        if row.task in RULER:
            rows[row.scheme].append(row)
    if not rows:
        raise PePatchError(f"No result is of one of RULER's tasks: {', '.join(RULER)}. Evaluate some of them first.")
    return {scheme: _entry(scheme, scheme_rows, threshold) for scheme, scheme_rows in rows.items()}


def _entry(scheme: str, rows: Sequence[Row], threshold: float) -> dict[str, Any]:
    scores = _scores(rows)
    tasks = [name for name in RULER if any(name in by_task for by_task in scores.values())]
    missing = {length: [name for name in tasks if name not in by_task] for length, by_task in scores.items()}
    averages = {
        length: sum(by_task.values()) / len(by_task)
        for length, by_task in sorted(scores.items())
        if not missing[length]
    }
    if not averages:
        raise PePatchError(f"{scheme!r} has no length at which all of its tasks ({', '.join(tasks)}) were measured.")
    above = [length for length, average in averages.items() if average > threshold]
    because = _differences([row for row in rows if row.length in averages], tasks)
    because += [] if threshold == THRESHOLD else [f"threshold {threshold} instead of {THRESHOLD}"]
    return {
        "effective": max(above, default=None),
        "at_least": bool(above) and max(above) == max(scores),
        "threshold": threshold,
        "averages": averages,
        **_length_averages(list(averages.values())),
        "tasks": tasks,
        "of_thirteen": sum(name in THIRTEEN for name in tasks),
        "benchmark": f"after {RULER_ITSELF}" if because else RULER_ITSELF,
        "because": because,
        "left_out": {length: names for length, names in missing.items() if names},
    }


def _scores(rows: Sequence[Row]) -> Scores:
    """Average the rows of each length and task (depths, seeds), weighted by their samples."""
    grouped: Mapping[int, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        grouped[row.length][row.task].append(row)
    return {
        length: {
            task: sum(row.score * row.samples for row in same) / sum(row.samples for row in same)
            for task, same in by_task.items()
        }
        for length, by_task in grouped.items()
    }


def _length_averages(averages: list[float]) -> dict[str, float]:
    """Average over lengths with equal, rising and falling weights."""
    weights = range(1, len(averages) + 1)
    return {
        "average": sum(averages) / len(averages),
        "rising": sum(weight * score for weight, score in zip(weights, averages, strict=True)) / sum(weights),
        "falling": sum(weight * score for weight, score in zip(reversed(weights), averages, strict=True))
        / sum(weights),
    }


def _differences(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """List the differences from RULER; empty if there are none."""
    missing = [name for name in THIRTEEN if name not in tasks]
    differences = [f"not measured: {', '.join(missing)}"] if missing else []
    substituted: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        stamps = row.details.get("stamps", {})
        if stamps.get("benchmark") != RULER_ITSELF:
            for substitute in stamps.get("substitutes") or ["no stamp that says so"]:
                if row.task not in substituted[substitute]:
                    substituted[substitute].append(row.task)
    return differences + [f"{substitute}: {', '.join(names)}" for substitute, names in substituted.items()]
