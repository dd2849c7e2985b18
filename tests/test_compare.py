"""A comparison gives the same numbers as `evaluate`, and finished work is not repeated."""

import argparse
import inspect
import json
import os
import shutil
import signal
import typing
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from pe_patch import evaluate, load_patched, patched
from pe_patch.cli import main as cli
from pe_patch.cli.several import spread
from pe_patch.compare import compare, facts, processes, survey, timing
from pe_patch.compare.compared_scheme import ComparedScheme, parse_schemes, split_options
from pe_patch.compare.demo import BASE, load_base
from pe_patch.compare.page import columns, markdown, picture
from pe_patch.compare.run import carry_out
from pe_patch.errors import OptionError, PePatchError, UnknownNameError
from pe_patch.evaluation.model import EvaluatedModel
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.tasks import Needle
from pe_patch.training.run import load_recipe, train

LENGTHS = (256, 512)
TASKS = (Needle(), Perplexity(measures=("fixed",), spots=2))
WITH = {"factor": 8, "tasks": TASKS, "samples": 5, "workers": 0, "progress": False}
SCHEMES = {"as it is": None, "yarn": {"factor": 8}, "self_extend": {"group": 8, "window": 64}}


def run(output: Path, schemes=("yarn", "self_extend:group=8,window=64"), **changes):
    return compare(BASE, schemes, LENGTHS, output=output, text=str(output.parent / "text"), **{**WITH, **changes})


TIME_ALL = timing.time_all


@pytest.fixture(scope="module", autouse=True)
def no_clock():
    """Skip timing, which has a separate test."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(timing, "time_all", lambda settings, folder: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place for comparisons, with three files of Python to measure on."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text").mkdir()
    for module in (argparse, inspect, typing):
        shutil.copy(str(module.__file__), folder / "text")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return run(folder / "found")


@pytest.fixture(scope="module")
def by_hand(folder):
    model, tokenizer = load_base(BASE)
    results, text = {}, str(folder / "text")
    for label, options in SCHEMES.items():
        settings = {"text": text, "samples": 5, "control_length": 256, "beyond_window": True, "progress": False}
        if options is None:
            results[label] = evaluate(model, tokenizer, TASKS, LENGTHS, **settings)
        else:
            with patched(model, label, **options):
                results[label] = evaluate(model, tokenizer, TASKS, LENGTHS, **settings)
    return results


def test_the_table_agrees_with_evaluate(found, by_hand):
    lines = {line["scheme"]: line for line in found.table()}
    assert list(lines) == list(SCHEMES)
    for label, alone in by_hand.items():
        for length in LENGTHS:
            assert lines[label]["retrieval"][length] == alone.cell(task="needle", length=length).score
            assert lines[label]["loss"][length] == alone.cell(task="perplexity", length=length).score
    base, yarn = (by_hand[label].cell(task="perplexity", length=256).score for label in ("as it is", "yarn"))
    assert lines["as it is"]["loss_change"] == 0 and lines["yarn"]["loss_change"] == yarn - base != 0
    assert found.unsupported == found.failures == {}


def test_costs_against_counts_by_hand(folder):
    """The demo's model: 2 layers, 4 heads of 32, every head with its own keys and values, float32."""
    found = run(folder / "costs", ["learned", "mla:method=init,kv_rank=32,rope_dim=8"], tasks=("needle",), samples=1)
    lines = {line["scheme"]: line for line in found.table()}
    assert lines["as it is"]["cache_bytes_per_token"] == 2 * 2 * 4 * 32 * 4
    assert lines["mla"]["cache_bytes_per_token"] == 2 * (32 + 8) * 4
    assert lines["learned"]["parameters_added"] == 256 * 128
    taken, down, up, rotary = 2 * 128 * 128, 128 * 32, 2 * 32 * 128, 128 * 8 + 128 * 4 * 8
    assert lines["mla"]["parameters_added"] == 2 * (down + up + rotary - taken)
    assert lines["learned"]["positions"] == 256 and list(lines["learned"]["retrieval"]) == [256]
    assert "| learned |" in markdown(found) and " - |" in markdown(found)


def test_peak_memory_is_the_peak_of_tensor_memory():
    model: Any = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")

    def call():
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second.double()
        return third.sum()

    assert facts.peak_memory(model, call)[0] == pytest.approx(4000 + 8000, abs=200)


def test_finished_work_is_not_repeated(folder, found, monkeypatch):
    asked, real = [], EvaluatedModel.answers

    def answers(self, questions):
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(len(questions))
        return real(self, questions)

    monkeypatch.setattr(EvaluatedModel, "answers", answers)
    stop = None
    run(folder / "whole")
    whole = len(asked)
    asked.clear()
    stop = whole // 2
    with pytest.raises(KeyboardInterrupt):
        run(folder / "stopped")
    stop = None
    again = run(folder / "stopped")
    assert 2 < whole <= len(asked) <= whole + 1  # the row that was being measured is begun anew
    assert again.table() == found.table()
    asked.clear()
    assert run(folder / "stopped").table() == again.table() and not asked


