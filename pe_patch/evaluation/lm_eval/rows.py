"""Convert lm-eval's results to rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..metrics import binomial_interval, student_quantile
from ..results import Row
from .model import NoTruncationLM

NOT_MEASURED = -1
"""Score that RULER's tasks of lm-eval report for a length without documents."""


def rows_of(
    output: Mapping[str, Any], *, version: str, model: NoTruncationLM, length: int | None, stamps: Mapping[str, Any]
) -> list[Row]:
    """Make a row for each score of each task and group. The scores are lm-eval's own.

    Args:
        output: Return value of lm-eval's `simple_evaluate`.
        version: Version of lm-eval.
        model: The evaluated model, which has counted the tokens.
        length: Length at which RULER's tasks made their documents; None for other tasks.
        stamps: Further columns of every row.
    """
    rows = []
    for name in output["results"]:
        members = _members(output, name)
        tokens = max(model.longest.get(task, 0) for task in members)
        for metric, filter_name, score, error in _scores(output, name, length):
            sample_metric = metric if length is None else str(length)
            low, high = _interval(output, name, sample_metric, filter_name, score, error)
            rows.append(
                Row(
                    task=f"lm-eval {version} {name}",
                    measure=f"{metric}, {filter_name}" if filter_name != "none" else metric,
                    length=length or model.max_length,
                    tokens=tokens,
                    depth=None,
                    score=score,
                    low=low,
                    high=high,
                    samples=sum(output["n-samples"][task]["effective"] for task in members),
                    control=None,
                    control_length=None,
                    seed=output["config"]["numpy_seed"],
                    text_hash=_prompt_hash(output, members),
                    measured_on=_measured_on(output, version, name, members, model.max_length),
                    details=_details(output, version, name, metric, error),
                    **stamps,
                )
            )
    return rows


def _scores(output: Mapping[str, Any], name: str, length: int | None) -> Iterator[tuple[str, str, float, float | None]]:
    """Yield metric, filter, score and standard error of each score of a task or group."""
    scores = output["results"][name]
    for key, score in scores.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(score, str):
            continue
        error = scores.get(f"{metric}_stderr,{filter_name}")
        error = None if isinstance(error, str) else error
        if length is None:
            yield metric, filter_name, float(score), error
        elif metric == str(length) and score != NOT_MEASURED:
            yield "string match", filter_name, float(score), error
    if length is not None and name in output["group_subtasks"] and scores.get(f"{length},none", NOT_MEASURED) < 0:
        # lm-eval averages RULER's tasks only at 4096.
        task_scores = [output["results"][task].get(f"{length},none", NOT_MEASURED) for task in _members(output, name)]
        if NOT_MEASURED not in task_scores:
            yield "string match, mean of the tasks", "none", sum(task_scores) / len(task_scores), None


def _interval(
    output: Mapping[str, Any], name: str, metric: str, filter_name: str, score: float, error: float | None
) -> tuple[float | None, float | None]:
    """Return the exact binomial interval if every document scores 0 or 1, else Student's of the standard error.

    A standard error of 0 gives no interval: it means that the documents are too few or too similar.
    """
    samples = [sample for sample in output["samples"].get(name, ()) if sample["filter"] == filter_name]
    values = [sample.get(metric) for sample in samples]
    if values and all(value in (0, 1) for value in values) and abs(sum(values) / len(values) - score) < 1e-9:
        return binomial_interval(int(sum(values)), len(values))
    count = sum(output["n-samples"][task]["effective"] for task in _members(output, name))
    if not error or count < 2:
        return None, None
    half = student_quantile(count - 1) * error
    return score - half, score + half


def _members(output: Mapping[str, Any], name: str) -> list[str]:
    """Return all tasks of a group, including those of its subgroups; for a task, return the task."""
    if name not in output["group_subtasks"]:
        return [name]
    return [task for child in output["group_subtasks"][name] for task in _members(output, child)]


def _prompt_hash(output: Mapping[str, Any], members: list[str]) -> str:
    """Return twelve hexadecimal digits that identify all prompts in their order."""
    hashed = hashlib.sha256()
    for task in members:
        for sample in output["samples"][task]:
            hashed.update(sample["prompt_hash"].encode())
    return hashed.hexdigest()[:12]


def _measured_on(output: Mapping[str, Any], version: str, name: str, members: list[str], window: int) -> str:
    counts = [output["n-samples"][task] for task in members]
    shots = sorted({output["n-shot"].get(task, 0) for task in members})
    sources = dict.fromkeys(output["configs"][task].get("dataset_path") or "generated text" for task in members)
    group = f", a group of {len(members)} tasks" if members != [name] else ""
    return (
        f"lm-eval {version}, {name} version {output['versions'].get(name)}{group}: "
        f"{sum(count['effective'] for count in counts)} of {sum(count['original'] for count in counts)} documents of "
        f"{', '.join(sources)}, {' and '.join(map(str, shots))} examples in the prompt, at most {window} tokens with "
        "the answer, none cut"
    )


def _details(output: Mapping[str, Any], version: str, name: str, metric: str, error: float | None) -> dict[str, Any]:
    config = output["config"]
    return {
        "lm_eval": version,
        "task_version": output["versions"].get(name),
        "groups": [group for group, children in output["group_subtasks"].items() if name in children],
        "stderr": error,
        "higher_is_better": (output["higher_is_better"].get(name) or {}).get(metric),
        "n_shot": output["n-shot"].get(name),
        "limit": config["limit"],
        "seeds": {kind: config[f"{kind}_seed"] for kind in ("random", "numpy", "torch", "fewshot")},
    }
