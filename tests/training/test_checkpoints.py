"""Checkpoints are complete or absent, in the order of their steps, and resumed exactly or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from pe_patch.errors import PePatchError
from pe_patch.training import checkpoints
from pe_patch.training.checkpoints import RECORD, complete_checkpoints, digest, find_checkpoint, prune
from pe_patch.training.guard import TrainingError
from pe_patch.training.recipe import Recipe, RecipeError
from pe_patch.training.run import load_recipe, main, train
from pe_patch.training.trainer import RecipeTrainer

from .cases import logged

EVERY = ["phases.0.warmup=0", "checkpoints={every: 2, keep: 3}", "trackers=[]"]


def run(recipe_file: Path, output: Path, *more: str) -> Any:
    return train(load_recipe(recipe_file, [*EVERY, f"output={output}", *more]))


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model/model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path, model: Path) -> Path:
    """A run of six steps with checkpoints of steps 2, 4 and 6. The model drops out, so that random states matter."""
    from .conftest import PLAIN

    folder = tmp_path_factory.mktemp("whole")
    (folder / "plain.yaml").write_text(PLAIN.format(output="runs/never", model=model, text=text))
    run(folder / "plain.yaml", folder / "run")
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that stopped after step 5."""
    output = tmp_path / "run"
    shutil.copytree(whole / "run", output)
    shutil.rmtree(output / "checkpoints/step-000006")
    shutil.rmtree(output / "model")
    return output


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


FILES = (RECORD, "weights.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("damage", [spoil, Path.unlink], ids=["truncated", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    name: str, damage: Any, whole: Path, copy: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(copy / "checkpoints/step-000004" / name)
    if damage is spoil:
        with pytest.raises(RecipeError, match=name):
            run(whole / "plain.yaml", copy, f"resume={copy}/checkpoints/step-000004")
    run(whole / "plain.yaml", copy, "resume=auto")
    said = capsys.readouterr().err
    if not (name == RECORD and damage is Path.unlink):  # without it, the folder was never complete
        assert name in said and "step-000002 instead" in said
    assert [line["step"] for line in logged(copy)] == [1, 2, 3, 4, 5, 6]
    ours, theirs = weights(copy), weights(whole / "run")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("key", "value"),
    [("files", []), ("facts", "x"), ("recipe", None), ("progress", {"step": 4, "phase": []}),
     ("progress", {"step": 4, "lowest": {}}), ("progress", {"step": 4, "losses": [None]}),
     ("progress", {"step": 4, "recent": 3}), ("progress", {"step": True})],
)  # fmt: skip
def test_a_record_with_a_value_of_another_type_is_damaged(key: str, value: Any, copy: Path) -> None:
    file = copy / "checkpoints/step-000004" / RECORD
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(checkpoints.DamagedCheckpoint, match=r"progress.json cannot be read"):
        checkpoints.read_checkpoint(file.parent)


@pytest.mark.parametrize(
    "line", ["null", "[]", '{"event": "step"}', '{"step": "1", "event": "step"}', "{", "[" * 100_000]
)
def test_a_damaged_line_of_a_log_is_named(line: str, whole: Path, copy: Path) -> None:
    log = copy / "log.jsonl"
    log.write_text(f"{line}\n{log.read_text()}")
    with pytest.raises(PePatchError, match=r"log.jsonl, line 1 is damaged .* Delete the line and rerun"):
        run(whole / "plain.yaml", copy, "resume=auto")


def test_files_of_another_checkpoint_are_noticed(whole: Path, copy: Path) -> None:
    for name in ("optimizer.pt", "weights.safetensors", "rng_state.pth"):
        newest = copy / "checkpoints/step-000004"
        kept = (newest / name).read_bytes()
        shutil.copy(copy / "checkpoints/step-000002" / name, newest / name)
        assert len(kept) == (newest / name).stat().st_size
        with pytest.raises(RecipeError, match=f"{name} is not as it was written"):
            run(whole / "plain.yaml", copy, f"resume={newest}")
        (newest / name).write_bytes(kept)
    for path in complete_checkpoints(copy / "checkpoints"):
        spoil(path / "optimizer.pt")
    with pytest.raises(RecipeError, match="no checkpoint is intact"):
        run(whole / "plain.yaml", copy, "resume=auto")


