"""A run prints a plan, and writes its model, card and exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

import pe_patch
from pe_patch.training import plan
from pe_patch.training.recipe import Phase, Pose, Recipe, RecipeError, Source
from pe_patch.training.run import load_recipe, main, train

from .cases import logged, phase

YARN = "scheme={name: yarn, options: {factor: 4}}"
MEASURED = (
    "evaluation={every: 2, tasks: [perplexity, passkey], lengths: [128, 256], samples: 2, before: true, original: true}"
)


def test_the_plan_says_what_it_takes_and_leaves_nothing_behind(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("mixture: {text", "mixture: {words"))
    assert main([str(recipe_file), "--dry-run", "phases.0.micro_batch=2", "phases.0.pose={target: 512}"]) == 0
    said = capsys.readouterr().out
    for part in ("512", "1,536 tokens", "words", "needles", "micro-batch", "parameters are trained", "memory"):
        assert part in said, part
    assert re.search(r"about \d+ s", said)
    assert not (tmp_path / "run").exists()


def test_a_length_that_cannot_fit_is_refused_before_anything_is_written(recipe_file: Path, tmp_path: Path) -> None:
    # A billion tokens of 32 numbers in float32, twice two layers deep, are past any machine's memory.
    told = ["phases.0.length=1000000000", "phases.0.micro_batch=1", "phases.0.mixture={text: {share: 1}}",
            "data.boundaries=true", "model.gradient_checkpointing=true"]  # fmt: skip
    with pytest.raises(RecipeError, match=r"phases\.0: 1,000,000,000 tokens do not fit.*GB.*micro-?batch|lora.*pose"):
        train(load_recipe(recipe_file, told))
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="longest"):
        train(load_recipe(recipe_file, ["phases.0.mixture={text: {share: 1, min_length: 100000}}"]))
    assert not (tmp_path / "run").exists()


def test_the_arithmetic_of_a_large_model() -> None:
    """LLaMA-7B at 32,768 tokens on eight devices, by hand: 6.74 billion weights in float32 with autocast."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
        )
    recipe = Recipe(output="", mixed_precision="bf16", phases=[phase(length=32768, batch=64, micro_batch=1)])
    recipe.model.gradient_checkpointing = True
    need = plan.needed(model, recipe, recipe.phases[0], groups=8, parts=1, shards=8)
    weights = 6_738_415_616
    assert (need.gradients, need.optimizer) == (4 * weights // 8, 8 * weights // 8)
    assert need.activations == (32 + 17) * 32768 * 4096 * 2  # an input of each layer, and one layer in full
    assert need.logits == 3 * 4 * 1024 * 32000
    cut = plan.needed(model, recipe, recipe.phases[0], groups=1, parts=8, shards=8)
    assert cut.activations == need.activations // 8
    short = Phase(length=2048, batch=64, micro_batch=1, mixture={"text": Source(share=1)}, pose=Pose(target=32768))
    assert plan.needed(model, recipe, short, groups=8, parts=1, shards=8).activations * 16 == need.activations


def test_what_a_run_leaves_behind(recipe_file: Path, tmp_path: Path) -> None:
    trained = train(load_recipe(recipe_file, [YARN, MEASURED, "export=[transformers, vllm]", "phases.0.steps=4"]))
    run = tmp_path / "run"
    rows = logged(run, "evaluation")
    kinds = {(row["step"], row["original"]) for row in rows}
    assert kinds == {(0, True), (0, False), (2, False), (4, False)}
    assert {row["length"] for row in rows} == {128, 256} and {"perplexity", "passkey"} <= {row["task"] for row in rows}
    assert any("position" in row["measure"] for row in rows)  # loss by position is part of perplexity
    card = (run / "model/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "pe_patch" in front["tags"]
    for part in (
        "`yarn` (factor: 4)",
        "curve.png",
        "## Scores",
        "passkey",
        "Within 2%",
        "phases:",
        "4 steps, 1,024 tokens",
    ):
        assert part in card, part
    assert (run / "model/curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    ids = torch.arange(60)[None]
    with torch.no_grad():
        expected = trained(ids).logits
        ours = pe_patch.load_patched(run / "model").eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(run / "export/transformers").eval()(ids).logits
    assert torch.equal(ours, expected) and torch.equal(plain, expected)
    assert json.loads((run / "export/vllm/serve.json").read_text())
    assert (run / "export/vllm/tokenizer_config.json").is_file()
    assert any(path.name.startswith("events.out.tfevents") for path in run.rglob("*"))  # tensorboard is the default


def test_an_export_that_cannot_be_is_refused_before_training(recipe_file: Path, tmp_path: Path) -> None:
    for told, said in (("export=[vllm]", "vLLM"), ("export=[vlm]", "'vllm'")):
        with pytest.raises(pe_patch.PePatchError, match=said):
            train(load_recipe(recipe_file, ["scheme={name: alibi}", told]))
    assert not (tmp_path / "run/log.jsonl").exists()


def test_a_scheme_that_needs_no_training_is_measured_and_saved(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before, _, _ = recipe_file.read_text().partition("phases:")
    recipe_file.write_text(before + "phases: []\n")
    scheme = "scheme={name: self_extend, options: {factor: 4}}"
    assert main([str(recipe_file), scheme, MEASURED]) == 0
    assert "No training: saving the model with" in capsys.readouterr().err
    assert logged(tmp_path / "run") == [] and logged(tmp_path / "run", "evaluation")
    assert pe_patch.load_patched(tmp_path / "run/model").config.pe_patch["scheme"] == "self_extend"
    assert "Training\n\nNone" in (tmp_path / "run/model/README.md").read_text()
    assert main([str(recipe_file), "scheme={name: alibi}", MEASURED]) == 2  # one that does need it


def test_a_recipe_of_another_version_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    content = recipe_file.read_text()
    for line, said in (("version: 2", "format version 2"), ("", "`version` is missing")):
        recipe_file.write_text(content.replace("version: 1", line))
        with pytest.raises(RecipeError, match=said):
            load_recipe(recipe_file)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scheme", ["{name: yarn, options: {factor: 2}}", "{name: kerple}"])
def test_saved_weights_are_averaged_with_those_before_training(recipe_file: Path, tmp_path: Path, scheme: str) -> None:
    found = {}
    for share in (1.0, 0.25):
        options = [f"output={tmp_path}/{share}", f"average={share}", f"scheme={scheme}", "phases.0.learning_rate=1e-2"]
        train(load_recipe(recipe_file, options))
        found[share] = pe_patch.load_patched(tmp_path / str(share) / "model").state_dict()
    source = load_recipe(recipe_file).model.source
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    moved = 0.0
    for name, trained in found[1.0].items():
        expected = trained if name not in before else before[name] + 0.25 * (trained - before[name])
        torch.testing.assert_close(found[0.25][name], expected, rtol=1e-6, atol=1e-7)
        moved = max(moved, float((trained - expected).abs().max()))
    assert moved > 1e-3


def test_where_weights_cannot_be_averaged(recipe_file: Path) -> None:
    for options, said in (
        (["average=0"], "above 0 and at most 1"),
        (["average=1.5"], "above 0 and at most 1"),
        (["average=0.5", "lora={}"], r"lora\.alpha"),
        (["average=0.5", "phases=[]", "scheme={name: self_extend, options: {factor: 2}}"], "source and phases"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe(recipe_file, options)
    with pytest.raises(RecipeError, match="'mla' replaces projections"):
        train(
            load_recipe(
                recipe_file, ["average=0.5", "scheme={name: mla, calibration_tokens: 200, options: {kv_rank: 8}}"]
            )
        )
