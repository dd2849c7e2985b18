"""The progress of a run where stderr is not a terminal."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pe_patch.evaluation import progress
from pe_patch.training.log import Log

STEP = {"step": 1, "phase": 0, "loss": 2.5, "gradient_norm": 1.0, "tokens_per_second": 80.0, "memory": 1e9}


def test_steps_and_evaluations_print_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.02)
    with Log(tmp_path / "log.jsonl", writes=True, from_step=0, total_steps=4, progress=True) as log:
        log.step(STEP)
        first = capsys.readouterr().err  # the first step gives the first estimate at once
        log.evaluated(1_000, 4_000)
        time.sleep(0.3)
    printed = capsys.readouterr().err
    assert "step 1 of 4: phase 0  loss 2.5" in first and "left" in first
    assert "step 1 of 4: evaluating, 1,000 of about 4,000 tokens" in printed


@pytest.mark.parametrize(("writes", "shown"), [(True, False), (False, True)])
def test_other_processes_and_silent_runs_print_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], writes: bool, shown: bool
) -> None:
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.02)
    with Log(tmp_path / "log.jsonl", writes=writes, from_step=0, total_steps=4, progress=shown) as log:
        log.step(STEP)
        log.evaluated(1_000, 4_000)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