def test_a_scheme_that_fails_does_not_stop_the_others(folder, monkeypatch, capsys, by_hand):
    real = EvaluatedModel.losses

    def losses(self, *arguments):
        if getattr(self.model.config, "pe_patch", {}).get("scheme") == "yarn":
            raise RuntimeError("out of luck")
        return real(self, *arguments)

    monkeypatch.setattr(EvaluatedModel, "losses", losses)
    words = [*"--scheme yarn linear --factor 8 --length 256 --task perplexity needle --samples 5 --workers 0".split()]
    output = ["--text", str(folder / "text"), "--output", str(folder / "failing")]
    assert cli.main(["compare", str(BASE), *words, *output, "--json"]) == 1
    told = capsys.readouterr()
    table = {line["scheme"]: line for line in json.loads(told.out)["table"]}
    assert "out of luck" in table["yarn"]["why"] and "yarn failed: RuntimeError: out of luck" in told.err
    assert table["as it is"]["retrieval"] == {"256": by_hand["as it is"].cell(task="needle", length=256).score}
    assert table["linear"]["why"] is None
    monkeypatch.setattr(EvaluatedModel, "losses", real)
    again = compare(
        str(BASE), ["yarn", "linear"], [256], output=folder / "failing", text=str(folder / "text"), **WITH | {
            "tasks": ("perplexity", "needle")}
    )  # fmt: skip
    assert not again.failures and {line["scheme"]: line["why"] for line in again.table()} == dict.fromkeys(table)


