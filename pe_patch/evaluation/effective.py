"""How long a context a model really uses, by the rule of RULER (Hsieh et al. 2024, arXiv 2404.06654)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionError, PePatchError
from .results import Results, Row
from .tasks.ruler import RULER, RULER_ITSELF, THIRTEEN

THRESHOLD = 0.856
"""What Llama-2-7B-chat reaches at 4096 tokens."""

Scores = dict[int, dict[str, float]]


def effective_length(results: Results, threshold: float = THRESHOLD) -> dict[str, dict[str, Any]]:
    """For each scheme the longest length at which the average over its tasks is above `threshold` (0 to 1).

    Only rows of RULER's tasks count, and only lengths at which each of a scheme's tasks was measured. An entry has

    - `effective`: that length, or None where no average is above the threshold; `at_least` is true where it is the
      longest length measured, so that the real one may be greater;
    - `averages`: the average over the tasks by length, and over the lengths `average`, `rising` and `falling`: evenly,
      and with weights that rise or fall by equal steps from the shortest length to the longest;
    - `tasks`: the names averaged over, and `of_thirteen`, how many of them are among RULER's thirteen;
    - `benchmark`: "RULER" only where all thirteen were measured as RULER has them, else "after RULER", and `because`
      says what differs;
    - `left_out`: lengths without some of the tasks, with the names of those.

    Raises:
        PePatchError: no row is of one of RULER's tasks, or a scheme has no length with all of its tasks.
        OptionError: `threshold` is not between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise OptionError(f"threshold is a score between 0 and 1, such as {THRESHOLD}; got {threshold}.")
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in results.rows:
        if row.task in RULER:
            rows[row.scheme].append(row)
    if not rows:
        raise PePatchError(f"No result is of one of RULER's tasks: {', '.join(RULER)}. Evaluate with them first.")
    return {scheme: _entry(scheme, found, threshold) for scheme, found in rows.items()}


def _entry(scheme: str, rows: Sequence[Row], threshold: float) -> dict[str, Any]:
    scores = _scores(rows)
    tasks = [name for name in RULER if any(name in found for found in scores.values())]
    missing = {length: [name for name in tasks if name not in found] for length, found in scores.items()}
    averages = {
        length: sum(found.values()) / len(found) for length, found in sorted(scores.items()) if not missing[length]
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
        **_over_lengths(list(averages.values())),
        "tasks": tasks,
        "of_thirteen": sum(name in THIRTEEN for name in tasks),
        "benchmark": f"after {RULER_ITSELF}" if because else RULER_ITSELF,
        "because": because,
        "left_out": {length: names for length, names in missing.items() if names},
    }


def _scores(rows: Sequence[Row]) -> Scores:
    """By length and task; rows of the same task and length (depths, seeds) are averaged by their samples."""
    found: Mapping[int, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row.length][row.task].append(row)
    return {
        length: {
            task: sum(row.score * row.samples for row in same) / sum(row.samples for row in same)
            for task, same in by_task.items()
        }
        for length, by_task in found.items()
    }


def _over_lengths(averages: list[float]) -> dict[str, float]:
    weights = range(1, len(averages) + 1)
    return {
        "average": sum(averages) / len(averages),
        "rising": sum(weight * each for weight, each in zip(weights, averages, strict=True)) / sum(weights),
        "falling": sum(weight * each for weight, each in zip(reversed(weights), averages, strict=True)) / sum(weights),
    }


def _differences(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """Why this is not RULER; nothing where it is."""
    missing = [name for name in THIRTEEN if name not in tasks]
    found = [f"not measured: {', '.join(missing)}"] if missing else []
    substituted: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        stamps = row.details.get("stamps", {})
        if stamps.get("benchmark") != RULER_ITSELF:
            for each in stamps.get("substitutes") or ["no stamp that says so"]:
                if row.task not in substituted[each]:
                    substituted[each].append(row.task)
    return found + [f"{what}: {', '.join(names)}" for what, names in substituted.items()]