def test_a_planted_pickle_runs_nothing(whole: Path, copy: Path, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    newest = copy / "checkpoints/step-000004"
    for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt"):
        kept, before = (newest / name).read_bytes(), (newest / RECORD).read_text()
        torch.save({"cpu": Planted()}, newest / name)
        record = json.loads(before)
        record["files"][name] = digest(newest / name)
        (newest / RECORD).write_text(json.dumps(record))
        with pytest.raises(pickle.UnpicklingError):
            run(whole / "plain.yaml", copy, f"resume={newest}")
        (newest / name).write_bytes(kept)
        (newest / RECORD).write_text(before)
    assert not (tmp_path / "ran").exists()


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999950, 1000000, 42):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        record = {"progress": {"step": step}, "files": {}, "recipe": {}, "facts": {}}
        (folder / RECORD).write_text(json.dumps(record))
    (tmp_path / "step-000099").mkdir()  # never completed
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000042", "step-999950", "step-1000000"]
    newest = find_checkpoint(Recipe(output="x", resume="auto"), tmp_path)
    assert newest is not None and newest.name == "step-1000000"
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999950"]


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    synchronise, rename = checkpoints._synchronise, Path.rename

    def noted(path: Path) -> None:
        events.append(("flush", path.name))
        synchronise(path)

    def renamed(self: Path, target: Any) -> Any:
        if Path(target).name.startswith("step-"):
            events.append(("rename", Path(target).name))
        return rename(self, target)

    monkeypatch.setattr(checkpoints, "_synchronise", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    run(recipe_file, tmp_path / "run", "phases.0.steps=2")
    at = events.index(("rename", "step-000002"))
    files = {path.name for path in (tmp_path / "run/checkpoints/step-000002").rglob("*")}
    assert set(FILES) <= files and files <= {name for kind, name in events[:at] if kind == "flush"}
    assert ("flush", "checkpoints") in events[at:]


def test_what_changed_in_the_recipe_is_listed(whole: Path, copy: Path) -> None:
    changes = ["phases.0.steps=9", "optimizer.clip=2.0", "seed=3"]
    with pytest.raises(RecipeError) as caught:
        run(whole / "plain.yaml", copy, "resume=auto", *changes)
    for part in ("another phases, optimizer, seed", "phases.0.steps: 6 -> 9", "optimizer.clip: 1.0 -> 2.0", "seed: 0"):
        assert part in str(caught.value)


def test_other_processes_cannot_go_on_exactly(whole: Path, copy: Path) -> None:
    for path in complete_checkpoints(copy / "checkpoints"):
        record = json.loads((path / RECORD).read_text())
        record["facts"]["processes"] = 2
        (path / RECORD).write_text(json.dumps(record))
    with pytest.raises(RecipeError, match="processes: 2 -> 1"):
        run(whole / "plain.yaml", copy, "resume=auto")


def test_an_earlier_checkpoint_leaves_later_ones_aside(whole: Path, copy: Path, monkeypatch: Any) -> None:
    """The steps after it are taken again, and `auto` no longer sees what was before."""
    assert main([str(whole / "plain.yaml"), *EVERY, f"output={copy}", f"resume={copy}/checkpoints/step-000002",
                 "optimizer.clip=1.0"]) == 0  # fmt: skip
    kept = copy / "checkpoints/superseded/step-000004"
    assert (kept / RECORD).is_file()
    names = [path.name for path in complete_checkpoints(copy / "checkpoints")]
    assert names == ["step-000002", "step-000004", "step-000006"]
    assert [line["step"] for line in logged(copy)] == [1, 2, 3, 4, 5, 6]
    ours, theirs = weights(copy), weights(whole / "run")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_log_whose_last_line_was_cut_is_continued(whole: Path, copy: Path) -> None:
    log = copy / "log.jsonl"
    log.write_text(log.read_text()[:-40])
    run(whole / "plain.yaml", copy, "resume=auto")
    assert [line["step"] for line in logged(copy)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_killed_after_its_last_step_logs_its_end_once(whole: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    before = [line["event"] for line in map(json.loads, (output / "log.jsonl").read_text().splitlines())]
    run(whole / "plain.yaml", output, "resume=auto")
    again = [line["event"] for line in map(json.loads, (output / "log.jsonl").read_text().splitlines())]
    assert again == before and before[-1] == "reloaded" and before.count("reloaded") == 1


def test_weights_that_are_no_numbers_are_never_saved(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the step is still finite: only its update is not."""
    step = RecipeTrainer.training_step

    def breaks(self: Any, *arguments: Any) -> Any:
        result = step(self, *arguments)
        if self.progress.step == 3:
            self.optimizer.param_groups[0]["lr"] = float("nan")
        return result

    monkeypatch.setattr(RecipeTrainer, "training_step", breaks)
    for output, every in (("a", 2), ("b", 4)):
        with pytest.raises(TrainingError, match=r"Step 4: after this step some weights are not finite") as caught:
            run(recipe_file, tmp_path / output, "phases.0.steps=4", f"checkpoints.every={every}")
        good = "step-000002" if every == 2 else "There is no checkpoint yet"
        assert good in str(caught.value) and not (tmp_path / output / "model").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_leaves_the_checkpoint_before(
    error: Exception, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    save = torch.save

    def full(content: Any, path: Any, *arguments: Any, **named: Any) -> None:
        save(content, path, *arguments, **named)
        if "checkpoint-4" in str(path):
            raise error

    with monkeypatch.context() as disk:
        disk.setattr(torch, "save", full)
        assert main([str(recipe_file), *EVERY, f"output={tmp_path}/run"]) == 1
    said = capsys.readouterr().err
    assert "checkpoint of step 4 could not be written" in said and "step-000002" in said and "Traceback" not in said
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]
    run(recipe_file, tmp_path / "run", "resume=auto")
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_second_run_into_one_folder_is_refused(whole: Path, copy: Path) -> None:
    before = sorted(copy.rglob("*"))
    with FileLock(copy / ".lock"):
        with pytest.raises(RecipeError, match=r"another run is writing to .*another output"):
            run(whole / "plain.yaml", copy, "resume=auto")
    assert sorted(copy.rglob("*")) == before
    run(whole / "plain.yaml", copy, "resume=auto")
