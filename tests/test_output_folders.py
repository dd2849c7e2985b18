"""No command overwrites its input, writes into a folder with other content, or leaves an incomplete folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pe_patch import evaluate, export, patch_model
from pe_patch.checkpoints import folders
from pe_patch.checkpoints.folders import EXPORT, check_output, replaced_content
from pe_patch.cli import main as cli
from pe_patch.convert.measure import save
from pe_patch.errors import OutputError, PePatchError
from pe_patch.evaluation import write_report
from pe_patch.evaluation.results import Results, Row

from .evaluation_doubles import make_text, make_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    tokenizer = make_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "text.txt").write_text(make_text(2000))
    return tmp_path / "text"


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Any:
    def call(*words: Any) -> tuple[int, str]:
        code = cli.main([str(word) for word in words])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return code, " ".join(err.split())

    return call


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def command(name: str, model: Any, output: Any, text: Path) -> list[Any]:
    """The words that make a command read `model` and write to `output`, as little of it as there is."""
    small = ["--text", text / "text.txt", "--samples", 1]
    return {
        "export": ["export", model, output, "--scheme", "yarn", "--factor", 4],
        "convert": ["convert", model, "--to", "mla", "--kv-rank", 8, "--no-retrieval", "--calibration",
                    text / "text.txt", "--calibration-tokens", 64, "--length", 32, "--out", output],
        "sweep": ["convert", model, "--to", "mla", "--sweep", "--method", "svd", "--cache-ratio", "1/2",
                  "--calibration", text / "text.txt", "--length", 32, "--samples", 1, "--output", output],
        "evaluate": ["evaluate", model, "--task", "passkey", "--length", 64, "--depth", 0.5, *small,
                     "--output", output],
        "compare": ["compare", model, "--scheme", "yarn", "--factor", 2, "--task", "passkey", "--length", 64,
                    "--workers", 0, *small, "--output", output],
        "search": ["search", model, "--length", 128, "--method", "longrope", "--population", 4, "--parents", 4,
                   "--iterations", 0, "--mutations", 1, "--crossovers", 1, *small, "--output", output],
    }[name]  # fmt: skip


COMMANDS = ("export", "convert", "sweep", "evaluate", "compare", "search")
every = pytest.mark.parametrize("name", COMMANDS)


@every
def test_no_command_writes_onto_its_input(name: str, run: Any, model: Path, text: Path, tmp_path: Path) -> None:
    """The input may be given by its name, a relative path, a link, a subfolder or a parent, also with --overwrite."""
    link, inner = tmp_path / "link", tmp_path / "inner"
    link.symlink_to(model)
    inner.symlink_to(model.parent)
    before = content(model)
    roundabout = Path(os.path.relpath(model.parent)) / "text" / ".." / model.name
    for output in (model, roundabout, link, inner / "model", model / "new", model.parent):
        code, err = run(*command(name, model, output, text), "--overwrite")
        assert code == 1 and "Inputs are never overwritten" in err, (output, err)
    code, _ = run(*command(name, link, model, text))
    assert code == 1
    assert content(model) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "link", "model", "text"]


@every
def test_no_command_writes_into_a_folder_with_something_else(
    name: str, run: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    """The folder holds another model or notes, or is a file. Missing parents are not created either."""
    other, notes = tmp_path / "other", tmp_path / "notes"
    shutil.copytree(model, other)
    notes.mkdir()
    (notes / "thesis.txt").write_text("my only copy")
    for folder in (other, notes):
        before = content(folder)
        code, err = run(*command(name, model, folder, text))
        assert code == 1 and "not an empty folder" in err and "--overwrite" in err, err
        assert content(folder) == before
    code, err = run(*command(name, model, notes / "thesis.txt", text))
    assert code == 1 and "is a file" in err
    code, err = run(*command(name, model, notes / "thesis.txt" / "deeper", text))
    assert code == 1 and "is a file" in err
    assert content(notes) == {"thesis.txt": b"my only copy"}


slow_compare = pytest.param("compare", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["export", "convert", "sweep", "evaluate", slow_compare, "search"])
def test_with_the_flag_it_writes_there_and_other_files_stay(
    name: str, run: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("my only copy")
    code, err = run(*command(name, model, notes, text), "--overwrite")
    assert code == 0, err
    assert (notes / "thesis.txt").read_text() == "my only copy" and len(list(notes.iterdir())) > 2
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".notes")]


@pytest.mark.parametrize("name", ["export", "sweep", "evaluate", slow_compare, "search"])
def test_the_same_command_writes_again_to_its_own_folder(
    name: str, run: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "deep" / "out"
    for _ in range(2):
        code, err = run(*command(name, model, output, text))
        assert code == 0, err
    (output / "run.log").write_text("what the command printed")  # a log beside the results is no reason to stop
    (output / "printed.txt").touch()  # nor is what a shell has just opened
    assert run(*command(name, model, output, text))[0] == 0


def test_each_command_refuses_the_folder_of_another(run: Any, model: Path, text: Path, tmp_path: Path) -> None:
    for name in ("evaluate", "search", "sweep"):
        assert run(*command(name, model, tmp_path / name, text))[0] == 0
    for name in ("evaluate", "search", "sweep"):
        before = content(tmp_path / name)
        for other in {"export", "evaluate", "compare", "search", "sweep", "convert"} - {name}:
            code, err = run(*command(other, model, tmp_path / name, text))
            assert code == 1 and "not an empty folder" in err, (name, other, err)
        assert content(tmp_path / name) == before


def test_a_stopped_evaluation_goes_on_and_another_scheme_does_not_replace_it(
    run: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    words, output = command("evaluate", model, tmp_path / "out", text), tmp_path / "out"
    assert run(*words)[0] == 0
    measured = (output / "journal.jsonl").read_bytes()
    for file in output.iterdir():  # what a kill leaves: the journal alone
        if file.name != "journal.jsonl":
            file.unlink()
    assert run(*words)[0] == 0
    assert (output / "journal.jsonl").read_bytes() == measured and (output / "index.html").is_file()
    rows = (output / "results.jsonl").read_bytes()
    code, err = run(*words, "--scheme", "yarn", "--factor", 2)
    assert code == 1 and "'native'" in err and "yarn" in err and (output / "results.jsonl").read_bytes() == rows
    assert run(*words, "--scheme", "yarn", "--factor", 2, "--overwrite")[0] == 0
    assert (output / "results.jsonl").read_bytes() != rows


# In Python


def row() -> Row:
    known = {"scheme": "native", "task": "needle", "measure": "exact", "length": 64, "tokens": 64, "depth": None,
             "score": 1.0, "low": 0.5, "high": 1.0, "samples": 3, "control": 1.0, "control_length": 64,
             "seconds": 1.0, "peak_memory": 0, "memory_kind": "", "seed": 0, "text_hash": "", "tokenizer_hash": "",
             "measured_on": "three questions"}  # fmt: skip
    return Row(**known)


def test_functions_refuse_as_the_commands_do(model: Path, tmp_path: Path) -> None:
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    results = Results([row()], {"scheme": "native"})
    patch_model(loaded, "yarn", factor=4)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "config.json").write_text(json.dumps({"model_type": "llama"}))
    before = content(tmp_path)
    for write in (
        lambda: export(loaded, model),
        lambda: export(loaded, model / "new", overwrite=True),
        lambda: export(loaded, notes),
        lambda: save(loaded, tokenizer, model),
        lambda: save(loaded, tokenizer, model, overwrite=True),
        lambda: save(loaded, tokenizer, notes),
        lambda: results.save(notes),
        lambda: write_report(results, notes),
        lambda: evaluate(loaded, tokenizer, "passkey", 64, output=model, progress=False),
        lambda: evaluate(loaded, tokenizer, "passkey", 64, output=notes, progress=False),
    ):
        with pytest.raises(OutputError):
            write()
    assert content(tmp_path) == before and issubclass(OutputError, PePatchError)
    results.save(notes, overwrite=True)
    assert json.loads((notes / "config.json").read_text()) == {"scheme": "native"}


def test_a_model_of_the_hub_is_no_folder(model: Path, tmp_path: Path) -> None:
    """A hub name that is not a local path is not compared with folders."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    loaded.name_or_path = "meta-llama/Llama-2-7b-hf"
    patch_model(loaded, "yarn", factor=4)
    assert export(loaded, tmp_path / "meta-llama" / "Llama-2-7b-hf" / "out").is_dir()


