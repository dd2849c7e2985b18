"""The experiments of benchmarks/questions run at their shortest setting, and their tables name what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = {
    "order": (["order.py", "--steps", "4", "--seeds", "0"], "order", ["| none |", "| alibi |"]),
    "relations": (["relations.py", "--steps", "2", "--seeds", "0", "1"], "relations", ["| rope_2d | rope |", "±"]),
    "generation": (
        [
            "generation.py",
            "scratch",
            "--steps",
            "2",
            "--tokens",
            "40",
            "--texts",
            "2",
            "--seeds",
            "0",
            "--judge",
            "none",
        ],
        "generation_scratch",
        ["| alibi |", "| rope, YaRN untrained |", "| the real text |"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_experiment_runs_and_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    (script, *options), stem, words = CASES[name]
    command = [sys.executable, str(ROOT / "benchmarks" / "questions" / script), *options, "--output", str(tmp_path)]
    first = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    table = (tmp_path / f"{stem}.md").read_text(encoding="utf-8")
    assert all(word in table for word in words) and (tmp_path / f"{stem}.png").stat().st_size > 10_000
    assert json.loads((tmp_path / f"{stem}.json").read_text())["machine"]["torch"]
    second = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert "seed 0" in first.stdout and "seed 0" not in second.stdout, "what was measured is kept"
