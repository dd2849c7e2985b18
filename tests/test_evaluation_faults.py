"""Answers, rows and numbers that broke an evaluation: endless digits, bad rows, U+2028, NaN, no EOS, silence."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from functools import partial

import numpy as np
import pytest

from pe_patch.errors import OptionError, PePatchError
from pe_patch.evaluation import progress
from pe_patch.evaluation.journal import Journal
from pe_patch.evaluation.lm_eval import harness
from pe_patch.evaluation.model import EvaluatedModel
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.progress import Progress, fewer_samples
from pe_patch.evaluation.report import write_report
from pe_patch.evaluation.results import Results, summary_table
from pe_patch.evaluation.tasks import TASKS, Needle
from pe_patch.evaluation.tasks.infinitebench import scoring
from pe_patch.evaluation.tasks.longbench import LONGBENCH
from pe_patch.evaluation.tasks.ruler.scoring import string_match_all, string_match_part

from .evaluation_doubles import Copier, double, make_tokenizer, measure, tiny_llama
from .test_longbench_rows import row, write


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# Answers

ENDLESS = "7" * 5000


def test_an_answer_of_more_digits_than_python_converts_is_scored():
    assert len(ENDLESS) > sys.get_int_max_str_digits()
    assert scoring.leading_numbers(f"[3, {ENDLESS}, 5]", ["3", "4", "5"]) == pytest.approx(1 / 3)
    assert scoring.leading_numbers(f"[003, {ENDLESS}]", ["3", ENDLESS]) == 1.0
    assert scoring.first_signed(f"-{ENDLESS}", ["-7"]) == 0.0 and scoring.first_signed("-07", ["-7"]) == 1.0
    assert scoring.last_integer(ENDLESS, ["7"]) == 0.0 and scoring.first_number(ENDLESS, ["7"]) == 0.0


@pytest.mark.parametrize("name", [name for name in TASKS if hasattr(TASKS[name], "score")])
def test_no_task_fails_on_strange_answers(name, tmp_path):
    options = {"source": str(tmp_path)} if name.startswith(("longbench", "infinitebench")) else {}
    if name.startswith("longbench_"):
        task = LONGBENCH[name]
        classes = {"all_classes": ["stone", "river"]} if task.data_set.metric.classes else {}
        write(tmp_path / f"{task.data_name}.jsonl", [row(1, **classes)])
    task = TASKS[name](**options)
    references = {"infinitebench_code_debug": ["name", "A"], "infinitebench_longbook_choice_eng": ["text", "A"]}
    right = references.get(name, ["段落7" if name.endswith("zh") else "Paragraph 7" if "retrieval" in name else "7"])
    for answer in ("", " ", ENDLESS, "-" * 300, "\u2028", "\x00", "Paragraph", "(A)", "."):
        assert 0 <= task.score(answer, right) <= 1


@pytest.mark.parametrize("name", [name for name in TASKS if hasattr(TASKS[name], "score")])
def test_one_string_is_not_a_list_of_letters(name):
    with pytest.raises(OptionError, match=r"must be a list of strings, got the string 'abc'.*Pass \['abc'\]"):
        TASKS[name]().score("a", "abc")
    with pytest.raises(OptionError, match="at least one string"):
        TASKS[name]().score("a", [])


@pytest.mark.parametrize("score", [
    scoring.best_f1, scoring.best_f1_chinese, scoring.rouge_lines, scoring.word_given, scoring.choice,
    scoring.leading_numbers, string_match_all, string_match_part,
])  # fmt: skip
def test_scoring_functions_refuse_one_string_too(score):
    with pytest.raises(OptionError, match="whose letters would each count as one"):
        score("a", "abc")


# Rows

HotpotQA, Trec, Count, Retrieval = (
    LONGBENCH[f"longbench_{name}"] for name in ("hotpotqa", "trec", "hotpotqa_e", "passage_retrieval_en")
)


@pytest.mark.parametrize(("task", "changes", "message"), [
    (HotpotQA, {"answers": []}, r"answers must be a list of at least one string, not '\[\]'"),
    (HotpotQA, {"answers": "stone"}, "answers must be a list"),
    (HotpotQA, {"answers": [3]}, "answers must be a list"),
    (HotpotQA, {"context": None}, "context must be a string"),
    (Trec, {"all_classes": None}, "all_classes must be a list"),
    (Trec, {"all_classes": "stone"}, "all_classes must be a list"),
    (Count, {"length": None}, "length must be a number"),
    (Retrieval, {"answers": ["stone"]}, "The right answer 'stone' has no number"),
])  # fmt: skip
def test_every_row_is_checked_before_the_first_question(tmp_path, task, changes, message):
    good = {"all_classes": ["stone"], "answers": ["Paragraph 3"]}
    write(tmp_path / f"{task.data_name}.jsonl", [row(1, **good), row(2, **good), row(3, **good | changes)])
    with pytest.raises(PePatchError, match=rf"Row 3 of '{task.data_name}' in .*: {message}.*Correct or remove it"):
        task(source=str(tmp_path)).rows()


def test_a_missing_column_of_a_later_row_is_found(tmp_path):
    rows = [row(1), row(2)]
    del rows[1]["answers"]
    write(tmp_path / "hotpotqa.jsonl", rows)
    with pytest.raises(PePatchError, match=r"Row 2 of 'hotpotqa' in .* has no answers"):
        HotpotQA(source=str(tmp_path)).rows()
    (tmp_path / "hotpotqa.jsonl").write_text("3\n")
    with pytest.raises(PePatchError, match=r"Row 1 .* is not an object"):
        HotpotQA(source=str(tmp_path)).rows()


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("kv_retrieval", {"answer": []}, "at least one string"),
    ("longbook_choice_eng", {"options": None}, "four answers"),
    ("longbook_choice_eng", {"options": ["a", "b", "c", "d"], "answer": ["e"]}, "not among the row's options"),
])  # fmt: skip
def test_infinitebench_rows_are_checked_too(tmp_path, name, changes, message):
    good = {"context": "x", "input": "y", "answer": ["a"], "options": ["a", "b", "c", "d"]}
    write(tmp_path / f"{name}.jsonl", [good, good | changes])
    with pytest.raises(PePatchError, match=rf"Row 2 of '{name}'.*{message}"):
        TASKS[f"infinitebench_{name}"](source=str(tmp_path)).rows()


def test_replaced_rows_are_measured_again(tmp_path, tokenizer):
    from .bench_doubles import make_bench

    write(tmp_path / "hotpotqa.jsonl", [row(1)])
    task = HotpotQA(source=str(tmp_path))
    first = make_bench(tokenizer).key(task, "x")
    write(tmp_path / "hotpotqa.jsonl", [row(1), row(2)])
    assert make_bench(tokenizer).key(task, "x") != first


# Lines of JSON


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_results_with_any_separator_are_read_again(tokenizer, tmp_path, separator, monkeypatch):
    monkeypatch.setattr(EvaluatedModel, "answers", lambda self, asked: [f"one{separator}two"] * len(asked))
    options, model = {"samples": 2, "depths": (0.5,), "output": tmp_path}, double(Copier, tokenizer)
    first = measure(model, tokenizer, "passkey", [300], **options)
    assert f"one{separator}two" in first.rows[0].details["examples"][0]["prediction"]
    again = Results.load(tmp_path)
    assert again.rows == first.rows
    assert measure(model, tokenizer, "passkey", [300], **options).rows == first.rows
    assert len(Journal(tmp_path)) > 0


# NaN


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_page_is_written_whatever_the_numbers_are(tokenizer, tmp_path, value):
    model = tiny_llama(len(tokenizer), window=128)
    tasks = ["needle", "needle_single", Perplexity(spots=3, windows=3, stretch_tokens=200)]
    results = measure(model, tokenizer, tasks, [64, 128], samples=4, depths=(0.2, 0.8))
    names = ("score", "low", "high", "control", "without_context")
    broken = []
    for number, entry in enumerate(results.rows):
        changed = {name: value for name in names} if number % 2 else {}
        details = json.loads(json.dumps(entry.details))
        if "buckets" in details:
            details["buckets"][0]["loss"] = value
        broken.append(type(entry)(**{**vars(entry), **changed, "details": details}))
    results = Results(broken, {**results.config, "seen": value})
    page = write_report(results, tmp_path, title="Broken")
    assert page.read_text(encoding="utf-8").count("<h2") > 1
    for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert all(math.isnan(entry.score) for entry in Results.load(tmp_path).rows[1::2])
    assert summary_table(Results.load(tmp_path)).row_count


def test_a_model_that_gives_nan_has_rows_and_a_page(tokenizer, tmp_path):
    import torch

    model = tiny_llama(len(tokenizer), window=128)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(math.nan)
    tasks = [Perplexity(spots=3, windows=3, stretch_tokens=200), "needle"]
    results = measure(model, tokenizer, tasks, [64, 128], samples=2, depths=(0.5,), output=tmp_path)
    assert math.isnan(results.rows[0].score)
    assert write_report(Results.load(tmp_path), tmp_path).is_file()
    again = measure(model, tokenizer, tasks, [64, 128], samples=2, depths=(0.5,), output=tmp_path)
    assert math.isnan(again.rows[0].score) and len(again.rows) == len(results.rows)


def test_a_score_outside_0_to_1_names_the_task(tokenizer):
    class Odd(TASKS["passkey"]):
        def score(self, prediction, references):
            return 2.0

    with pytest.raises(PePatchError, match=r"'passkey' gave an answer the score 2\.0; scores must be from 0 to 1"):
        measure(double(Copier, tokenizer), tokenizer, Odd(), [300], samples=1)


# lm-eval without EOS


def lm_eval_task(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"question": "the door of the stone", "answer": "lamp"}))
    return {
        "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


def test_lm_eval_takes_the_models_eos_if_the_tokenizer_has_none(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    model = tiny_llama(len(tokenizer), window=128)
    (scored,) = harness(model, tokenizer, lm_eval_task(tmp_path)).rows
    assert scored.samples == 1 and tokenizer.eos_token is None
    model.generation_config.eos_token_id = None
    with pytest.raises(PePatchError, match=r"neither this tokenizer nor the model's .* tokenizer\.eos_token = "):
        harness(model, tokenizer, lm_eval_task(tmp_path))


@pytest.mark.parametrize("name", ["longbench", "longbench_hotpotqa", "infinitebench_passkey", "longbench2"])
def test_longbench_and_infinitebench_have_one_path(name, tokenizer):
    with pytest.raises(OptionError, match=r"is a task of evaluate\(\) here \(--task"):
        harness(tiny_llama(len(tokenizer), window=128), tokenizer, name)


# Progress and plan


def test_there_is_a_line_at_least_every_half_minute(capsys, monkeypatch):
    assert progress.SECONDS_PER_LINE <= 30
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.05)
    with Progress("yarn", 1000, "to read: 1,000 tokens", True) as shown:
        shown.describe("needle at 64")
        shown.advance(100)
        deadline, lines = time.monotonic() + 20, []
        while len(lines) < 4 and time.monotonic() < deadline:  # without any further forward pass
            time.sleep(0.02)
            lines += capsys.readouterr().err.splitlines()
    assert lines[0] == "yarn: to read: 1,000 tokens"
    for line in lines[1:4]:
        assert re.fullmatch(
            r"yarn: needle at 64: 100 of about 1,000 tokens \(10 %\) in .*, [\d,]+ tokens/s, about .* left", line
        )
    assert "finished, 100 tokens in" in capsys.readouterr().err


def test_a_long_run_names_a_cheaper_one_once(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LONG", 10.0)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    cheaper = partial(fewer_samples, 50, tokens=lambda samples: 100 * samples)
    with Progress("yarn", 5000, "to read: 5,000 tokens", True, cheaper) as shown:
        now[0] = 40.0
        shown.advance(1000)  # 40 s for a fifth: 200 s in all
        shown.advance(1000)
    err = capsys.readouterr().err
    # 20, 10 and 5 samples take 80, 40 and 20 s, so none less than 10 s, and the least is named
    assert err.count("about 3 minutes in all. With 5 samples instead of 50: 500 tokens, about 20 s.") == 1


def test_few_samples_shrink_every_part_of_an_evaluation(tokenizer):
    model, read = tiny_llama(len(tokenizer), window=256), {}
    for samples in (4, 32, 50):
        results = measure(model, tokenizer, ["perplexity", "needle"], [64], samples=samples, dry_run=True)
        read[samples] = results.config["plan"]
    # 64 pieces, 8 windows by position and 8,192 tokens at a stride of 32; an eighth of each with 4 samples
    assert read[32]["perplexity"] == read[50]["perplexity"]
    assert read[4]["perplexity"]["tokens"] < 0.2 * read[32]["perplexity"]["tokens"]
    rows = measure(model, tokenizer, ["perplexity", "needle"], [64], samples=4).rows
    assert [row.details["spots"] for row in rows if "fixed" in row.measure] == [8]
    assert sum(row.samples for row in rows if row.task == "needle") == 4  # over five depths


def test_an_evaluation_says_what_it_reads_before_the_first_row(tokenizer, capsys):
    model = tiny_llama(len(tokenizer), window=256)
    measure(model, tokenizer, ["passkey", "perplexity"], [64, 128], samples=2, progress=True)
    first, second, *_, last = capsys.readouterr().err.splitlines()
    assert re.search(r"to read, with controls: perplexity about [\d,]+ tokens in \d+ windows, passkey about", first)
    assert "tokens/s, about" in second and "finished" in last
    measure(model, tokenizer, ["passkey"], [64], samples=2, progress=False)
    assert capsys.readouterr().err == ""


def test_progress_counts_a_shared_text_when_it_is_read(tokenizer):
    """Else the first of eight answers would look like an eighth of the time, and it is nearly all of it."""
    counted = []
    task = Needle(shared_text=True)
    options = {"samples": 3, "depths": (0.1, 0.5, 0.9), "retrieval": False}
    model = tiny_llama(len(tokenizer), window=1024)
    plan = measure(model, tokenizer, [task], [900], dry_run=True, **options).config["plan"]["needle"]
    measure(model, tokenizer, [task], [900], progress=lambda done, total: counted.append((done, total)), **options)
    first, total = counted[0]
    assert first > 0.6 * total and counted[-1][0] == plan["tokens"]


def test_a_dry_run_counts_what_the_run_reads(tokenizer, monkeypatch):
    model, read = tiny_llama(len(tokenizer), window=256), []
    tasks = ["passkey", "needle_single", Perplexity(spots=4, windows=3, stretch_tokens=300)]
    options = {"samples": 3, "depths": (0.1, 0.9), "control_length": 64, "batch_size": 1}
    plan = measure(model, tokenizer, tasks, [64, 128], dry_run=True, **options).config["plan"]
    real = {name: getattr(EvaluatedModel, name) for name in ("answers", "losses")}

    def answers(self, questions):
        read.extend(len(question.prompt) + question.budget for question in questions)
        return real["answers"](self, questions)

    def losses(self, sequences, targets):
        read.extend(map(len, sequences))
        return real["losses"](self, sequences, targets)

    monkeypatch.setattr(EvaluatedModel, "answers", answers)
    monkeypatch.setattr(EvaluatedModel, "losses", losses)
    measure(model, tokenizer, tasks, [64, 128], **options)
    assert set(plan) == {"passkey", "needle_single", "perplexity"}
    assert sum(work["prompts"] + work["windows"] for work in plan.values()) == len(read)
    assert sum(work["tokens"] for work in plan.values()) == sum(read)
    # 3 samples at 2 lengths, one control in the window for both (it is the shorter length), one without text
    assert plan["passkey"]["prompts"] == 3 * 2 + 3
    assert plan["passkey"]["forward_passes"] == plan["passkey"]["prompts"]  # an answer is one token
    assert np.all([work["forward_passes"] >= work["prompts"] + work["windows"] for work in plan.values()])
