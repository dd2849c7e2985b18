"""lm-eval's results as rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..metrics import NORMAL_QUANTILE, binomial_interval
from ..results import Row
from .uncut import UncutLM

PLACEHOLDER = -1
"""What RULER's tasks of lm-eval give for a length that nothing was made at."""


def rows_of(
    given: Mapping[str, Any], *, version: str, subject: UncutLM, length: int | None, stamps: Mapping[str, Any]
) -> list[Row]:
    """A row for each score of each task and group; the scores are lm-eval's own.

    `given` is what `simple_evaluate` returns; `length` is what RULER's tasks were made at, None for other tasks.
    """
    found = []
    for name in given["results"]:
        members = _members(given, name)
        tokens = max(subject.longest.get(task, 0) for task in members)
        for metric, kind, score, error in _scores(given, name, length):
            low, high = _interval(given, name, metric if length is None else str(length), kind, score, error)
            found.append(
                Row(
                    task=f"lm-eval {version} {name}",
                    measure=f"{metric}, {kind}" if kind != "none" else metric,
                    length=length or subject.max_length,
                    tokens=tokens,
                    depth=None,
                    score=score,
                    low=low,
                    high=high,
                    samples=sum(given["n-samples"][task]["effective"] for task in members),
                    control=None,
                    control_length=None,
                    seed=given["config"]["numpy_seed"],
                    text_hash=_prompts(given, members),
                    measured_on=_words(given, version, name, members, subject.max_length),
                    details=_details(given, version, name, metric, error),
                    **stamps,
                )
            )
    return found


def _scores(given: Mapping[str, Any], name: str, length: int | None) -> Iterator[tuple[str, str, float, float | None]]:
    """(metric, filter, score, standard error) of a task or group."""
    scores = given["results"][name]
    for key, score in scores.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(score, str):
            continue
        error = scores.get(f"{metric}_stderr,{kind}")
        error = None if isinstance(error, str) else error
        if length is None:
            yield metric, kind, float(score), error
        elif metric == str(length) and score != PLACEHOLDER:
            yield "string match", kind, float(score), error
    if length is not None and name in given["group_subtasks"] and scores.get(f"{length},none", PLACEHOLDER) < 0:
        # lm-eval takes the mean of RULER's tasks at 4096 alone.
        every = [given["results"][task].get(f"{length},none", PLACEHOLDER) for task in _members(given, name)]
        if PLACEHOLDER not in every:
            yield "string match, mean of the tasks", "none", sum(every) / len(every), None


def _interval(
    given: Mapping[str, Any], name: str, metric: str, kind: str, score: float, error: float | None
) -> tuple[float | None, float | None]:
    """The exact binomial interval where every document scores 0 or 1, else the normal one of lm-eval's standard error.

    A standard error of 0 says that the documents are too few or too alike to tell, not that the score is certain.
    """
    samples = [sample for sample in given["samples"].get(name, ()) if sample["filter"] == kind]
    values = [sample.get(metric) for sample in samples]
    if values and all(value in (0, 1) for value in values) and abs(sum(values) / len(values) - score) < 1e-9:
        return binomial_interval(int(sum(values)), len(values))
    return (score - NORMAL_QUANTILE * error, score + NORMAL_QUANTILE * error) if error else (None, None)


def _members(given: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a group, those of its groups among them; a task is its own only member."""
    if name not in given["group_subtasks"]:
        return [name]
    return [task for child in given["group_subtasks"][name] for task in _members(given, child)]


def _prompts(given: Mapping[str, Any], members: list[str]) -> str:
    """Twelve hexadecimal digits of all prompts, in order."""
    hashed = hashlib.sha256()
    for task in members:
        for sample in given["samples"][task]:
            hashed.update(sample["prompt_hash"].encode())
    return hashed.hexdigest()[:12]


def _words(given: Mapping[str, Any], version: str, name: str, members: list[str], window: int) -> str:
    counts = [given["n-samples"][task] for task in members]
    shots = sorted({given["n-shot"].get(task, 0) for task in members})
    sources = dict.fromkeys(given["configs"][task].get("dataset_path") or "its own making" for task in members)
    group = f", a group of {len(members)} tasks" if members != [name] else ""
    return (
        f"lm-eval {version}, {name} version {given['versions'].get(name)}{group}: "
        f"{sum(count['effective'] for count in counts)} of {sum(count['original'] for count in counts)} documents of "
        f"{', '.join(sources)}, {' and '.join(map(str, shots))} examples in the prompt, at most {window} tokens with "
        "the answer, none cut"
    )


def _details(given: Mapping[str, Any], version: str, name: str, metric: str, error: float | None) -> dict[str, Any]:
    config = given["config"]
    return {
        "lm_eval": version,
        "task_version": given["versions"].get(name),
        "groups": [group for group, children in given["group_subtasks"].items() if name in children],
        "stderr": error,
        "higher_is_better": (given["higher_is_better"].get(name) or {}).get(metric),
        "n_shot": given["n-shot"].get(name),
        "limit": config["limit"],
        "seeds": {kind: config[f"{kind}_seed"] for kind in ("random", "numpy", "torch", "fewshot")},
    }
