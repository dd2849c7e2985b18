"""What goes wrong in public reports is refused, stopped or right: numbers, environment, LoRA, attention, signals."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import pe_patch
from pe_patch.errors import UnsupportedError
from pe_patch.training import models, plan
from pe_patch.training.checkpoints import Progress
from pe_patch.training.guard import INTERRUPTED_EXIT_CODE, TERMINATED_EXIT_CODE, TrainingError, fault
from pe_patch.training.launch import Launch
from pe_patch.training.recipe import Guard, Loss, Model, Recipe, RecipeError
from pe_patch.training.run import Run, load_recipe, main, train
from pe_patch.training.trainer import RecipeTrainer

from ..models import build
from .cases import logged, phase
from .test_leaving import curve, started, wait_for_steps

OVERRIDDEN = (
    "_clip_grad_norm", "_evaluate", "_get_grad_norm", "_get_output_dir", "_load_from_checkpoint",
    "_prepare_for_training", "_run_epoch", "_save_checkpoint", "floating_point_ops", "get_batch_samples",
    "get_decay_parameter_names", "get_train_dataloader", "save_model", "training_step",
)  # fmt: skip


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_transformers_still_calls_what_the_trainer_overrides(name: str) -> None:
    """A method that a later version renames would be replaced in silence."""
    assert name in vars(RecipeTrainer)
    source = inspect.getsource(transformers.Trainer)
    assert f"def {name}(" in source and f"self.{name}(" in source


# Numbers that would train nothing, or upward


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.clip=-1.0", "optimizer.clip=.nan", "optimizer.betas=[0.9, 1.0]", "optimizer.weight_decay=-0.1",
        "phases.0.learning_rate=-0.01", "phases.0.learning_rate=0", "phases.0.learning_rate=.inf",
        "phases.0.warmup=-5", "phases.0.floor=-1", "phases.0.decay=1.5", "phases.0.until_accuracy=1.2",
        "checkpoints.every=-1", "checkpoints.every=0", "checkpoints.keep=0", "evaluation.every=-2",
        "evaluation.lengths=[1]", "lora.rank=0", "lora.alpha=-1", "lora.dropout=1.0", "seed=-1", "data.workers=-1",
        "tokenizer.train_size=0",
    ],
)  # fmt: skip
def test_numbers_without_sense_are_refused(override: str, recipe_file: Path) -> None:
    key = override.partition("=")[0].rpartition(".")[2]
    with pytest.raises(RecipeError, match=key):
        load_recipe(recipe_file, [override])


@pytest.mark.parametrize("override", ["optimizer.betas=[0.9, {}]", "phases.0.mixture.text.needles=[[], 2]"])
def test_a_pair_holds_numbers(override: str, recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"(betas|needles) must be two numbers"):
        load_recipe(recipe_file, [override])


def test_a_recipe_that_is_a_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text("3")
    with pytest.raises(RecipeError, match=r"three\.yaml: Invalid"):
        load_recipe(tmp_path / "three.yaml")


def test_a_clip_of_zero_clips_nothing(recipe_file: Path, tmp_path: Path) -> None:
    """As in Transformers, and not to zero."""
    for clip in ("0", "1e9"):
        train(load_recipe(recipe_file, [f"optimizer.clip={clip}", f"output={tmp_path}/{clip}", "phases.0.steps=3"]))
    ours, theirs = logged(tmp_path / "0"), logged(tmp_path / "1e9")
    for key in ("loss", "gradient_norm"):
        assert [step[key] for step in ours] == pytest.approx([step[key] for step in theirs], rel=1e-6)
    assert ours[0]["gradient_norm"] > 0


# A loss that blows up at once


def test_a_blow_up_within_the_first_window_is_seen(recipe_file: Path, tmp_path: Path) -> None:
    rate = ["phases.0.learning_rate=2.0", "phases.0.warmup=0", "phases.0.schedule=constant"]
    with pytest.raises(TrainingError, match=r"the loss has climbed: its mean over [2-9] steps .* first step"):
        train(load_recipe(recipe_file, [*rate, "phases.0.steps=9"]))
    assert not (tmp_path / "run/model").exists()


def test_the_first_window_by_hand() -> None:
    """The losses of a reported run: learning rate 0.05 without warm-up."""
    progress = Progress()
    assert fault(3.29, 1.0, progress, Guard()) is None
    said = fault(7.77, 1.0, progress, Guard())
    assert said is not None and "its mean over 2 steps is 5.530, 2.240 nats above the loss of the phase's first" in said
    assert fault(7.77, 1.0, Progress(losses=[3.29]), Guard(rise=None)) is None
    noisy = Progress()
    assert all(fault(loss, 1.0, noisy, Guard()) is None for loss in (3.0, 4.5, 2.5, 4.9, 3.0))


# What the environment says


def test_the_environment_does_not_change_the_gradients(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["phases.0.steps=2", "phases.0.micro_batch=2", "trackers=[]"]
    train(load_recipe(recipe_file, [*short, f"output={tmp_path}/plain"]))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(load_recipe(recipe_file, [*short, f"output={tmp_path}/environment"]))
    assert curve(tmp_path / "plain") == curve(tmp_path / "environment")


def test_a_ring_counts_each_sequence_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under context parallelism, every process of a ring is handed the whole sequences."""
    recipe = Recipe(output="x", phases=[phase()], trackers=[], dry_run=True)
    trainer = RecipeTrainer(build("llama"), Launch(recipe), recipe, lambda number, step: iter(()))
    trainer.launch.cut_by_ring, trainer.launch.parts = True, 2
    monkeypatch.setattr(trainer.launch, "sum", lambda values: 2 * values)  # of two such processes
    labels = torch.randint(3, 90, (3, 32))
    labels[:, :5] = -100
    batch = {"input_ids": labels, "labels": labels, "position_ids": torch.arange(32).expand(3, -1)}
    (step,), targets = trainer.load([batch, batch])
    assert float(targets) == 2 * 3 * 27 and step.batches[0]["input_ids"].shape == (3, 32)


