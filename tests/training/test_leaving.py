"""A stopped run resumes exactly where it stopped, whatever stopped it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pe_patch.training.checkpoints import Progress
from pe_patch.training.guard import TERMINATED_EXIT_CODE, TrainingError, fault
from pe_patch.training.recipe import Guard
from pe_patch.training.run import load_recipe, main, train

from .cases import logged

ROOT = Path(__file__).parents[2]
TIMING = {"seconds", "tokens_per_second", "memory"}
LONG = ["phases.0.steps=160", "checkpoints.every=5", "resume=auto", "scheme={name: yarn, options: {factor: 4}}",
        "evaluation={every: 80, tasks: [perplexity], samples: 2}"]  # fmt: skip


def started(recipe_file: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "recipes/finetune.py", str(recipe_file), f"output={output}", *LONG]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def wait_for_steps(output: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 300
    while time.monotonic() < limit:
        if (output / "log.jsonl").is_file() and (output / "log.jsonl").read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        time.sleep(0.01)
    pytest.fail(f"{count} steps were not made in five minutes")


def curve(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMING} for line in logged(output)]


def test_a_killed_and_a_terminated_run_end_bit_for_bit_like_an_uninterrupted_one(
    recipe_file: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with started(recipe_file, cut) as first:
        wait_for_steps(cut, random.randint(1, 12), first)
        first.send_signal(signal.SIGKILL)
    with started(recipe_file, cut) as second:
        wait_for_steps(cut, random.randint(16, 24), second)
        second.send_signal(signal.SIGTERM)
        assert second.wait(120) == TERMINATED_EXIT_CODE
        assert second.stderr is not None
        said = second.stderr.read().decode()
    assert "SIGTERM received at step" in said and "resume=auto" in said
    step = len(logged(cut))
    assert (cut / f"checkpoints/step-{step:06d}/progress.json").is_file() and step < 160
    for output in (cut, whole):
        train(load_recipe(recipe_file, [f"output={output}", *LONG]))
    assert curve(cut) == curve(whole) and len(curve(cut)) == 160
    measured = [
        [(row["step"], row["measure"], row["score"]) for row in logged(output, "evaluation")] for output in (cut, whole)
    ]
    assert measured[0] == measured[1] and {row[0] for row in measured[0]} == {80, 160}
    ours, theirs = (load_file(output / "model/model.safetensors") for output in (cut, whole))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_a_loss_that_climbs_stops_the_run(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["phases.0.learning_rate=3.0", "phases.0.warmup=15", "optimizer.clip=1e9", "phases.0.steps=200",
         "guard={rise: 1.0, window: 4}", "checkpoints={every: 1, keep: 1}", "phases.0.mixture={text: {share: 1}}"],
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"the loss has climbed.*guard\.rise is 1\.0.*checkpoints/step-"):
        train(recipe)
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    means = [sum(losses[at - 4 : at]) / 4 for at in range(4, len(losses) + 1)]
    assert max(means) - min(means) <= 1.0  # the step that was too much is not among those that were made
    assert (tmp_path / f"run/checkpoints/step-{len(losses):06d}/progress.json").is_file()


def test_a_high_loss_that_does_not_climb_is_allowed() -> None:
    progress, wanted = Progress(), Guard(rise=1.0, window=3)
    assert all(fault(loss, 1.0, progress, wanted) is None for loss in (9.0, 8.0, 9.5, 3.0, 2.0, 5.0, 2.0, 2.0))
    assert progress.lowest == 3.0  # the mean of 2, 5 and 2
    assert "4.000, 1.000 nats above" not in str(
        fault(8.0, 1.0, progress, wanted)
    )  # the mean is 4: no more than allowed
    said = fault(8.0, 1.0, progress, wanted)
    assert said is not None and "6.000, 3.000 nats above" in said
    assert fault(50.0, 1.0, Progress(losses=[2.0, 2.0], lowest=2.0), Guard(rise=None, window=3)) is None
    assert "nan" in str(fault(2.0, float("nan"), Progress(), Guard(rise=None)))


def test_a_checkpoint_of_another_scheme_is_refused_and_nothing_changes(recipe_file: Path, tmp_path: Path) -> None:
    scheme = "scheme={name: yarn, options: {factor: 4}}"
    short = ["phases.0.steps=2", "checkpoints.every=1", "progress=false"]
    assert main([str(recipe_file), scheme, *short]) == 0
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    other = ["scheme={name: linear, options: {factor: 4}}", "phases.0.steps=2", "checkpoints.every=1", "resume=auto"]
    assert main([str(recipe_file), *other]) == 2
    after = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    assert before == after
