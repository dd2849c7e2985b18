"""Training does what the recipe says: losses counted, runs resumed, models saved exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pe_patch
from pe_patch.data.packaged import DEMO_MODEL
from pe_patch.errors import PePatchError
from pe_patch.training import trainer
from pe_patch.training.data import PhaseData
from pe_patch.training.loss import count_targets, next_token_score
from pe_patch.training.recipe import RecipeError
from pe_patch.training.run import Run, load_recipe, main, train
from pe_patch.training.trainer import RecipeTrainer, TrainingError, learning_rates

from .cases import logged, phase


def test_loss_is_the_mean_over_the_targets_of_the_whole_step(recipe_file: Path, model: Path) -> None:
    overrides = ["phases.0.micro_batch=1", "phases.0.steps=1", "optimizer.clip=1e9"]
    recipe = load_recipe(recipe_file, overrides)
    # Dropout would make the two computations differ; the copy of the model has none.
    plain = recipe_file.parent / "plain"
    network = AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.0)
    network.save_pretrained(plain)
    AutoTokenizer.from_pretrained(model).save_pretrained(plain)
    recipe.model.source = str(plain)
    train(recipe)
    run = Run(recipe)
    data = PhaseData(run.corpora, run.tokenizer, recipe.phases[0], seed=(0, 0), boundaries=True)
    network = network.double().train()
    losses, counts = [], []
    for number in range(4):
        row = data[number]
        ids, positions = torch.from_numpy(row["input_ids"])[None], torch.from_numpy(row["position_ids"])[None]
        logs = network(ids, position_ids=positions, use_cache=False).logits[0].log_softmax(-1)
        places = [place for place in range(1, 64) if row["labels"][place] != -100]
        losses.append(-sum(logs[place - 1, row["labels"][place]] for place in places))
        counts.append(len(places))
    mean: Any = sum(losses) / sum(counts)
    mean.backward()
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in network.parameters() if p.grad is not None))
    assert len(set(counts)) > 1  # otherwise a mean of means would do as well
    (step,) = logged(recipe_file.parent / "run")
    assert step["targets"] == sum(counts)
    assert step["loss"] == pytest.approx(mean.item(), rel=1e-6)
    assert step["gradient_norm"] == pytest.approx(norm, rel=1e-5)


def test_score_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [9.0, 9.0, 9.0]]])
    labels = torch.tensor([[0, 2, 0]])
    e = math.e
    score = next_token_score(logits, labels, vocabulary=None, accuracy=True)
    expected = -math.log(e / (1 + e**2 + e)) - math.log(e**3 / (e**3 + 2))
    assert (float(score.loss), int(score.correct)) == (pytest.approx(expected, rel=1e-6), 1)
    only = next_token_score(logits, torch.tensor([[0, 2, -100]]), vocabulary=(1, 3), accuracy=False)
    assert float(only.loss) == pytest.approx(-math.log(e / (e**2 + e)), rel=1e-6)
    assert int(count_targets(torch.tensor([[5, 2, -100], [-100, 1, 1]]))) == 3


@pytest.mark.parametrize(
    ("schedule", "more", "expected"),
    [  # warm-up over 2 of 10 steps; the values are the formulas' at steps 0, 1, 2, 6 and 9
        ("constant", {}, [0, 0.5, 1, 1, 1]),
        ("linear", {}, [0, 0.5, 1, 4 / 8, 1 / 8]),
        ("cosine", {}, [0, 0.5, 1, (1 + math.cos(math.pi * 4 / 8)) / 2, (1 + math.cos(math.pi * 7 / 8)) / 2]),
        ("warmup_stable_decay", {"decay": 0.4, "floor": 0.2}, [0.2, 0.6, 1, 1, 1 - 0.8 * 3 / 4]),
        (
            "warmup_stable_decay",
            {"decay": 0.4, "floor": 0.2, "decay_shape": "1-sqrt"},
            [0.2, 0.6, 1, 1, 1 - 0.8 * math.sqrt(3 / 4)],
        ),
    ],
)
def test_schedules(schedule: Any, more: dict[str, Any], expected: list[float]) -> None:
    rate = learning_rates(phase(schedule=schedule, steps=10, warmup=2, learning_rate=0.1, **more))
    assert [rate(step) for step in (0, 1, 2, 6, 9)] == pytest.approx([0.1 * value for value in expected])


# What happens to a run


class Killed(BaseException):
    """As little expected as a signal."""


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file.write_text(
        recipe_file.read_text()
        + "  - {length: 32, batch: 2, steps: 5, micro_batch: 1, schedule: constant, warmup: 1,\n"
        "     mixture: {text: {share: 1}}}\n"
        "checkpoints: {every: 2, keep: 2}\n"
    )

    def run(output: str, **more: str) -> Any:
        more = {"output": str(tmp_path / output), "resume": "auto", **more}
        return train(load_recipe(recipe_file, [f"{key}={value}" for key, value in more.items()]))

    whole = run("whole")
    step = RecipeTrainer.training_step
    for last in (3, 5, 9):  # within the first phase, just before its end, and within the second
        left = iter(range(last - (len(logged(tmp_path / "cut")) // 2 * 2 if last > 3 else 0)))

        def killed(self: Any, *arguments: Any, left: Any = left) -> Any:
            if next(left, None) is None:
                raise Killed
            return step(self, *arguments)

        monkeypatch.setattr(RecipeTrainer, "training_step", killed)
        with pytest.raises(Killed):
            run("cut")
        assert len(logged(tmp_path / "cut")) == last
    monkeypatch.setattr(RecipeTrainer, "training_step", step)
    resumed = run("cut")
    timing = {"seconds", "tokens_per_second", "memory"}
    a, b = (
        [{k: v for k, v in line.items() if k not in timing} for line in logged(tmp_path / o)] for o in ("whole", "cut")
    )
    assert a == b and len(a) == 11
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert sorted(path.name for path in (tmp_path / "cut/checkpoints").iterdir()) == ["step-000008", "step-000010"]
    with pytest.raises(RecipeError, match=r"already holds.*resume=auto"):
        run("cut", resume="null")
    with pytest.raises(RecipeError, match="another seed"):
        run("cut", seed="5")
    with pytest.raises(RecipeError, match="not a checkpoint"):
        run("cut", resume=str(tmp_path))


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["checkpoints.every=1", "phases.0.learning_rate=1e38", "optimizer.clip=1e30"])
    with pytest.raises(TrainingError, match=r"checkpoints/step-00000.*learning_rate"):
        train(recipe)
    steps = logged(tmp_path / "run")
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert (tmp_path / f"run/checkpoints/step-{len(steps):06d}/progress.json").is_file()


def test_an_accuracy_ends_a_phase_or_is_missed(recipe_file: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file, ["phases.0.until_accuracy=0.0", "phases.0.steps=40"]))
    assert len(logged(tmp_path / "run")) == trainer.ACCURACY_STEPS
    with pytest.raises(TrainingError, match=r"below until_accuracy=0\.99"):
        train(load_recipe(recipe_file, ["phases.0.until_accuracy=0.99", "phases.0.steps=2"]))


def test_a_dry_run_counts_and_writes_nothing(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(recipe_file), "--dry_run=true"]) == 0
    assert "1,536 tokens" in capsys.readouterr().out  # 6 steps of 4 sequences of 64
    assert not (tmp_path / "run").exists()


def test_lora_with_norms_and_embeddings_is_merged(recipe_file: Path, tmp_path: Path, model: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(model)
    trained = train(
        load_recipe(recipe_file, ["lora.rank=4", "phases.0.learning_rate=1e-2", "model.gradient_checkpointing=true"])
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, trained.eval()(ids).logits)
    assert not (tmp_path / "run/model/adapter_config.json").exists()
    old, new = before.state_dict(), saved.state_dict()
    assert old.keys() == new.keys()
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert not torch.equal(old[name], new[name]), name
    update = new["model.layers.0.self_attn.q_proj.weight"] - old["model.layers.0.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(update, rtol=1e-3) <= 4


def test_an_adapter_that_is_not_merged_is_saved_alone(recipe_file: Path, tmp_path: Path, model: Path) -> None:
    from peft import PeftModel

    options = ["lora.rank=4", "lora.merge=false", "lora.targets=[q_proj, v_proj]", "phases.0.learning_rate=1e-2"]
    trained = train(load_recipe(recipe_file, options)).eval()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "run/model")).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=0, atol=1e-6)
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert names and all("lora" in name or "norm" in name or "embed" in name for name in names)


def test_an_adapter_of_a_patched_model_is_saved_with_its_scheme(recipe_file: Path, tmp_path: Path) -> None:
    options = ["lora.rank=4", "lora.merge=false", "scheme={name: t5}", "phases.0.steps=2", "phases.0.warmup=0"]
    trained = train(load_recipe(recipe_file, options)).eval()
    loaded = pe_patch.load_patched(tmp_path / "run/model").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=0, atol=1e-6)


def test_a_patched_checkpoint_is_trained_further_as_it_is(recipe_file: Path, tmp_path: Path) -> None:
    short = ["phases.0.steps=2", "phases.0.warmup=0"]
    first = train(load_recipe(recipe_file, [*short, "scheme={name: alibi}"]))
    second = train(load_recipe(recipe_file, [*short, f"model.source={tmp_path}/run/model", f"output={tmp_path}/more"]))
    records = [pe_patch.describe(trained).to_dict()["scheme"] for trained in (first, second)]
    assert records[0] == records[1] == "alibi"
    with pytest.raises(pe_patch.AlreadyPatchedError):
        train(load_recipe(recipe_file, [f"model.source={tmp_path}/run/model", "scheme={name: nope}"]))


def test_bfloat16(recipe_file: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file, ["mixed_precision=bf16", "phases.0.steps=2"]))
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2]


# What comes with pe_patch


def test_the_demo_model_loads_and_is_what_its_recipe_says() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    network = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    assert len(tokenizer) == network.config.vocab_size == 1152
    assert tokenizer("<k0><k63><v0><v63>")["input_ids"] == [1024, 1087, 1088, 1151]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    source = "def f(x):\n\treturn x + 1234  # é\n"
    assert tokenizer.decode(tokenizer(source)["input_ids"]) == source
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) <= 2.5e6
    assert network.config.max_position_embeddings == 256


def test_errors_are_the_librarys() -> None:
    assert issubclass(RecipeError, PePatchError) and issubclass(TrainingError, PePatchError)