# Signals


def test_ctrl_c_saves_and_says_how_to_go_on(recipe_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with started(recipe_file, output) as running:
        wait_for_steps(output, 7, running)
        running.send_signal(signal.SIGINT)
        assert running.wait(120) == INTERRUPTED_EXIT_CODE
        assert running.stderr is not None
        said = running.stderr.read().decode()
    step = len(logged(output))
    assert f"SIGINT received at step {step}" in said and "resume=auto" in said and "Traceback" not in said
    assert (output / f"checkpoints/step-{step:06d}/progress.json").is_file() and step < 160


def test_ctrl_c_before_the_first_step(recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pe_patch.training.run.load_corpora", interrupt)
    assert main([str(recipe_file)]) == INTERRUPTED_EXIT_CODE
    assert "Nothing was trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("load_corpora", "before the first step. Nothing was trained"),
        ("finish.finish", "after step 6. There is no checkpoint yet"),
    ],
)
def test_sigterm_outside_of_the_steps_says_what_to_do(
    place: str, said: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def terminate(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(f"pe_patch.training.run.{place}", terminate)
    assert main([str(recipe_file), f"output={tmp_path}/run", "phases.0.steps=6"]) == TERMINATED_EXIT_CODE
    error = capsys.readouterr().err
    assert f"SIGTERM received {said}" in error and "rerun to start again" in error


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_says_what_to_do(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("pe_patch.training.log.Log.step", full)
    assert main([str(recipe_file), f"output={tmp_path}/run"]) == 1
    assert "No space left on device. Correct this and rerun with resume=auto." in capsys.readouterr().err


def test_a_card_that_cannot_be_written_says_what_to_do(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("pe_patch.training.finish.card.write", full)
    assert main([str(recipe_file), f"output={tmp_path}/run", "checkpoints.every=6"]) == 1
    error = capsys.readouterr().err
    assert f"saved in {tmp_path}/run/model, but its model card did not finish" in error
    assert f"The last checkpoint is {tmp_path}/run/checkpoints/step-000006. Rerun with resume=auto." in error


# The saved model is the measured model


@pytest.mark.parametrize(
    "more",
    [
        [], ["lora.rank=2"], ["lora={rank: 2, merge: false}"], ["mixed_precision=bf16"],
        ["scheme={name: t5}", "lora={rank: 2, merge: false}"], ["scheme={name: alibi}"],
        ["model.dtype=bfloat16", "mixed_precision=bf16", "lora.rank=2"], ["model.attention=eager"],
    ],
    ids=["full", "lora", "adapter", "bf16", "adapter and scheme", "scheme", "bfloat16 weights", "eager"],
)  # fmt: skip
def test_the_saved_model_has_the_loss_of_the_trained_one(more: list[str], recipe_file: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file, ["phases.0.steps=3", "phases.0.warmup=0", "trackers=[]", *more]))
    (line,) = logged(tmp_path / "run", "reloaded")
    assert line["difference"] == 0.0 and line["loss"] > 1


def test_the_tokenizer_has_the_new_window(recipe_file: Path, model: Path, tmp_path: Path) -> None:
    limited = tmp_path / "limited"
    shutil.copytree(model, limited)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(limited)
    scheme = "scheme={name: yarn, options: {factor: 4}}"
    train(load_recipe(recipe_file, [scheme, f"model.source={limited}", "phases.0.steps=1", "trackers=[]"]))
    saved = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert saved.model_max_length == 256
    assert len(saved("the a for " * 200, truncation=True)["input_ids"]) == 256


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("{rank: 4, targets: [q_proj, lm_head], embeddings: false}", r"lm_head shares its weight with the input"),
        ("{rank: 4, targets: [q_proj, lm_head], embeddings: true}", r"lm_head shares.*lora\.embeddings: true"),
        ("{rank: 4, targets: [embed_tokens], embeddings: false}", r"embed_tokens shares its weight with the output"),
        ("{rank: 4, targets: [qproj]}", r"no layer is called 'qproj'. Did you mean 'q_proj'"),
        ("{rank: 4, targets: [q_proj, v_prj]}", r"no layer is called 'v_prj'. Did you mean 'v_proj'"),
    ],
)
def test_lora_targets_that_cannot_be_saved_or_found(lora: str, said: str, recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        train(load_recipe(recipe_file, [f"lora={lora}"]))


@pytest.mark.parametrize("embeddings", ["true", "false"])
def test_an_untied_output_layer_can_be_adapted(embeddings: str, recipe_file: Path, model: Path, tmp_path: Path) -> None:
    untied = tmp_path / "untied"
    network = AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=False)
    with torch.no_grad():
        network.lm_head.weight.normal_(std=0.02)
    network.save_pretrained(untied)
    AutoTokenizer.from_pretrained(model).save_pretrained(untied)
    lora = f"lora={{rank: 4, targets: [q_proj, lm_head], embeddings: {embeddings}}}"
    train(load_recipe(recipe_file, [lora, f"model.source={untied}", "phases.0.learning_rate=1e-2", "trackers=[]"]))
    (line,) = logged(tmp_path / "run", "reloaded")
    assert line["difference"] == 0.0


# Attention of packed documents


def test_flash_attention_lets_no_documents_leak() -> None:
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    recipe = Recipe(output="", phases=[phase(batch=4, micro_batch=2)])
    with pytest.raises(RecipeError, match=r"phases\.0\.micro_batch is 2.*micro_batch: 1"):
        models.refuse_documents_that_leak(model, recipe, 1)
    recipe.phases[0].micro_batch = None
    with pytest.raises(RecipeError, match="micro_batch is 2"):
        models.refuse_documents_that_leak(model, recipe, 2)
    models.refuse_documents_that_leak(model, recipe, 4)
    recipe.data.boundaries = False
    models.refuse_documents_that_leak(model, recipe, 1)


def test_flash_attention_is_the_default_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "is_flash_attn_2_available", lambda: True)

    def wanted(device: str = "cuda", **options: Any) -> bool:
        fields = {"phases": [phase(micro_batch=1)], "mixed_precision": "bf16", **options}
        return models.can_default_to_flash(Recipe(output="", **fields), device, 1)

    assert wanted()
    assert not wanted(device="cpu") and not wanted(mixed_precision="no")
    assert not wanted(model=Model(attention="sdpa")) and not wanted(phases=[phase(micro_batch=2)])
    assert not wanted(model=Model(shifted_groups=4))
    asked: list[Any] = []

    def patch(model: Any, name: str, **options: Any) -> None:
        asked.append((name, options.get("backend")))
        if options.get("backend") == "flash" and name == "t5":
            raise UnsupportedError("Flash attention would drop the bias of 't5'")

    monkeypatch.setattr(models, "patch_model", patch)
    models._patch(torch.nn.Linear(1, 1), "yarn", {"factor": 4}, True, trains=True)
    models._patch(torch.nn.Linear(1, 1), "t5", {}, True, trains=True)
    assert asked == [("yarn", "flash"), ("t5", "flash"), ("t5", None)]


