"""The demonstration, on the shipped model and a fraction of its questions."""

import shutil

import pytest
import torch
from rich.console import Console

from pe_patch.compare import demo
from pe_patch.data.packaged import shipped_recipes
from pe_patch.errors import CheckpointError
from pe_patch.evaluation.results import Results


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    settings = demo.DemoSettings(output=folder, schemes=("yarn",), lengths=(256, 1024), samples=10, spots=2, steps=1)
    with open(folder / "printed.txt", "w") as printed:
        demo.run(settings, Console(file=printed, width=120))
    return folder


def test_yarn_reads_what_the_untouched_model_cannot(small_run):
    results = Results.load(small_run)
    score = {
        (s, n): results.cell(scheme=s, task="needle", length=n).score for s in ("base", "yarn") for n in (256, 1024)
    }
    assert score["base", 256] >= 0.95 and score["yarn", 1024] >= 0.9
    assert score["base", 1024] <= score["yarn", 1024] - 0.2
    loss = {s: results.cell(scheme=s, task="perplexity", length=1024).score for s in ("base", "yarn")}
    assert loss["yarn"] < loss["base"] - 0.2


def test_the_run_leaves_a_report_and_a_trained_model(small_run):
    names = {path.name for path in small_run.iterdir()}
    pictures = {"loss.png", "retrieval.png", "frequencies.png"}
    assert names >= {"index.html", "results.jsonl", "config.json", "yarn"} | pictures
    assert (small_run / "yarn" / "model" / "model.safetensors").is_file()
    printed = (small_run / "printed.txt").read_text()
    assert "yarn, fine-tuned" in printed and "10 questions" in printed and "last 128 tokens of 2 spots" in printed
    assert Results.load(small_run).values("scheme") == ["base", "yarn", "yarn, fine-tuned"]


def test_the_shipped_model_is_small_and_untouched():
    assert sum(path.stat().st_size for path in demo.BASE.rglob("*") if path.is_file()) <= 2.5e6
    model, tokenizer = demo.load_base(demo.BASE)
    assert model.dtype == torch.float32 and model.config.max_position_embeddings == 256
    assert tokenizer("<k3><v17>")["input_ids"] == [1027, 1105]


def test_a_missing_or_damaged_checkpoint_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        demo.load_base(tmp_path / "none")
    shutil.copytree(demo.BASE, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="Cannot read the checkpoint"):
        demo.load_base(tmp_path / "cut")


def test_the_recipes_are_found_and_the_command_repeats_the_run(tmp_path):
    assert {"tiny_yarn", "tiny_base"} <= shipped_recipes().keys()
    settings = demo.DemoSettings(output=tmp_path / "a b", steps=7, from_scratch=True, seed=3)
    assert demo.command(settings) == f"pe-patch demo --output '{tmp_path}/a b' --steps 7 --seed 3 --from-scratch"
