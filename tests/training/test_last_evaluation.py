"""The model is saved before its last evaluation, and problems with either are found before training."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pe_patch
from pe_patch import evaluation as measuring
from pe_patch.cli import main as cli
from pe_patch.data import text
from pe_patch.training import output_checks
from pe_patch.training.guard import TERMINATED_EXIT_CODE, PostTrainingError
from pe_patch.training.measure import Measure
from pe_patch.training.recipe import RecipeError
from pe_patch.training.run import Run, load_recipe, main, train
from pe_patch.training.trainer import RecipeTrainer

from .cases import logged

YARN = "scheme={name: yarn, options: {factor: 4}}"
SMALL = "evaluation={every: 4, tasks: [perplexity, passkey], lengths: [64, 128], samples: 2}"
PLAIN = ["phases.0.steps=4", SMALL, "trackers=[]"]
SHORT = [*PLAIN, YARN]


def no_step(self: Any, *_: Any) -> None:
    pytest.fail("a step was taken before the evaluation was checked")


# What the evaluation needs is there before the first step

MISSING: dict[str, tuple[list[str], list[str]]] = {
    "a misspelt task": (["evaluation.tasks=[needel]"], ["needel", "'needle'"]),
    "another one": (["evaluation.tasks=[perplexity, passkeys]"], ["'passkey'"]),
    "a length beyond the text": (["evaluation.lengths=[64, 900000]"], ["tokens", "900000"]),
    "no room for the needles": (["evaluation.tasks=[needle]", "evaluation.lengths=[64, 16]"], ["16"]),
    "LongBench's files": (["evaluation.tasks=[longbench_hotpotqa]"], ["hotpotqa"]),
    "RULER's files": (["evaluation.tasks=[ruler_qa_squad]", "evaluation.lengths=[2000]"], ["squad"]),
    "a wording that cannot ask it": (["evaluation.tasks=[heat_map]"], ["wording", "needle_single"]),
    "no samples": (["evaluation.samples=0"], ["samples"]),
    "no positions": (
        ["scheme={name: learned, options: {max_positions: 100}}", "evaluation.lengths=[64, 128]"], ["128", "100"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("missing", MISSING)
def test_an_evaluation_that_cannot_run_is_found_before_the_first_step(
    missing: str, dry: bool, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(RecipeTrainer, "training_step", no_step)
    told, said = MISSING[missing]
    assert main([str(recipe_file), *PLAIN, *told, f"dry_run={str(dry).lower()}"]) == 2
    err = capsys.readouterr().err
    assert "evaluation" in err and all(part.lower() in err.lower() for part in said), err
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def test_an_empty_test_split_is_found_before_the_first_step(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files belong to the training split."""
    monkeypatch.setattr(RecipeTrainer, "training_step", no_step)
    folder = tmp_path / "two"
    folder.mkdir()
    number = 0
    while len(list(folder.iterdir())) < 2:
        number += 1
        shutil.rmtree(folder)
        folder.mkdir()
        for name in (f"a{number}.txt", f"b{number}.txt"):
            (folder / name).write_text("the a for while return import class if not in of and yield " * 40)
        try:
            text.load_documents(str(folder), split="test")
        except pe_patch.PePatchError:
            break
        shutil.rmtree(folder)
        folder.mkdir()
    for dry in ("true", "false"):
        with pytest.raises(RecipeError, match=r"evaluation: cannot run: .*split"):
            train(load_recipe(recipe_file, [*SHORT, f"data.source={folder}", f"dry_run={dry}"]))