# Interrupted half-way


@pytest.mark.parametrize("stop", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("earlier", ["nothing", "empty", "an export", "something else"])
def test_an_interrupted_export_leaves_the_folder_as_it_was(
    earlier: str, stop: BaseException, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    patch_model(loaded, "yarn", factor=4)
    root = tmp_path / "root"
    output = root / "a" / "out"
    if earlier != "nothing":
        output.mkdir(parents=True)
    if earlier == "an export":
        export(loaded, output, "vllm")
    if earlier == "something else":
        (output / "model.safetensors").write_text("other weights")
    before = content(root) if root.exists() else None

    def interrupted(inner: Any) -> Any:
        def broken(*args: Any, **kwargs: Any) -> Any:
            inner(*args, **kwargs)
            raise stop

        return broken

    # after the weights are written, and in the middle of moving them to their place
    for owner, name in ((LlamaForCausalLM, "save_pretrained"), (folders.os, "replace")):
        with monkeypatch.context() as broken:
            inner = getattr(owner, name)
            if name == "replace":
                last = {"calls": 0}

                def replace(*args: Any, inner: Any = inner, last: Any = last) -> None:
                    last["calls"] += 1
                    if last["calls"] == 3:
                        raise stop
                    inner(*args)

                broken.setattr(owner, name, replace)
            else:
                broken.setattr(owner, name, interrupted(inner))
            if earlier == "nothing" and name == "replace":
                continue  # one rename
            with pytest.raises(type(stop)):
                export(loaded, output, overwrite=True)
        assert (content(root) if root.exists() else None) == before, name
    export(loaded, output, overwrite=True)
    with torch.no_grad():
        ids = torch.arange(40)[None]
        plain = AutoModelForCausalLM.from_pretrained(output)
        assert torch.equal(plain(ids).logits, loaded(ids).logits)


def test_new_content_takes_the_place_of_the_old_in_one_piece(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("kept.txt", "same.json", "old.safetensors"):
        (folder / name).write_text("old")
    with replaced_content(folder, stale=["*.safetensors"]) as new:
        (new / "same.json").write_text("new")
        (new / "part").mkdir()
        assert sorted(content(folder)) == ["kept.txt", "old.safetensors", "same.json"]
    assert content(folder) == {"kept.txt": b"old", "same.json": b"new", "part": None}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_deleted_but_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def left(name: str, *files: str) -> Path:
        for file in (".writing", *files):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("")
        return tmp_path / name

    killed = left(".out-killed", "new/model.safetensors")
    moving = left(".out-moving", "old/model.safetensors")  # the only copy of what `out` held before
    own = tmp_path / ".out-of-a-user"
    own.mkdir()
    writing = left(".out-writing", "new/model.safetensors")
    with FileLock(writing / ".writing"), replaced_content(folder) as new:
        (new / "file").write_text("")
    assert not killed.exists() and moving.exists() and own.exists() and writing.exists()
    assert content(folder) == {"file": b""}


def test_two_runs_never_write_to_one_folder(model: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "rows"
    output.mkdir()
    words = ["evaluate", str(model), "--task", "needle", "--length", "64", "--samples", "1", "--text", str(text),
             "--output", str(output)]  # fmt: skip
    with FileLock(output / ".lock"):
        assert cli.main(words) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert f"Another run is writing to {output}. Give another folder" in said
        assert [path.name for path in output.iterdir()] == [".lock"]
    assert cli.main(words) == 0
    assert (output / "results.jsonl").exists()


def test_what_may_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "Source"
    source.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("new/deep", EXPORT, inputs=["Source", None, "", 3, "org/name"]) == tmp_path / "new/deep"
    assert check_output("~/new", EXPORT) == tmp_path / "new"
    for output in ("Source", "./Source/.", "Source/../Source", "~/Source", "Source/in", ".", str(tmp_path.parent)):
        with pytest.raises(OutputError, match="Inputs are never overwritten"):
            check_output(output, EXPORT, inputs=["Source"], overwrite=True)
    stat = os.stat  # as on a disk that ignores case
    monkeypatch.setattr(os, "stat", lambda path, **how: stat(os.fspath(path).replace("SOURCE", "Source"), **how))
    with pytest.raises(OutputError, match="Inputs are never overwritten"):
        check_output("SOURCE", EXPORT, inputs=["Source"])
    monkeypatch.setattr(os, "stat", stat)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="does not exist"):
        check_output("gone", EXPORT)
