"""What a recipe does beside plain training when it heals a model: a teacher, and tokens to calibrate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import pe_patch
from pe_patch.training import loss, models, trainer
from pe_patch.training.data import PhaseData
from pe_patch.training.data.sequences import LEARN_FROM
from pe_patch.training.recipe import RecipeError
from pe_patch.training.run import Run, load_recipe, train

from .cases import logged

NOPE = ["scheme={name: nope}", "distill={}"]


def whole(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """PyTorch's own divergence, in float64, of everything at once."""
    wanted, ours = ((logits.double() / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(ours, wanted, reduction="sum", log_target=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabulary", [None, (5, 40)])
def test_the_divergence_and_its_gradient_are_pytorchs_on_whole_logits(
    monkeypatch: pytest.MonkeyPatch, temperature: float, vocabulary: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 20, 50, generator=generator) for _ in range(2))
    labels = torch.randint(5, 40, (2, 20), generator=generator)
    labels[:, ::4] = -100
    student.requires_grad_()
    chosen = labels[:, 1:] != -100
    score = loss.next_token_score(
        student, labels, vocabulary=vocabulary, accuracy=False, teacher=teacher[:, :-1][chosen],
        temperature=temperature,
    )  # fmt: skip
    columns = slice(*(vocabulary or (None,)))
    expected = whole(teacher[:, :-1][chosen][:, columns], student[:, :-1][chosen][:, columns], temperature)
    torch.testing.assert_close(score.divergence.double(), expected, rtol=1e-6, atol=0)
    (ours,), (theirs,) = (torch.autograd.grad(value, student) for value in (score.divergence, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    alone = loss.next_token_score(student, labels, vocabulary=vocabulary, accuracy=False)
    assert torch.equal(score.loss, alone.loss) and float(alone.divergence) == 0
    same = loss.next_token_score(
        student, labels, vocabulary=None, accuracy=False, teacher=student.detach()[:, :-1][chosen]
    )
    assert float(same.divergence.detach()) == 0
    none = loss.next_token_score(
        student, torch.full_like(labels, -100), vocabulary=None, accuracy=False, teacher=teacher[:0, 0]
    )
    assert float(none.divergence) == 0


def test_the_teacher_is_the_model_before_the_patch_and_its_divergence_a_mean_over_targets(
    recipe_file: Path, tmp_path: Path, model: Path
) -> None:
    network = AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(12 if parameter.ndim > 1 else 1)
    network.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "plain")
    options = [
        f"model.source={tmp_path}/plain", "phases.0.steps=1", "phases.0.micro_batch=1",
        "distill={weight: 3, temperature: 2}", "scheme={name: nope}", "optimizer.clip=1e9",
    ]  # fmt: skip
    recipe = load_recipe(recipe_file, options)
    run = Run(recipe)
    data = PhaseData(run.corpora, run.tokenizer, recipe.phases[0], seed=(0, 0), boundaries=True)
    student = pe_patch.patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), "nope").double()
    network, count, total, text = network.double().eval(), 0, torch.zeros(()), torch.zeros(())
    for number in range(4):
        batch = {key: torch.from_numpy(value)[None] for key, value in data[number].items()}
        inputs = trainer.model_inputs(batch, boundaries=True)
        chosen, logits = batch["labels"][0, 1:] != -100, student(**inputs).logits[0, :-1]
        with torch.no_grad():
            taught = network(**inputs).logits[0, :-1]
        total = total + whole(taught[chosen], logits[chosen], 2.0)
        text = text + F.cross_entropy(logits[chosen], batch["labels"][0, 1:][chosen], reduction="sum")
        count += int(chosen.sum())
    ((text + 3 * total) / count).backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    run.run()
    (step,) = logged(tmp_path / "run")
    assert step["divergence"] == pytest.approx(float(total) / count, rel=1e-5) and step["divergence"] > 1e-2
    assert step["loss"] == pytest.approx(float(text) / count, rel=1e-5)
    assert step["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in run.teacher.parameters()) and not run.teacher.training


def test_with_pose_the_teacher_reads_consecutive_positions_and_only_the_rows_that_learn_from_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = (
        "phases.0.mixture={text: {share: 1, learn_from: teacher}, "
        "facts: {share: 1, kind: needles, needles: [1, 2], targets: answers, learn_from: text}}"
    )
    options = ["distill={weight: 2}", "phases.0.pose={target: 4000}", mixture, "phases.0.steps=4", "model.source=demo"]
    run, seen = Run(load_recipe(recipe_file, options)), []
    run.teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    data = PhaseData(run.corpora, run.tokenizer, run.recipe.phases[0], seed=(0, 0), boundaries=True)
    items = [data[number] for number in range(4 * run.recipe.phases[0].batch)]
    text = {tuple(item["input_ids"]) for item in items if item["learn_from"] != LEARN_FROM.index("text")}
    assert 0 < len(text) < len(items) and max(item["position_ids"].max() for item in items) > 1000
    run.run()
    seen = [inputs for inputs in seen if inputs["input_ids"].shape[1] == run.recipe.phases[0].length]
    read = {tuple(row.tolist()) for inputs in seen for row in inputs["input_ids"]}
    assert text <= read and not read & ({tuple(item["input_ids"]) for item in items} - text)
    length = run.recipe.phases[0].length
    assert all((inputs["position_ids"] == torch.arange(length)).all() for inputs in seen)
    assert all(inputs["attention_mask"].all() for inputs in seen)
    lines = logged(tmp_path / "run")
    assert all(line["divergence"] >= 0 for line in lines if "divergence" in line)
    assert any("divergence" in line for line in lines)


@pytest.mark.parametrize("lora", [[], ["lora={rank: 8, embeddings: false}"]])
def test_a_patched_model_comes_nearer_to_its_teacher(recipe_file: Path, tmp_path: Path, lora: list[str]) -> None:
    phase = ["phases.0.steps=20", "phases.0.warmup=5", "phases.0.mixture={text: {share: 1}}"]
    ended = []
    for weight in (20, 0):
        output = [f"output={tmp_path}/{weight}", f"distill.weight={weight}"]
        train(load_recipe(recipe_file, ["model.source=demo", *NOPE, *lora, *phase, *output]))
        values = [line["divergence"] for line in logged(tmp_path / str(weight))]
        ended.append(sum(values[-3:]))
    assert ended[0] < 0.7 * sum(values[:2]) * 3 / 2 and ended[0] < 0.3 * ended[1]


def test_a_resumed_run_has_the_same_teacher(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [*NOPE, "checkpoints.every=2", "resume=auto"]
    whole_run = train(load_recipe(recipe_file, [*more, f"output={tmp_path}/whole"]))
    cut = load_recipe(recipe_file, [*more, f"output={tmp_path}/cut"])
    steps = iter(range(3))
    step = trainer.RecipeTrainer.training_step

    def stopped(*arguments: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as cutting:
        cutting.setattr(trainer.RecipeTrainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            Run(cut).run()
    resumed = train(cut)
    seen = [[line["divergence"] for line in logged(tmp_path / output)] for output in ("whole", "cut")]
    assert seen[0] == seen[1] and len(seen[0]) == 6
    assert all(torch.equal(x, y) for x, y in zip(whole_run.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(RecipeError, match="another distill"):
        train(load_recipe(recipe_file, [*more, f"output={tmp_path}/cut", "distill.weight=2"]))


def test_what_cannot_be_distilled_or_calibrated_is_named(recipe_file: Path) -> None:
    fresh = ["model={source: null, config: {model_type: llama}}", "tokenizer.train_size=280"]
    for options, said in (
        ([*fresh, "distill={}"], r"distill\.source"),
        (["distill.temperature=0"], "temperature"),
        (["distill.weight=-1"], "weight"),
        (["phases.0.mixture={text: {share: 1, learn_from: teacher}}"], r"mixture\.text\.learn_from.*distill"),
        (["scheme={name: mla, calibration_tokens: 0}"], "calibration_tokens"),
        (["scheme={name: mla, calibration_tokens: 9, options: {calibration: [a]}}"], r"options\.calibration"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe(recipe_file, options)
    with pytest.raises(RecipeError, match="1152 tokens and the model has 408"):
        train(load_recipe(recipe_file, ["distill={source: demo}"]))


def test_a_scheme_is_calibrated_on_the_first_sequences(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def patch_model(model: Any, scheme: str, **options: Any) -> Any:
        seen.update(options, scheme=scheme, model=model)
        return model

    monkeypatch.setattr(models, "patch_model", patch_model)
    recipe = load_recipe(recipe_file, ["scheme={name: mla, calibration_tokens: 200, options: {kv_rank: 8}}"])
    run = Run(recipe)
    rows = seen["calibration"]
    assert seen["scheme"] == "mla" and seen["kv_rank"] == 8 and seen["model"].training is False
    assert sum(map(len, rows)) == 200
    data = PhaseData(run.corpora, run.tokenizer, recipe.phases[0], seed=(0, 0), boundaries=True)
    for number, row in enumerate(rows):
        item = data[number]
        assert row == item["input_ids"][: len(row)].tolist()
        if number < len(rows) - 1:
            assert (item["labels"][len(row) :] == -100).all() and item["labels"][len(row) - 1] != -100


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, kv_a_proj_with_mqa, k_b_proj, v_b_proj]"])
@pytest.mark.parametrize("keep", ["true", "false"])
def test_adapters_go_on_the_projections_of_a_conversion_and_not_on_what_it_replaced(
    recipe_file: Path, tmp_path: Path, targets: str, keep: str
) -> None:
    scheme = f"scheme={{name: mla, calibration_tokens: 200, options: {{kv_rank: 8, keep_original: {keep}}}}}"
    more = ["lora={rank: 2}", f"lora.targets={targets}", "phases.0.steps=2", "phases.0.learning_rate=1e-2"]
    recipe = load_recipe(recipe_file, [scheme, "distill={}", *more])
    run = Run(recipe)
    adapted = {name.split(".lora_A")[0] for name, _ in run.model.named_parameters() if "lora_A" in name}
    latent = {name for name in adapted if ".self_attn.mla." in name}
    assert {name.rpartition(".")[2] for name in latent} == {"q_proj", "kv_a_proj_with_mqa", "k_b_proj", "v_b_proj"}
    assert not any("original" in name for name in adapted)
    assert (adapted == latent) == (targets != "all-linear")
    trained = run.run().eval()
    loaded = pe_patch.load_patched(tmp_path / "run/model").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained(ids).logits)