def test_every_process_that_measures_reads_the_text_once(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    inner = Run._documents

    def counted(self: Any, split: Any) -> Any:
        reads.append(split)
        return inner(self, split)

    monkeypatch.setattr(Run, "_documents", counted)
    train(load_recipe(recipe_file, [*SHORT, "evaluation.every=1", "evaluation.before=true"]))
    assert reads == ["test"]


def test_the_rehearsal_asks_the_questions_and_runs_no_model(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs of `evaluate` give no rows, write nothing, and call no model."""
    from ..evaluation_doubles import make_text, make_tokenizer, tiny_llama

    tokenizer = make_tokenizer()
    model = tiny_llama(len(tokenizer))

    def run(*_: Any, **__: Any) -> None:
        pytest.fail("the model was run")

    monkeypatch.setattr(type(model), "forward", run)
    output = recipe_file.parent / "nothing"
    found = measuring.evaluate(
        model, tokenizer, ["perplexity", "needle", "needle_multi_query", "niah_single_1", "key_value"], [512],
        samples=2, beyond_window=True, text=[make_text(4000)], output=output, dry_run=True,
    )  # fmt: skip
    assert found.rows == [] and found.config["lengths"] == [512] and not output.exists()


# The last evaluation cannot take the model with it


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def interrupted() -> None:
    raise KeyboardInterrupt


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):  # the handler runs between two instructions
        pass
    pytest.fail("SIGTERM was swallowed")


def wrong() -> None:
    raise ValueError("max() arg is an empty sequence")


STOPS = {"memory": (out_of_memory, 1, "out of memory"), "error": (wrong, 1, "max() arg"),
         "Ctrl-C": (interrupted, 130, "interrupted"),
         "SIGTERM": (terminated, TERMINATED_EXIT_CODE, "SIGTERM")}  # fmt: skip


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, stop: Callable[[], None]) -> list[bool]:
    """Make the evaluation with this number fail, and record whether the model was saved at each evaluation."""
    inner, calls = Measure._run_evaluation, []

    def evaluate(self: Any, *args: Any, dry_run: bool = False) -> Any:
        if not dry_run:
            calls.append(True)
            if len(calls) == number:
                stop()
        return inner(self, *args, dry_run=dry_run)

    monkeypatch.setattr(Measure, "_run_evaluation", evaluate)
    return calls


@pytest.mark.parametrize("lora", [[], ["lora.rank=2"]], ids=["full", "lora"])
@pytest.mark.parametrize("name", STOPS)
def test_a_last_evaluation_that_fails_leaves_the_saved_model_and_says_so(
    name: str, lora: list[str], recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stop, code, said = STOPS[name]
    stop_at(monkeypatch, 1, stop)
    assert main([str(recipe_file), *SHORT, *lora, "export=[transformers]"]) == code
    err = " ".join(capsys.readouterr().err.split())
    folder = tmp_path / "run/model"
    assert (
        f"saved in {folder}" in err and said in err and f"pe-patch evaluate {folder} --task perplexity passkey" in err
    )
    assert "Traceback" not in err and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    card = (folder / "README.md").read_text()
    assert "4 steps" in card and "## Scores" not in card
    ids = torch.arange(60)[None]
    with torch.no_grad():
        ours = pe_patch.load_patched(folder).eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/transformers").eval()(ids).logits
    assert torch.equal(ours, plain)
    if name == "error" and not lora:  # the command that was printed works
        words = err[err.index("pe-patch evaluate") :].split(" (")[0].split()[1:]
        monkeypatch.undo()
        assert cli.main([*words, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert {row["length"] for row in rows} == {64, 128} and {"perplexity", "passkey"} == {
            row["task"] for row in rows
        }


def test_the_model_is_on_disk_when_it_is_measured_and_the_card_has_the_scores(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations run during training, but the one after the last step runs after the model is saved."""
    there: list[bool] = []
    inner = Measure._run_evaluation

    def evaluate(self: Any, *args: Any, dry_run: bool = False) -> Any:
        if not dry_run:
            there.append((tmp_path / "run/model/model.safetensors").is_file())
        return inner(self, *args, dry_run=dry_run)

    monkeypatch.setattr(Measure, "_run_evaluation", evaluate)
    trained = train(load_recipe(recipe_file, [*SHORT, "evaluation.every=2", "evaluation.before=true"]))
    assert there == [False, False, True]
    rows = logged(tmp_path / "run", "evaluation")
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows) and {row["step"] for row in rows} == {
        0,
        2,
        4,
    }
    last = next(row for row in rows if row["step"] == 4 and row["task"] == "perplexity" and row["length"] == 128)
    assert f"{last['score']:.3f}" in (tmp_path / "run/model/README.md").read_text()
    # what was measured is what was saved
    found = measuring.evaluate(
        pe_patch.load_patched(tmp_path / "run/model").eval(), trainer_tokenizer(tmp_path), "perplexity", [64, 128],
        samples=2, text=held_out(recipe_file), beyond_window=True, progress=False,
    )  # fmt: skip
    same = next(row for row in found.rows if row.measure == last["measure"] and row.length == 128)
    assert same.score == pytest.approx(last["score"], rel=1e-6)
    assert trained.config.pe_patch["scheme"] == "yarn"


def trainer_tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tmp_path / "run/model")


def held_out(recipe_file: Path) -> list[str]:
    from pe_patch.data.text import load_documents

    return load_documents(load_recipe(recipe_file).data.source, split="test")


