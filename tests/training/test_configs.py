"""Train every recipe for two steps on a tiny model, and check its head."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from pe_patch.training.recipe import Recipe
from pe_patch.training.run import load_recipe, train

from .cases import logged

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
LONGEST = 256


def small(recipe: Recipe, model: Path, text: Path, folder: Path) -> Recipe:
    """Return the recipe with a tiny model, a short text and short lengths, and otherwise unchanged."""
    if recipe.model.config is None:
        recipe.model.source = str(model)
    else:
        recipe.model.config |= {"hidden_size": 32, "intermediate_size": 48}
        recipe.tokenizer.train_size = 280
    if recipe.scheme is not None:
        if "cache_ratio" in recipe.scheme.options:
            recipe.scheme.options.pop("rope_dim", None)  # rope_dim alone would fill this small cache
        if recipe.scheme.options_file is not None:
            factors = folder / "factors.json"
            factors.write_text(json.dumps({"long_factor": [1.0 + index for index in range(8)], "factor": 8.0}))
            recipe.scheme.options_file = str(factors)
        for name in ("calibration_tokens", "warm_start_tokens"):
            if getattr(recipe.scheme, name) is not None:
                setattr(recipe.scheme, name, 512)
    recipe.data.streaming, recipe.data.limit = False, None
    for phase in recipe.phases:
        phase.steps, phase.until_accuracy, phase.length, phase.batch = 2, None, min(phase.length, LONGEST), 2
        phase.micro_batch = min(phase.micro_batch or 2, 2)
        phase.vocabulary = (280, 408) if phase.vocabulary else None
        if phase.pose is not None:
            phase.length, phase.pose.target = 64, LONGEST
        for source in phase.mixture.values():
            source.needles = (1, 2) if phase.pose is not None else source.needles
            source.source, source.min_length = None, min(source.min_length, phase.length) if source.min_length else None
    recipe.evaluation.lengths = [LONGEST] * bool(recipe.evaluation.every)
    recipe.evaluation.samples = 2
    return recipe


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_runs_two_steps(path: Path, tmp_path: Path, text: Path, model: Path) -> None:
    recipe = load_recipe(path, [f"output={tmp_path}/run", f"data.source={text}", "progress=false", "data.workers=0"])
    if find_spec("bitsandbytes") is None and (recipe.model.quantization or recipe.optimizer.name == "adamw_8bit"):
        pytest.skip("bitsandbytes is not installed")
    trained = train(small(recipe, model, text, tmp_path))
    steps = logged(tmp_path / "run")
    assert len(steps) == 2 * len(recipe.phases) and all(math.isfinite(step["loss"]) for step in steps)
    assert bool(logged(tmp_path / "run", "evaluation")) == bool(recipe.evaluation.every)
    if recipe.scheme is not None:
        assert trained.config.pe_patch["scheme"] == recipe.scheme.name
        assert json.loads((tmp_path / "run/model/config.json").read_text())["pe_patch"]["scheme"] == recipe.scheme.name
    assert (tmp_path / "run/model/README.md").is_file()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_head_of_a_recipe_has_a_command_and_the_hardware(path: Path) -> None:
    head = path.read_text().split("version:")[0]
    commands = re.findall(r"^#   accelerate launch (.*)$", head, re.MULTILINE)
    assert len(commands) == 1 and commands[0].endswith(f"recipes/finetune.py recipes/configs/{path.name}")
    launcher = re.search(r"--config_file (\S+)", commands[0])
    assert launcher is None or (ROOT / launcher[1]).is_file()
    assert "# Hardware: " in head and "@" not in head.replace("pip install", "")
    assert max(map(len, path.read_text().splitlines())) <= 130
