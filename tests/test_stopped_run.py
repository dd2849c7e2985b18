"""A stopped evaluation resumes without measuring finished work again, and gives the same table."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from pe_patch import patched
from pe_patch.errors import PePatchError
from pe_patch.evaluation.journal import Journal
from pe_patch.evaluation.model import EvaluatedModel, model_fingerprint

from .evaluation_doubles import make_tokenizer, measure, tiny_llama

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def llama(tokenizer):
    return tiny_llama(len(tokenizer), window=256)


def counted(monkeypatch):
    """Record every question from now on."""
    asked, real = [], EvaluatedModel.answers

    def spy(self, questions):
        asked.extend(questions)
        return real(self, questions)

    monkeypatch.setattr(EvaluatedModel, "answers", spy)
    return asked


def same_table(one, other):
    def plain(results):
        return [{k: v for k, v in asdict(r).items() if k not in ("seconds", "peak_memory")} for r in results.rows]

    return plain(one) == plain(other)


def kept(folder):
    """Return the keys of finished work units in order."""
    return [json.loads(line)["key"] for line in (folder / Journal.NAME).read_text().splitlines()]


def lines(file):
    return [
        {name: value for name, value in json.loads(line).items() if name not in ("seconds", "peak_memory")}
        for line in file.read_text().splitlines()
    ]


@pytest.mark.parametrize("calls", [0, 4, 9, 17])
def test_an_interrupted_run_repeats_no_finished_work(tokenizer, llama, tmp_path, monkeypatch, calls):
    def run(folder):
        tasks = ["needle", "needle_single", "perplexity"]
        return measure(llama, tokenizer, tasks, [64, 128], output=tmp_path / folder, control_length=64)

    whole, real, left = run("whole"), EvaluatedModel.answers, [calls]

    def stops(self, questions):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, questions)

    monkeypatch.setattr(EvaluatedModel, "answers", stops)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.setattr(EvaluatedModel, "answers", real)
    finished = kept(tmp_path / "killed") if calls else []
    assert same_table(whole, run("killed"))
    # each unit is finished exactly once
    assert (
        kept(tmp_path / "killed") == kept(tmp_path / "whole") and finished == kept(tmp_path / "whole")[: len(finished)]
    )
    assert len(set(kept(tmp_path / "killed"))) == len(kept(tmp_path / "killed"))
    asked = counted(monkeypatch)
    assert same_table(whole, run("killed")) and not asked
    for name in ("results.jsonl", "answers.jsonl"):
        assert lines(tmp_path / "whole" / name) == lines(tmp_path / "killed" / name) != []


@pytest.mark.slow
def test_a_killed_process_resumes(tmp_path):
    code = textwrap.dedent(
        """
        import sys, time
        from pe_patch.compare.demo import BASE, load_base
        from pe_patch import evaluate
        from pe_patch.evaluation.model import EvaluatedModel
        real = EvaluatedModel.answers
        def slow(self, questions):
            print("asked", flush=True)
            time.sleep(float(sys.argv[2]))
            return real(self, questions)
        EvaluatedModel.answers = slow
        model, tokenizer = load_base(BASE)
        evaluate(model, tokenizer, "needle", [64, 128], samples=5, output=sys.argv[1], progress=False,
                 text=["words and more words, " * 400])
        """
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def start(folder, pause):
        return subprocess.Popen([sys.executable, "-c", code, str(folder), str(pause)], stdout=subprocess.PIPE,
                                text=True, cwd=ROOT)  # fmt: skip

    process = start(killed, 0.3)
    journal = killed / Journal.NAME
    deadline = time.monotonic() + 120
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 4) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = kept(killed)
    assert len(finished) >= 4 and not (killed / "results.jsonl").exists()
    (again, _), (fresh, _) = start(killed, 0).communicate(), start(whole, 0).communicate()
    assert again.count("asked") < fresh.count("asked")
    assert kept(killed) == kept(whole) and kept(killed)[: len(finished)] == finished
    assert lines(killed / "results.jsonl") == lines(whole / "results.jsonl")
    assert len(lines(killed / "results.jsonl")) == 10


def test_other_weights_or_options_are_measured_again(tokenizer, llama, tmp_path, monkeypatch):
    measure(llama, tokenizer, "needle", [64], output=tmp_path)
    asked = counted(monkeypatch)
    measure(llama, tokenizer, "needle", [64], output=tmp_path)
    assert not asked
    changes = [{"seed": 1}, {"samples": 5}, {"task_options": {"needles": 2}}, {"depths": (0.25,)}]
    for change in changes:
        measure(llama, tokenizer, "needle", [64], output=tmp_path, **change)
        assert asked
        asked.clear()
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight += 1e-3
    measure(llama, tokenizer, "needle", [64], output=tmp_path)
    assert asked


def test_the_fingerprint_changes_with_config_scheme_dtype_and_weights(tokenizer, llama):
    plain = model_fingerprint(llama)
    assert plain == model_fingerprint(tiny_llama(len(tokenizer), window=256))
    with patched(llama, "yarn", factor=2):
        assert model_fingerprint(llama) != plain
    assert model_fingerprint(llama) == plain
    assert model_fingerprint(tiny_llama(len(tokenizer), window=256, seed=1)) != plain


def test_an_incomplete_last_line_is_dropped(tmp_path):
    journal = Journal(tmp_path)
    journal.put("a", {"value": 1})
    journal.put("b", {"value": [2, "é"]})
    with journal.path.open("ab") as file:
        file.write(b'{"key": "c", "val')
    again = Journal(tmp_path)
    assert (again.get("a"), again.get("b"), again.get("c")) == ({"value": 1}, {"value": [2, "é"]}, None)
    again.put("c", {"value": 3})
    assert Journal(tmp_path).get("c") == {"value": 3}


def test_a_damaged_journal_line_raises_with_its_number(tmp_path):
    journal = Journal(tmp_path)
    journal.put("a", {"value": 1})
    journal.path.write_text("nonsense\n" + journal.path.read_text())
    with pytest.raises(PePatchError, match=r"journal.jsonl, line 1 is damaged"):
        Journal(tmp_path)


DEEP = "[" * 100_000
"""More levels than Python's parser of JSON takes."""


