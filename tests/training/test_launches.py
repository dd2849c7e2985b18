"""The whole script under each way to launch it that a CPU has does what it does on one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from .cases import logged
from .conftest import PLAIN

ROOT = Path(__file__).parents[2]
TOLD = [
    "phases.0.steps=3", "phases.0.mixture={text: {share: 1}}", "checkpoints.every=2",
    "scheme={name: t5, warm_start_tokens: 256}",
    "evaluation={every: 3, tasks: [perplexity], lengths: [128], samples: 2}",
]  # fmt: skip
LAUNCHES = ("cpu_ddp", pytest.param("cpu_ulysses", marks=pytest.mark.thorough))


def launch(configuration: str | None, recipe: Path, output: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    script = ["recipes/finetune.py", str(recipe), f"output={output}", *TOLD]
    if configuration is not None:
        file = f"recipes/accelerate/{configuration}.yaml"
        script = ["-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0", *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert logged(output, "evaluation") and (output / "model/README.md").is_file()
    assert (output / "checkpoints/step-000002/progress.json").is_file()
    return logged(output), load_file(output / "model/model.safetensors")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, text: Path, model: Path) -> Path:
    """Of a model that drops nothing out, since every process would drop something else."""
    folder = tmp_path_factory.mktemp("launches")
    shutil.copytree(model, folder / "model")
    config = folder / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.0}))
    (folder / "plain.yaml").write_text(PLAIN.format(output="runs/never", model=folder / "model", text=text))
    return folder / "plain.yaml"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return launch(None, recipe, tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize("configuration", LAUNCHES)
def test_the_script_does_under_every_launch_what_it_does_alone(
    configuration: str, alone: tuple[Any, Any], recipe: Path, tmp_path: Path
) -> None:
    found, saved = launch(configuration, recipe, tmp_path / "run")
    losses, weights = alone
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in losses], abs=1e-5)
    assert saved.keys() == weights.keys() and any("position_schemes" in name for name in saved)
    assert max(float((saved[name] - weights[name]).abs().max()) for name in weights) < 1e-4
