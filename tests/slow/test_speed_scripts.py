"""The scripts that measure generation, and what the GPU script refuses, each at its shortest setting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "decode": ["decode.py", "--lengths", "256", "--rounds", "1", "--schemes", "rope", "dca", "--batch", "1", "2"],
    "generate": ["generate.py", "--model", "demo", "--prompt", "64", "--tokens", "4", "--schemes", "self_extend"],
    "memory": ["memory.py", "--lengths", "256"],
}
WORDS = {"decode": ("dca", "batch 2"), "generate": ("self_extend", "unpatched"), "memory": ("reading", "training")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_writes_its_table(name: str, tmp_path: Path) -> None:
    script, *options = COMMANDS[name]
    command = [sys.executable, f"benchmarks/{script}", *options, "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert json.loads((tmp_path / f"{name}.json").read_text())["machine"]["torch"]
    table = (tmp_path / f"{name}.md").read_text()
    assert all(word in table for word in WORDS[name])


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [([], 2, "Usage"), (["out", "--fast"], 2, "Unknown option --fast"), (["out"], 1, "There is no CUDA device")],
)
def test_the_gpu_script_says_what_it_needs(given: list[str], status: int, said: str, tmp_path: Path) -> None:
    import torch

    if status == 1 and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = [str(tmp_path / word) if word == "out" else word for word in given]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    ended = subprocess.run(
        ["bash", "benchmarks/gpu.sh", *words], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert ended.returncode == status and said in ended.stderr