@pytest.mark.parametrize("line", ["null", "3", "[1]", '"key"', "{}", '{"key": []}', '{"key": {}}', DEEP])
def test_a_journal_line_of_another_type_raises_with_its_number(tmp_path, line):
    (tmp_path / Journal.NAME).write_text('{"key": "a", "rows": []}\n' + line + "\n")
    with pytest.raises(PePatchError, match=r"line 2 is damaged .* Delete the line"):
        Journal(tmp_path)


def test_a_line_without_its_value_is_named(tmp_path):
    (tmp_path / Journal.NAME).write_text('{"key": "a", "values": 3}\n')
    with pytest.raises(PePatchError, match=r"'a' is damaged \('value' is missing\)"):
        Journal(tmp_path).value("a", "value")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda entry: entry.pop("rows"), "'rows' is missing"),
        (lambda entry: entry["rows"].append(3), "a row must be an object"),
        (lambda entry: entry["rows"][0].pop("samples"), "samples"),
        (lambda entry: entry["rows"][0].update(samples="5"), "samples is '5'"),
        (lambda entry: entry["rows"][0].update(score=[]), r"score is \[\]"),
        (lambda entry: entry["rows"][0].update(details=None), "details is None"),
        (lambda entry: entry["answers"].append(None), "NoneType"),
    ],
)
def test_a_damaged_entry_is_named(tokenizer, llama, tmp_path, damage, said):
    def run():
        return measure(llama, tokenizer, ["needle"], [64], output=tmp_path, control_length=64)

    run()
    journal = tmp_path / Journal.NAME
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    entry = next(entry for entry in entries if "rows" in entry)
    damage(entry)
    journal.write_text("".join(json.dumps(each) + "\n" for each in entries))
    with pytest.raises(PePatchError, match=rf"{entry['key']}' is damaged \(.*{said}.*Delete it"):
        run()