def test_what_cannot_work_is_shown_with_the_reason(folder):
    found = run(folder / "unsupported", ["rope_2d", "ntk"], tasks=("needle",), samples=1)
    lines = {line["scheme"]: line for line in found.table()}
    assert list(lines) == ["as it is", "rope_2d", "ntk"] and not found.failures
    assert lines["rope_2d"]["why"] == found.unsupported["rope_2d"] != "" and lines["ntk"]["why"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scheme", "yran"], "yarn"),
        (["--scheme", "yarn", "lineer", "--factor", "8"], "linear"),
        (["--scheme", "yarn:factr=8"], "factr"),
        (["--scheme", "yarn"], "factor"),
        (["--scheme", "self_extend:group=2,window=64,factor=8"], "larger group"),
        (["--scheme", "yarn", "yarn", "--factor", "8"], "twice"),
        ([], "--scheme"),
        (["--preset", "survey"], "MODEL"),
        (["--scheme", "yarn:factor=8", "--task", "needel"], "needle"),
        (["--scheme", "yarn:factor=8", "--quick"], "--preset"),
    ],
)
def test_wrong_usage_is_code_2_and_writes_nothing(words, said, tmp_path, capsys):
    assert cli.main(["compare", str(BASE), *words, "--output", str(tmp_path / "none")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_an_unknown_preset_and_a_loaded_model_are_refused(tmp_path):
    assert cli.main(["compare", "--preset", "surveys", "--output", str(tmp_path)]) == 2
    with pytest.raises(OptionError, match="save_pretrained"):
        compare(cast(Any, load_base(BASE)[0]), ["yarn"], output=tmp_path, factor=8)


def test_other_settings_do_not_mix(folder, found):
    with pytest.raises(PePatchError, match="another samples, seed"):
        run(folder / "found", samples=6, seed=1)
    with pytest.raises(PePatchError, match="another contenders"):
        run(folder / "found", schemes=("yarn",))


def test_compared_schemes_and_their_options():
    assert split_options("a=1,b=[2,3],c={d: 4, e: 5}") == ["a=1", "b=[2,3]", "c={d: 4, e: 5}"]
    base, *rest = parse_schemes(["pi", "yarn", "yarn:beta_fast=16", "self_extend:group=8,window=64", "nope"], factor=8)
    assert base == ComparedScheme("as it is")
    assert [(one.label, one.options) for one in rest] == [
        ("linear", {"factor": 8}),
        ("yarn (factor=8)", {"factor": 8}),
        ("yarn (beta_fast=16, factor=8)", {"beta_fast": 16, "factor": 8}),
        ("self_extend", {"group": 8, "window": 64}),
        ("nope", {}),
    ]
    (dialect,) = parse_schemes([{"rope_type": "linear", "factor": 4.0}])[1:]
    assert (dialect.scheme, dialect.options["factor"]) == ("linear", 4.0)
    with pytest.raises(UnknownNameError, match="Did you mean 'alibi'"):
        parse_schemes(["alibbi"])
    words = ["compare", "m", "--scheme", "yarn", "self_extend:group=8,window=64", "--length", "1,2", "--json"]
    flags = ["--scheme", "yarn", "--scheme", "self_extend:group=8,window=64", "--length", "1", "--length", "2"]
    assert spread(words) == ["compare", "m", *flags, "--json"]


def test_fine_tuning_is_the_recipe_by_hand(folder):
    text = folder / "words"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text(" ".join(f"word{i} stone" for i in range(600)))
    file = folder / "short.yaml"
    file.write_text(
        f"version: 1\noutput: {folder / 'alone'}\nmodel: {{source: demo}}\ndata: {{source: {text}}}\nprogress: false\n"
        "phases:\n  - {length: 64, batch: 2, steps: 9, learning_rate: 1.0e-3, warmup: 0, mixture: {text: {share: 1}}}\n"
    )
    found = run(folder / "tuned", ["yarn"], tasks=("needle",), samples=1, fine_tune=file, steps=2)
    names = ["as it is", "as it is, fine-tuned", "yarn", "yarn, fine-tuned"]
    assert [line["scheme"] for line in found.table()] == names and not found.failures
    alone = train(load_recipe(file, ["phases.0.steps=2", "scheme={name: yarn, options: {factor: 8}}", "seed=0"]))
    ours = load_patched(folder / "tuned" / "contenders" / "yarn" / "training" / "model")
    theirs = dict(alone.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in ours.named_parameters())
    untouched = dict(load_base(BASE)[0].named_parameters())
    assert any(not torch.equal(value, untouched[name]) for name, value in theirs.items())


@pytest.mark.thorough
def test_the_table_has_times_for_all_schemes_that_can_be_timed(folder, monkeypatch):
    monkeypatch.setattr(timing, "time_all", TIME_ALL)
    found = run(folder / "timed", ["yarn", "learned"], tasks=("needle",), samples=1)
    assert not found.failures
    lines = {line["scheme"]: line for line in found.table()}
    assert {label: line["timed_at"] for label, line in lines.items()} == {"as it is": 512, "yarn": 512, "learned": 256}
    times = json.loads((folder / "timed" / "timing.json").read_text())["times"]
    assert all(len(times[label]["seconds"]["decode"]) == 5 for label in lines)
    assert lines["as it is"]["forward"] == 1 and lines["yarn"]["train"] is None
    assert timing.ratios(
        timing.Seconds([3.0, 1.0, 8.0], [2.0], []), timing.Seconds([1.0, 2.0, 2.0], [4.0], [])
    ) == {"forward": 3.0, "decode": 0.5, "train": None}  # fmt: skip


@pytest.mark.thorough
def test_the_survey_runs_from_end_to_end(folder, monkeypatch):
    three = tuple(one for one in survey.SCHEMES if one.label in ("rope", "learned", "mla"))
    monkeypatch.setattr(survey, "SCHEMES", three)
    settings = survey.survey(folder / "survey", quick=True)
    found = carry_out(settings, folder / "survey", workers=0, progress=False)
    assert not found.failures and not found.unsupported
    lines = {line["scheme"]: line for line in found.table()}
    assert list(lines) == ["rope", "learned", "mla"]
    assert list(lines["rope"]["loss"]) == [128, 256, 512, 1024] and list(lines["learned"]["loss"]) == [128]
    assert lines["rope"]["cache_bytes_per_token"] == 2 * 2 * 64 * 4
    assert lines["mla"]["cache_bytes_per_token"] == 2 * (24 + 8) * 4
    steps = [json.loads(line) for line in _log(folder, "rope") + _log(folder, "learned")]
    starts = [step for step in steps if step["event"] == "step"]
    assert [step["targets"] for step in starts[:12]] == [step["targets"] for step in starts[12:]]  # the same sequences
    assert starts[0]["loss"] == pytest.approx(torch.log(torch.tensor(128.0)).item(), abs=0.05)  # 128 tokens compete
    assert picture(found, "survey").png()[:4] == b"\x89PNG" and len(columns(found)) > 10


def _log(folder: Path, label: str) -> list[str]:
    return (folder / "survey" / "contenders" / label / "training" / "log.jsonl").read_text().splitlines()


def _write(path: Path) -> None:
    path.write_text("done")


def _die(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_dies_does_not_stop_the_others(tmp_path):
    jobs = [
        processes.Job(name, call, (tmp_path / name,), tmp_path / f"{name}-failed.json")
        for name, call in (("first", _die), ("second", _write))
    ]
    processes.run(jobs, 1)
    assert (tmp_path / "second").read_text() == "done"
    assert "signal 9" in json.loads((tmp_path / "first-failed.json").read_text())["reason"]
    assert not (tmp_path / "second-failed.json").exists()