def test_an_evaluation_on_the_way_that_fails_leaves_a_checkpoint_to_resume_from(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    told = [*SHORT, "evaluation.every=2"]
    with monkeypatch.context() as broken:
        stop_at(broken, 1, out_of_memory)
        assert main([str(recipe_file), *told]) == 1
    err = capsys.readouterr().err
    assert "step 2" in err and "out of memory" in err and "resume=auto" in err and "Traceback" not in err
    assert (tmp_path / "run/checkpoints/step-000002/progress.json").is_file()
    assert main([str(recipe_file), *told, "resume=auto", "evaluation.every=null"]) == 0
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_scheme_without_training_is_saved_before_it_is_measured(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _, _ = recipe_file.read_text().partition("phases:")
    recipe_file.write_text(before + "phases: []\n")
    stop_at(monkeypatch, 1, out_of_memory)
    scheme = "scheme={name: self_extend, options: {factor: 4}}"
    with pytest.raises(PostTrainingError, match="saved in"):
        train(load_recipe(recipe_file, [scheme, SMALL]))
    assert pe_patch.load_patched(tmp_path / "run/model").config.pe_patch["scheme"] == "self_extend"


def test_sigterm_while_the_model_is_saved_waits_until_it_is(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from transformers import LlamaForCausalLM

    inner = LlamaForCausalLM.save_pretrained

    def save(self: Any, folder: Any, **given: Any) -> Any:
        if given.get("state_dict") is None:  # not the check beforehand
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, folder, **given)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    assert main([str(recipe_file), *SHORT]) == TERMINATED_EXIT_CODE
    assert "saved in" in capsys.readouterr().err
    assert (tmp_path / "run/model/model.safetensors").is_file() and not logged(tmp_path / "run", "evaluation")


# Saving, too, is known to work before the first step


@pytest.mark.parametrize("dry", ["true", "false"])
def test_a_model_that_cannot_be_saved_is_not_trained(
    dry: str, recipe_file: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Phi-3 is an example: its config rejects some rotary types on output_checks."""
    monkeypatch.setattr(RecipeTrainer, "training_step", no_step)
    from transformers import LlamaConfig

    inner = LlamaConfig.save_pretrained

    def strict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.rope_parameters["rope_type"] not in ("default", "longrope"):
            raise ValueError(f"rope_type must be longrope, got {self.rope_parameters['rope_type']}")
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(LlamaConfig, "save_pretrained", strict)
    assert main([str(recipe_file), "phases.0.steps=2", YARN, f"dry_run={dry}"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "can be trained, but cannot be saved" in err and "rope_type must be longrope" in err and "'yarn'" in err
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written_is_refused_before_the_first_step(
    recipe_file: Path, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecipeTrainer, "training_step", no_step)
    file, foreign = tmp_path / "file", tmp_path / "foreign"
    file.write_text("")
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("my only copy")
    (tmp_path / "half/checkpoints").mkdir(parents=True)
    (tmp_path / "half/model").write_text("")
    cases = {
        str(file): "is a file",
        str(file / "deeper"): "is a file",
        str(tmp_path / "half"): "is a file",
        str(foreign): "overwrite=true",
        "/proc/nothing/run": "cannot write to",
        str(model): "overwrite=true",
        str(text / "run"): "Inputs are never overwritten",
    }
    for output, said in cases.items():
        for dry in ("true", "false"):
            with pytest.raises(RecipeError, match=said):
                train(load_recipe(recipe_file, [*SHORT, f"output={output}", f"dry_run={dry}"]))
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"] and not (text / "run").exists()


def test_the_model_that_training_starts_from_is_not_replaced(recipe_file: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file, ["phases.0.steps=2"]))
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    for output in (tmp_path / "run", tmp_path / "run/model"):
        with pytest.raises(RecipeError, match=r"Inputs are never overwritten|not an empty folder"):
            train(
                load_recipe(recipe_file, ["phases.0.steps=2", f"model.source={tmp_path}/run/model", f"output={output}"])
            )
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dry", ["true", "false"])
def test_a_full_disk_is_found_before_the_first_step(
    dry: str, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random Llama has 30,000 weights or so: one copy fits, three checkpoints of it with its moments do not."""
    weights = 4 * sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(
        load_recipe(recipe_file).model.source).parameters())  # fmt: skip
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(output_checks.shutil, "disk_usage", lambda path: usage(10 * weights, 5 * weights, 5 * weights))
    train(load_recipe(recipe_file, ["phases.0.steps=1", f"dry_run={dry}", "export=[]"]))
    told = ["phases.0.steps=1", "checkpoints={every: 1, keep: 1}", f"dry_run={dry}", f"output={recipe_file.parent}/b"]
    with pytest.raises(RecipeError, match=r"free, but the run needs .*2 checkpoints"):  # 1 + 2 * 3 copies
        train(load_recipe(recipe_file, told))


def test_half_a_model_never_takes_the_place_of_a_whole_one(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(load_recipe(recipe_file, ["phases.0.steps=1"]))
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    from transformers import LlamaForCausalLM

    inner = LlamaForCausalLM.save_pretrained

    def full(self: Any, folder: Any, **given: Any) -> Any:
        inner(self, folder, **given)
        if given.get("state_dict") is None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        train(load_recipe(recipe_file, ["phases.0.steps=2"]))
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".model")]
