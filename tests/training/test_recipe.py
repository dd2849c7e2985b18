"""Recipes are read with overrides, and contradictions are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pe_patch.errors import PePatchError
from pe_patch.training.recipe import Phase, Recipe, RecipeError
from pe_patch.training.run import load_recipe, main, train


def test_the_tree_is_filled_and_overridden(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["phases.0.steps=9", "--optimizer.betas=[0.8, 0.9]", "lora.rank=4", "seed=7"])
    assert isinstance(recipe, Recipe) and isinstance(recipe.phases[0], Phase)
    assert (recipe.phases[0].steps, recipe.phases[0].learning_rate, recipe.seed) == (9, 1e-3, 7)
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.lora is not None and (recipe.lora.rank, recipe.lora.alpha) == (4, 16)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("progress:", "progres:", ["progres", "'progress'"]),
        ("    warmup:", "    warm_up:", ["warm_up", "'warmup'"]),
        ("    batch: 4", "    batch: four", ["batch", "four", "Integer"]),
        ("kind: needles", "kind: needle", ["kind", "needle", "text"]),
        ("    steps: 6", "    steps: 0", ["phases.0", "steps"]),
        ("output:", "# output:", ["output"]),
        ("phases:", "phases: []\nseed: [", ["line"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(recipe_file: Path, before: str, after: str, said: list[str]) -> None:
    content = recipe_file.read_text()
    assert before in content
    recipe_file.write_text(content.replace(before, after))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    assert all(part in str(caught.value) for part in [str(recipe_file), *said]), caught.value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases.0.stepz=3", "'steps'"),
        ("seeds=3", "'seed'"),
        ("seed=x", "Integer"),
        ("phases.3.steps=3", "phases.3"),
        ("seed", "key=value"),
    ],
)
def test_what_is_wrong_in_an_override_is_named(recipe_file: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [override])
    assert override in str(caught.value) and said in str(caught.value)


def test_contradictions_and_missing_files(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"either model.source or model.config"):
        load_recipe(recipe_file, ["model.config={model_type: llama}"])
    with pytest.raises(RecipeError, match=r"tiny_yarn, yarn_1b_16k"):
        load_recipe("recipes/configs/no_such.yaml")
    assert main([str(recipe_file), "seeds=1"]) == 2
    assert main([str(recipe_file), "data.source=/no/such/folder"]) == 1
    with pytest.raises(PePatchError, match="/no/such/model"):
        train(load_recipe(recipe_file, ["model.source=/no/such/model"]))


@pytest.mark.parametrize("place", ["file", "override"])
def test_the_word_no_is_no_boolean(recipe_file: Path, place: str) -> None:
    """YAML 1.1 reads `no` as false, and messages advise mixed_precision=no."""
    if place == "file":
        recipe_file.write_text(recipe_file.read_text() + "\nmixed_precision: no\n")
    given = ["mixed_precision=bf16"] if place == "override" else []
    assert load_recipe(recipe_file, [*given, *["mixed_precision=no"] * (place == "override")]).mixed_precision == "no"


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "\n  " + "- " * 100_000 + "a"])
def test_a_recipe_that_is_nested_too_deep_is_refused(value: str, tmp_path: Path) -> None:
    """YAML's reader would end the process."""
    (tmp_path / "deep.yaml").write_text(f"version: 1\noutput: {value}\n")
    with pytest.raises(RecipeError, match="nested more than 50 deep"):
        load_recipe(tmp_path / "deep.yaml")
    with pytest.raises(RecipeError, match="seed: lists are nested more than 50 deep"):
        load_recipe("tiny_yarn", [f"seed={value}"])
