"""Compare the effective length with the table in RULER's README (github.com/NVIDIA/RULER at c3f5e3b)."""

from __future__ import annotations

from typing import Any

import pytest

from pe_patch.errors import OptionError, PePatchError
from pe_patch.evaluation.effective import effective_length
from pe_patch.evaluation.results import Results, Row
from pe_patch.evaluation.tasks.ruler import THIRTEEN

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
PUBLISHED = {  # averages of 13 tasks; effective length in thousands; average over lengths, weighted up, weighted down
    "Llama2 (7B)": ([85.6], None, None),
    "Jamba-1.5-large": ([96.7, 96.6, 96.4, 96.0, 95.4, 95.1], 128, (96.0, 95.7, 96.3)),
    "GPT-4-1106-preview": ([96.6, 96.3, 95.2, 93.2, 87.0, 81.2], 64, (91.6, 89.0, 94.1)),
    "Llama3.1 (70B)": ([96.5, 95.8, 95.4, 94.8, 88.4, 66.6], 64, (89.6, 85.5, 93.7)),
    "Llama3.1 (8B)": ([95.5, 93.8, 91.6, 87.4, 84.7, 77.0], 32, (88.3, 85.4, 91.3)),
    "ProLong (8B)": ([94.5, 92.5, 92.3, 89.3, 83.2, 81.6], 32, (88.9, 86.6, 91.2)),
    "MegaBeam-Mistral (7B)": ([93.8, 92.5, 92.0, 89.2, 83.7, 83.7], 32, (89.1, 87.3, 91.0)),
    "Phi3-mini (3.8B)": ([92.2, 91.5, 90.7, 87.5, 80.6, 66.7], 32, (84.8, 80.9, 88.7)),
    "GradientAI/Llama3 (8B)": ([92.8, 90.3, 85.7, 79.9, 76.3, 69.5], 16, (82.4, 78.5, 86.3)),
    "InternLM2.5 (7B)": ([88.1, 85.5, 84.5, 82.7, 75.5, 68.9], 4, (80.9, 77.8, 83.9)),
    "Together (7B)": ([88.2, 81.1, 69.4, 63.0, 0.0, 0.0], 4, (50.3, 33.8, 66.7)),
    "LongChat (7B)": ([84.7, 79.9, 70.8, 59.3, 0.0, 0.0], None, (49.1, 33.1, 65.2)),
    "LongAlpaca (13B)": ([60.6, 57.0, 56.6, 43.6, 0.0, 0.0], None, (36.3, 24.7, 47.9)),
}


def row(scheme: str, task: str, length: int, score: float, samples: int = 500, **stamps: Any) -> Row:
    stamps = {"benchmark": "RULER", "substitutes": []} | stamps
    unused: dict[str, Any] = dict.fromkeys(("low", "high", "control", "control_length", "peak_memory", "depth"))
    named = {"measure": "", "memory_kind": "", "text_hash": "", "tokenizer_hash": "", "measured_on": ""}
    return Row(
        scheme=scheme,
        task=task,
        length=length,
        tokens=length,
        score=score,
        samples=samples,
        seconds=0,
        seed=42,
        details={"stamps": stamps},
        **named,
        **unused,
    )


def results(averages: dict[str, list[float]], tasks: tuple[str, ...] = THIRTEEN, spread: float = 0.1) -> Results:
    """Return rows of different tasks whose average is the given one, in percent."""
    shift = {task: spread * (number - (len(tasks) - 1) / 2) / 100 for number, task in enumerate(tasks)}
    return Results(
        [
            row(scheme, task, length, average / 100 + shift[task])
            for scheme, values in averages.items()
            for length, average in zip(LENGTHS, values, strict=False)
            for task in tasks
        ]
    )


def test_published_models():
    found = effective_length(results({model: entry[0] for model, entry in PUBLISHED.items()}))
    assert list(found) == list(PUBLISHED)
    for model, (averages, effective, over_lengths) in PUBLISHED.items():
        entry = found[model]
        assert entry["effective"] == (effective and effective * 1024), model
        assert entry["at_least"] == (effective == 128)
        assert (entry["benchmark"], entry["because"], entry["of_thirteen"]) == ("RULER", [], 13)
        assert list(entry["averages"].values()) == pytest.approx([each / 100 for each in averages])
        if over_lengths:  # the published ones come from averages before they were rounded
            given = [100 * entry[key] for key in ("average", "rising", "falling")]
            assert given == pytest.approx(over_lengths, abs=0.1)


def test_fewer_tasks_are_not_labelled_ruler():
    tasks = ("niah_single_1", "niah_multikey_1", "vt", "qa_local_1")
    entry = effective_length(results({"yarn": [90.0, 80.0]}, tasks))["yarn"]
    assert entry["effective"] == 4096 and not entry["at_least"]
    assert (entry["of_thirteen"], entry["tasks"]) == (3, list(tasks))
    assert entry["benchmark"] == "after RULER"
    missing = [task for task in THIRTEEN if task not in tasks]
    assert entry["because"] == [f"not measured: {', '.join(missing)}"]


def test_substitutes_are_listed_with_their_tasks():
    rows = results({"yarn": [90.0]}).rows
    stamps = {"benchmark": "after RULER", "substitutes": ["wording own"]}
    rows = [row("yarn", each.task, 4096, 0.9, **(stamps if each.task in ("vt", "cwe") else {})) for each in rows]
    entry = effective_length(Results(rows))["yarn"]
    assert entry["benchmark"] == "after RULER"
    assert entry["because"] == ["wording own: vt, cwe"]
    rows[0].details.clear()
    assert "no stamp that says so: niah_single_1" in effective_length(Results(rows))["yarn"]["because"]


def test_a_length_without_some_of_the_tasks_is_left_out():
    rows = [each for each in results({"yarn": [90.0, 88.0, 87.0]}).rows if (each.task, each.length) != ("vt", 16384)]
    entry = effective_length(Results(rows))["yarn"]
    assert entry["effective"] == 8192 and not entry["at_least"]
    assert list(entry["averages"]) == [4096, 8192]
    assert entry["left_out"] == {16384: ["vt"]}


def test_the_longest_length_above_the_threshold_counts():
    assert effective_length(results({"a": [85.0, 86.0, 85.0]}))["a"]["effective"] == 8192


def test_rows_of_a_task_are_weighted_by_samples_and_other_tasks_are_ignored():
    rows = [row("a", "vt", 4096, 1.0, samples=30), row("a", "vt", 4096, 0.5, samples=10), row("a", "needle", 4096, 0.0)]
    entry = effective_length(Results(rows))["a"]
    assert entry["averages"] == {4096: 0.875}


def test_another_threshold_is_not_labelled_ruler():
    entry = effective_length(results({"a": [85.0, 80.0]}), threshold=0.82)["a"]
    assert (entry["effective"], entry["benchmark"]) == (4096, "after RULER")
    assert entry["because"] == ["threshold 0.82 instead of 0.856"]
    for wrong in (85.6, 0, -1):
        with pytest.raises(OptionError, match="between 0 and 1"):
            effective_length(results({"a": [85.0]}), threshold=wrong)


def test_results_without_ruler_tasks_raise():
    with pytest.raises(PePatchError, match="No result is of one of RULER's tasks"):
        effective_length(Results([row("a", "needle", 4096, 1.0)]))
    apart = [row("a", "vt", 4096, 1.0), row("a", "cwe", 8192, 1.0)]
    with pytest.raises(PePatchError, match="no length at which all of its tasks"):
        effective_length(Results(apart))