def test_the_plan_counts_the_mask_of_packed_rows() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1))
    recipe = Recipe(output="", phases=[phase(length=131072, batch=1)], loss=Loss())
    whole = {"groups": 1, "parts": 1, "shards": 1}
    assert plan.needed(model, recipe, recipe.phases[0], **whole).mask == 131072**2  # 17 GB
    model.config._attn_implementation = "flash_attention_2"
    assert plan.needed(model, recipe, recipe.phases[0], **whole).mask == 0
    model.config._attn_implementation, recipe.data.boundaries = "sdpa", False
    assert plan.needed(model, recipe, recipe.phases[0], **whole).mask == 0


def test_a_patched_model_reads_packed_rows_through_a_mask_of_that_size() -> None:
    """The plan's figure is what is built: one byte for each pair of tokens."""
    seen: list[torch.Tensor] = []
    model = pe_patch.patch_model(build("llama"), "yarn", factor=4.0)
    ids, positions = torch.randint(3, 90, (2, 64)), torch.arange(32).repeat(2).expand(2, -1)
    inner = torch.nn.functional.scaled_dot_product_attention

    def attend(*arguments: Any, **named: Any) -> Any:
        mask = named.get("attn_mask", arguments[3] if len(arguments) > 3 else None)
        seen.extend([] if mask is None else [mask])
        return inner(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        model(input_ids=ids, position_ids=positions, use_cache=False)
    assert seen and seen[0].dtype is torch.bool and seen[0].numel() == 2 * 64**2


def test_a_model_that_will_be_trained_is_not_advised_to_train(recipe_file: Path, caplog: Any) -> None:
    run = Run(load_recipe(recipe_file, ["scheme={name: yarn, options: {factor: 4}}"]))
    assert not [record for record in caplog.records if "Train it with the scheme" in record.getMessage()]
    assert not run.model.training and not run.model.model.position_schemes.training
    pe_patch.patch_model(build("llama"), "yarn", factor=4)
    assert [record for record in caplog.records if "Train it with the scheme" in record.getMessage()]
