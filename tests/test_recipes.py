"""A recipe says what it means, and training does what the recipe says: counted, packed, resumed and saved exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import pe_patch
from pe_patch.errors import PePatchError
from recipes import models, trainer
from recipes.data import Corpus, PhaseData, micro_batches, pack
from recipes.finetune import load_recipe, main, train
from recipes.loss import count_targets, next_token_score
from recipes.recipe import Phase, Recipe, RecipeError, Source
from recipes.trainer import TrainingError, learning_rates

CONFIGS = sorted((Path(models.__file__).parent / "configs").glob("*.yaml"))
WORDS = "the a for while return import class if not in of and yield with as pass raise from this that".split()

PLAIN = """
output: {output}
model: {{source: {model}}}
data: {{source: {text}}}
progress: false
phases:
  - length: 64
    batch: 4
    steps: 6
    learning_rate: 1.0e-3
    warmup: 2
    mixture: {{text: {{share: 0.5}}, needles: {{share: 0.5, kind: needles, needles: [1, 3]}}}}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 documents of 5 to 120 words."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for number in range(120):
        words = rng.choice(WORDS, rng.integers(5, 120))
        (folder / f"{number:03d}.txt").write_text(f"{number} " + " ".join(words) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama that drops attention out, and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer: Any = models.train_tokenizer([path.read_text() for path in sorted(text.iterdir())], 280)
    models.add_retrieval_tokens(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate fixes the precision for the whole process; here every test is a process of its own."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def recipe_file(tmp_path: Path, text: Path, model: Path) -> Path:
    path = tmp_path / "plain.yaml"
    path.write_text(PLAIN.format(output=tmp_path / "run", model=model, text=text))
    return path


@pytest.fixture
def corpus(text: Path, model: Path) -> tuple[Corpus, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Corpus([path.read_text() for path in sorted(text.iterdir())], tokenizer), tokenizer


def logged(output: Path, event: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def phase(**options: Any) -> Phase:
    return Phase(**{"length": 64, "batch": 4, "steps": 6, "mixture": {"text": Source(share=1)}, **options})


# What a recipe may say


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
    with pytest.raises(RecipeError, match=r"one of model.source and model.config"):
        load_recipe(recipe_file, ["model.config={model_type: llama}"])
    with pytest.raises(RecipeError, match=r"tiny_yarn.yaml"):
        load_recipe("recipes/configs/no_such.yaml")
    assert main([str(recipe_file), "seeds=1"]) == 2
    assert main([str(recipe_file), "data.source=/no/such/folder"]) == 1
    with pytest.raises(PePatchError, match="/no/such/model"):
        train(load_recipe(recipe_file, ["model.source=/no/such/model"]))


# What is trained on


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_token_once_and_cuts_no_document_that_fits(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 200, 150).tolist()
    rows = pack(lengths, 64)
    seen = [(document, place) for row in rows for document, start, stop in row for place in range(start, stop)]
    assert sorted(seen) == [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    assert all(sum(stop - start for _, start, stop in row) <= 64 for row in rows)
    pieces = [document for row in rows for document, _, _ in row]
    assert all(pieces.count(document) == math.ceil(length / 64) for document, length in enumerate(lengths))
    assert len(rows) <= 1.1 * math.ceil(sum(lengths) / 64)


def test_a_packed_row(corpus: tuple[Corpus, Any]) -> None:
    data = PhaseData(*corpus, phase(), seed=(0,), boundaries=True)
    several = [row for row in (data[number] for number in range(40)) if (row["position_ids"] == 0).sum() > 2]
    assert several
    for row in several:
        starts = row["position_ids"] == 0
        assert (row["labels"][starts] == -100).all()
        is_target = row["labels"] != -100
        assert (row["labels"][is_target] == row["input_ids"][is_target]).all()
        assert (np.diff(row["position_ids"])[~starts[1:]] == 1).all()
        assert not (is_target & (row["input_ids"] == 0)).any()  # 0 is the padding


@pytest.mark.parametrize("scheme", [None, "yarn", "alibi"])
def test_documents_in_a_row_do_not_see_each_other(corpus: tuple[Corpus, Any], model: Path, scheme: str | None) -> None:
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    if scheme is not None:
        options: dict[str, Any] = {"factor": 4} if scheme == "yarn" else {}
        pe_patch.patch_model(network, scheme, **options)
    data = PhaseData(*corpus, phase(), seed=(0,), boundaries=True)
    row = next(
        row for row in (data[number] for number in range(40)) if 8 < (row["position_ids"][1:] == 0).argmax() < 50
    )
    second = int((row["position_ids"][1:] == 0).argmax()) + 1
    batch = {key: torch.from_numpy(value)[None] for key, value in row.items()}
    changed = batch["input_ids"].clone()
    changed[:, :second] = (changed[:, :second] + 1) % 280

    def logits(ids: torch.Tensor, boundaries: bool) -> torch.Tensor:
        inputs = trainer.model_inputs({**batch, "input_ids": ids}, boundaries=boundaries)
        with torch.no_grad():
            return network(**inputs).logits[:, second:]

    apart = logits(batch["input_ids"], True)
    assert torch.equal(apart, logits(changed, True))
    assert (logits(batch["input_ids"], False) - logits(changed, False)).abs().max() > 1e-3
    stop = second + int(np.append(row["position_ids"][second + 1 :] == 0, True).argmax()) + 1
    with torch.no_grad():
        alone = network(batch["input_ids"][:, second:stop]).logits
    torch.testing.assert_close(apart[:, : stop - second], alone, rtol=0, atol=1e-5)


def test_needles_are_asked_for_and_only_what_can_be_known_is_a_target(corpus: tuple[Corpus, Any]) -> None:
    vocabulary = corpus[1].get_vocab()
    keys = {vocabulary[f"<k{index}>"] for index in range(64)}
    mixture = {"needles": Source(share=1, kind="needles", needles=(3, 3))}
    data = PhaseData(*corpus, phase(mixture=mixture), seed=(0,), boundaries=True)
    orders = set()
    for number in range(30):
        row = data[number]
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        hidden = {ids[place]: ids[place + 1] for place in range(58) if ids[place] in keys}
        assert len(ids) == 64 and len(hidden) == 3
        assert [hidden[key] for key in ids[58::2]] == ids[59::2] == labels[59::2]
        assert not keys & set(labels)
        orders.add(tuple(list(hidden).index(key) for key in ids[58::2]))
    assert len(orders) > 3  # asked for in another order each time
    mixture["needles"].targets = "answers"
    assert sum(label != -100 for label in data[0]["labels"]) == 3


def test_order_is_a_function_of_seed_and_step_alone(corpus: tuple[Corpus, Any]) -> None:
    mixture = {"text": Source(share=0.5), "needles": Source(share=0.5, kind="needles", needles=(1, 3))}

    def batches(seed: int = 0, first_step: int = 0, rank: int = 0, world: int = 1, **more: Any) -> list[torch.Tensor]:
        data = PhaseData(*corpus, phase(mixture=mixture, **more), seed=(seed, 0), boundaries=True)
        steps = micro_batches(data, first_step=first_step, rank=rank, world=world)
        return [torch.cat([batch["input_ids"] for batch in step]) for step in steps]

    whole = batches()
    assert len(whole) == 6 and all(torch.equal(a, b) for a, b in zip(whole[4:], batches(first_step=4), strict=True))
    assert not torch.equal(whole[0], batches(seed=1)[0])
    for one, first, second in zip(whole, batches(rank=0, world=2), batches(rank=1, world=2), strict=True):
        assert sorted(one.tolist()) == sorted(first.tolist() + second.tolist())
    with pytest.raises(RecipeError, match="multiple of 3"):
        batches(world=3)


def test_an_epoch_has_every_row_once(corpus: tuple[Corpus, Any]) -> None:
    data = PhaseData(*corpus, phase(), seed=(0,), boundaries=False)
    epochs = [np.sort([data[e * len(data.rows) + n]["input_ids"] for n in range(len(data.rows))], 0) for e in (0, 1)]
    stream = corpus[0].stream
    rows = np.sort(stream[: len(stream) // 64 * 64].reshape(-1, 64), 0)
    assert np.array_equal(epochs[0], rows) and np.array_equal(epochs[1], rows)
    assert not np.array_equal(data[0]["input_ids"], data[len(data.rows)]["input_ids"])


# What is minimised


def test_loss_is_the_mean_over_the_targets_of_the_whole_step(recipe_file: Path, model: Path) -> None:
    overrides = ["phases.0.micro_batch=1", "phases.0.steps=1", "optimizer.clip=1e9", "phases.0.learning_rate=0"]
    recipe = load_recipe(recipe_file, overrides)
    # Dropout would make the two computations differ; the copy of the model has none.
    plain = recipe_file.parent / "plain"
    network = AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.0)
    network.save_pretrained(plain)
    AutoTokenizer.from_pretrained(model).save_pretrained(plain)
    recipe.model.source = str(plain)
    train(recipe)
    run = trainer.Trainer(recipe)
    data = PhaseData(run.corpus, run.tokenizer, recipe.phases[0], seed=(0, 0), boundaries=True)
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
    ],
)
def test_schedules(schedule: Any, more: dict[str, float], expected: list[float]) -> None:
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
    step = trainer.Trainer._step
    for last in (3, 5, 9):  # within the first phase, just before its end, and within the second
        left = iter(range(last - (len(logged(tmp_path / "cut")) // 2 * 2 if last > 3 else 0)))

        def killed(self: Any, *arguments: Any, left: Any = left) -> Any:
            if next(left, None) is None:
                raise Killed
            return step(self, *arguments)

        monkeypatch.setattr(trainer.Trainer, "_step", killed)
        with pytest.raises(Killed):
            run("cut")
        assert len(logged(tmp_path / "cut")) == last
    monkeypatch.setattr(trainer.Trainer, "_step", step)
    resumed = run("cut")
    timing = {"seconds", "tokens_per_second"}
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
    with pytest.raises(RecipeError, match="no checkpoint"):
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
    with pytest.raises(TrainingError, match=r"0\.99 was asked for"):
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_runs_two_steps(path: Path, tmp_path: Path, text: Path, model: Path) -> None:
    recipe = load_recipe(path, [f"output={tmp_path}", f"data.source={text}", "progress=false", "data.workers=0"])
    if recipe.model.config is None:
        recipe.model.source = str(model)
    else:
        recipe.model.config |= {"hidden_size": 32, "intermediate_size": 48}
        recipe.tokenizer.train_size = 280
    for stage in recipe.phases:
        stage.steps, stage.until_accuracy, stage.length, stage.batch = 2, None, min(stage.length, 256), 2
        stage.vocabulary = (280, 408) if stage.vocabulary else None
    recipe.evaluation.lengths = [64] * bool(recipe.evaluation.lengths)
    recipe.evaluation.samples = 2
    trained = train(recipe)
    steps = logged(tmp_path)
    assert len(steps) == 2 * len(recipe.phases) and all(math.isfinite(step["loss"]) for step in steps)
    assert bool(logged(tmp_path, "evaluation")) == bool(recipe.evaluation.every)
    if recipe.scheme is not None:
        assert trained.config.pe_patch["scheme"] == recipe.scheme.name
        assert json.loads((tmp_path / "model/config.json").read_text())["pe_patch"]["scheme"] == recipe.scheme.name
    content = path.read_text()
    assert f"recipes/finetune.py recipes/configs/{path.name}" in content.split("output:")[0]


def test_the_demo_model_loads_and_is_what_its_recipe_says() -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.DEMO)
    network = AutoModelForCausalLM.from_pretrained(models.DEMO)
    assert len(tokenizer) == network.config.vocab_size == 1152
    assert tokenizer("<k0><k63><v0><v63>")["input_ids"] == [1024, 1087, 1088, 1151]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    source = "def f(x):\n\treturn x + 1234  # é\n"
    assert tokenizer.decode(tokenizer(source)["input_ids"]) == source
    assert sum(path.stat().st_size for path in models.DEMO.iterdir()) <= 2.5e6
    assert network.config.max_position_embeddings == 256


def test_errors_are_the_librarys() -> None:
    assert issubclass(RecipeError, PePatchError) and issubclass(TrainingError, PePatchError)
