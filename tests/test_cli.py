"""The command line: exit codes, messages without tracebacks, JSON, and flags with several values."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pe_patch import ADAPTERS, SCHEMES
from pe_patch.checkpoints.sources import parse_options
from pe_patch.cli import main as cli
from pe_patch.cli.catalogue import catalogue, entry_of
from pe_patch.errors import OptionError
from pe_patch.evaluation.tasks import TASKS

from .evaluation_doubles import make_text, make_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(800))
    return str(path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("evaluate M --length 8 16 --json", "evaluate M --length 8 --length 16 --json"),
        ("evaluate --length 8 16 M", "evaluate --length 8 --length 16 M"),
        ("evaluate --task passkey needle M --length 8", "evaluate --task passkey --task needle M --length 8"),
        ("evaluate --length=8,16 --depth 0.1 .9 x", "evaluate --length 8 --length 16 --depth 0.1 --depth .9 x"),
        ("evaluate --length 8 --length 16", "evaluate --length 8 --length 16"),
        ("evaluate --task unknown M", "evaluate --task unknown M"),
        ("evaluate --length", "evaluate --length"),
        ("evaluate --length --json", "evaluate --length --json"),
        ("export a b --scheme yarn", "export a b --scheme yarn"),
        (
            "compare M --scheme yarn rerope:window=64,k=2 --json",
            "compare M --scheme yarn --scheme rerope:window=64,k=2 --json",
        ),
        ("inspect --scheme rope llama3", "inspect --scheme rope llama3"),  # a folder of that name
    ],
)
def test_flags_take_several_values(words, expected):
    assert cli.spread(words.split()) == expected.split()


def test_options_are_read_as_what_they_look_like():
    words = ["a=1", "b=1e-4", "c=true", "d=[1, 2.5]", "e=auto", "f=null", "g='4'"]
    assert parse_options(words) == {"a": 1, "b": 1e-4, "c": True, "d": [1, 2.5], "e": "auto", "f": None, "g": "4"}
    with pytest.raises(OptionError, match="key=value"):
        parse_options(["factor"])


COMMANDS = "demo list inspect doctor evaluate compare advise generate export convert search selftest".split()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0 and re.search("Examples?:", out) and f"  pe-patch {name}" in out and "--json" in out


def test_list_has_every_scheme_family_and_task(run):
    code, out, _ = run("list", "--json")
    found = json.loads(out)
    assert code == 0 and [entry["name"] for entry in found["schemes"]] == list(SCHEMES)
    rows = [entry["name"] for entry in found["families"] if entry["adapter"] == "row"]
    assert rows == list(ADAPTERS)
    assert "qwen3_next" in [entry["name"] for entry in found["families"] if entry["adapter"] == "inferred"]
    assert {"perplexity", "needle", "passkey", "needle_multi_query"} <= {entry["name"] for entry in found["tasks"]}
    assert [entry["name"] for entry in found["tasks"]] == list(TASKS)
    assert all(entry["summary"] and entry["paper"] for kind in ("schemes", "tasks") for entry in found[kind])
    code, out, _ = run("list", "tasks")
    assert code == 0 and "passkey" in out and "yarn" not in out
    code, _, err = run("list", "task")
    assert code == 2 and "Did you mean 'tasks'" in err


def test_list_shows_one_entry_with_the_meaning_of_its_options(run):
    code, out, _ = run("list", "schemes", "yarn")
    assert code == 0 and "Turns inside the window above which a frequency is kept." in " ".join(out.split())
    code, out, _ = run("list", "schemes", "pi", "--json")
    found = json.loads(out)
    assert code == 0 and found["name"] == "linear" and found["options"][0]["name"] == "factor"
    code, out, _ = run("list", "tasks", "needle", "--json")
    assert code == 0 and {"name": "needles", "type": "int", "required": False, "default": 8,
                          "meaning": "The number of hidden facts."} in json.loads(out)["options"]  # fmt: skip
    code, out, _ = run("list", "families", "falcon")
    assert code == 0 and "Falcon 7B" in out
    code, _, err = run("list", "schemes", "yarm")
    assert code == 2 and "Did you mean 'yarn'" in err
    code, _, err = run("list", "yarn")
    assert code == 2 and "`pe-patch list schemes yarn`" in err


@pytest.mark.parametrize("kind", ["schemes", "tasks"])
def test_every_option_of_a_scheme_and_of_a_task_has_a_meaning(kind):
    entries = catalogue()
    shown = [entry_of(entries, kind, entry["name"]) for entry in entries[kind]]
    assert [(entry["name"], each["name"]) for entry in shown for each in entry["options"] if not each["meaning"]] == []


def test_inspect_needs_no_weights(run, checkpoint, tmp_path):
    (tmp_path / "config.json").write_text(open(f"{checkpoint}/config.json").read())
    code, out, _ = run("inspect", tmp_path, "--scheme", "yarn", "--factor", "4", "--json")
    found = json.loads(out)
    assert code == 0 and found["scheme"] == "yarn" and found["layers"] == [0, 1]
    assert found["effective"]["effective_window"] == 256
    code, out, _ = run("inspect", tmp_path, "--scheme", '{"rope_type": "linear", "factor": 2}')
    assert code == 0 and "linear" in out


def test_evaluate_prints_rows_and_writes_a_report(run, checkpoint, text, tmp_path):
    words = ["evaluate", checkpoint, "--scheme", "yarn", "--factor", "4", "--task", "needle", "passkey"]
    words += ["--length", 64, 128, "--samples", 2, "--depth", 0.5, "--text", text]
    code, out, _ = run(*words, "--json")
    found = json.loads(out)
    assert code == 0 and found["config"]["effective_window"] == 256 and found["config"]["native_window"] == 64
    assert [(row["task"], row["length"]) for row in found["rows"]] == [
        (task, length) for length in (64, 128) for task in ("needle", "passkey")
    ]
    assert {row["scheme"] for row in found["rows"]} == {"yarn(factor=4)"}
    code, out, err = run(*words, "--output", tmp_path / "report")
    assert code == 0 and "yarn(factor=4)" in out and "2 questions" in out
    assert (tmp_path / "report" / "index.html").is_file() and "index.html" in err


def test_generate_continues_a_prompt(run, checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("the river runs")
    code, out, _ = run(
        "generate", checkpoint, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 3, "--json"
    )
    found = json.loads(out)
    assert code == 0 and found["prompt"] == "the river runs" and found["prompt_tokens"] > 0
    code, _, err = run("generate", checkpoint, "--prompt", "")
    assert code == 2 and "empty" in err


def test_a_second_evaluation_into_the_same_folder_measures_nothing_again(run, checkpoint, text, tmp_path, monkeypatch):
    words = [
        "evaluate",
        checkpoint,
        "--task",
        "needle",
        "--task-option",
        "needles=2",
        "--length",
        "64",
        "--samples",
        "5",
    ]
    words += ["--text", text, "--output", tmp_path / "report", "--json"]
    code, first, _ = run(*words)
    assert code == 0 and len(json.loads(first)["rows"]) == 5

    def refuses(*_):
        raise AssertionError("asked again")

    monkeypatch.setattr("pe_patch.evaluation.model.EvaluatedModel.answers", refuses)
    code, second, _ = run(*words)
    assert code == 0 and json.loads(second) == json.loads(first)
    assert {"index.html", "results.jsonl", "answers.jsonl", "journal.jsonl"} <= {
        path.name for path in (tmp_path / "report").iterdir()
    }


def test_export_writes_a_native_checkpoint(run, checkpoint, tmp_path):
    code, _, _ = run("export", checkpoint, tmp_path / "out", "--scheme", "yarn", "--factor", "4")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert code == 0 and written["rope_parameters"]["rope_type"] == "yarn"
    assert written["max_position_embeddings"] == 256 and (tmp_path / "out" / "tokenizer.json").is_file()
    code, _, err = run("export", checkpoint, tmp_path / "alibi", "--scheme", "alibi")
    assert code == 1 and "alibi" in err and not (tmp_path / "alibi").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["evaluate", "MODEL", "--scheme", "yran", "--factor", "4"], 2, "Did you mean 'yarn'"),
        (["evaluate", "MODEL", "--scheme", "yarn"], 2, "factor"),
        (["evaluate", "MODEL", "--scheme", "yarn", "--factor", "4", "--option", "beta_fats=3"], 2, "beta_fast"),
        (["evaluate", "MODEL", "--factor", "4"], 2, "--scheme"),
        (["evaluate", "MODEL", "--task", "needel", "--length", "64"], 2, "Did you mean 'needle'"),
        (["evaluate", "MODEL", "--length", "65", "--task", "needle"], 1, "beyond the model's window of 64"),
        (["evaluate", "MODEL", "--length", "x"], 2, "--length"),
        (["evaluate", "MODEL", "--limit", "3"], 2, "give --harness"),
        (
            ["evaluate", "MODEL", "--harness", "piqa", "--task-option", "needles=3"],
            2,
            "--task-option has no effect",
        ),
        (["evaluate", "MODEL", "--task", "needle", "--task-option", "needels=3"], 2, "Did you mean 'needles'"),
        (["evaluate", "MODEL", "--task", "needle", "--length", "64", "--chat"], 2, "this one has none"),
        (["evaluate", "MODEL", "--dtype", "float8"], 2, "float32"),
        (["evaluate", "./nowhere", "--length", "64"], 1, "folder ./nowhere does not exist"),
        (["inspect", "EMPTY"], 1, "no config.json"),
        (["nothing"], 2, "nothing"),
        (["evaluate"], 2, "MODEL"),
    ],
)
def test_failures_are_one_plain_message(run, checkpoint, text, tmp_path, words, code, message):
    named = {"MODEL": checkpoint, "EMPTY": str(tmp_path)}
    words = [named.get(word, word) for word in words]
    if words[0] == "evaluate" and len(words) > 1:
        words += ["--text", text]
    got, out, err = run(*words)
    assert got == code and message in err and not out


def test_debug_shows_the_traceback(checkpoint):
    with pytest.raises(OptionError):
        cli.main(["--debug", "evaluate", checkpoint, "--factor", "4"])


def test_train_runs_a_recipe_by_name_or_path(run, monkeypatch):
    from pe_patch.training import run as training

    seen: list[Any] = []
    monkeypatch.setattr(training, "train", seen.append)
    assert run("train", "tiny_yarn", "seed=7", "--dry-run")[0] == 0
    (recipe,) = seen
    assert recipe.seed == 7 and recipe.dry_run and recipe.scheme.name == "yarn"
    code, _, err = run("train", "tiny_yarm")
    assert code == 2 and "Did you mean 'tiny_yarn'" in err
    code, _, err = run("train", "tiny_yarn", "sead=7")
    assert code == 2 and "sead" in err


def test_recipes_are_found_from_any_folder(tmp_path):
    for start in (["-m", "pe_patch.training"], ["-m", "pe_patch", "train"]):
        done = subprocess.run(
            [sys.executable, *start, "no_such_recipe"], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 2 and "yarn_llama_32k" in done.stderr


def terminate(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def fill(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [(terminate, 143, "SIGTERM received."), (interrupt, 130, "Interrupted."), (fill, 1, "No space left on device.")],
)
def test_a_stopped_command_says_how_to_continue(stop, code, said, checkpoint, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pe_patch.evaluation.journal.Journal.put", stop)
    words = ["evaluate", checkpoint, "--task", "needle", "--length", "64", "--samples", "1", "--text", text]
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([*words, "--output", str(tmp_path)]) == code
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert f"Give the same command again: it continues from what is finished in {tmp_path}." in error
    assert cli.main(words) == code  # it keeps nothing
    error = " ".join(capsys.readouterr().err.split())
    assert "same command" not in error and signal.getsignal(signal.SIGTERM) is before


SCRIPT = Path(sys.executable).with_name("pe-patch")


@pytest.mark.parametrize("start", [[SCRIPT], [sys.executable, SCRIPT], [sys.executable, "-m", "pe_patch"]], ids=len)
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["extend", "--help"], ["evaluate", "--help"]])
def test_help_and_version_import_no_torch(start, words):
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([*start, *words], capture_output=True, text=True, check=False, env=environment)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "pe-patch" in done.stdout
    assert "pe_patch.cli.application" in imported and not {"torch", "transformers", "numpy"} & imported


def test_a_value_that_looks_like_help_does_not_stop_the_library_from_loading(capsys):
    words = ["generate", "demo", "--prompt", "--help", "--scheme", "yarn", "--factor", "2", "--max-new-tokens", "1"]
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


OWN_SCRIPT = """
import pe_patch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "yarn" in pe_patch.SCHEMES and len(pe_patch.SCHEMES) > 30
assert "pe_patch.checkpoints.auto" in __import__("sys").modules
"""


def test_a_script_of_a_user_is_no_command_whatever_its_name(tmp_path):
    for name in ("pe-patch.py", "pe_patch_it.py"):
        (tmp_path / name).write_text(OWN_SCRIPT)
        done = subprocess.run([sys.executable, tmp_path / name], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_worker_processes_of_the_command_know_every_scheme(tmp_path):
    """They are started afresh, with the words of the command as their own."""
    words = [
        "compare",
        "demo",
        "--scheme",
        "yarn",
        "--factor",
        "2",
        "--length",
        "256",
        "--samples",
        "1",
        "--workers",
        "1",
    ]
    words += ["--task", "passkey", "--output", str(tmp_path / "out")]
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "cannot work" not in done.stdout + done.stderr, done.stderr
    assert not list((tmp_path / "out").rglob("unsupported.json"))
