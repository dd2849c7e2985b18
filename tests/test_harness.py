"""`harness` gives the scores of lm-eval itself, within the window of the patched model and without truncation."""

import importlib.util
import json
import random
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch

from pe_patch import patch_model
from pe_patch.errors import OptionError, PePatchError, UnknownNameError
from pe_patch.evaluation.lm_eval import RETENTION, harness, retention
from pe_patch.evaluation.metrics import binomial_interval
from pe_patch.evaluation.results import Results

from .evaluation_doubles import Copier, double, make_text, make_tokenizer, tiny_llama

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.tasks")
huggingface = pytest.importorskip("lm_eval.models.huggingface")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def llama(tokenizer):
    """Trained at 64 tokens, patched for 512."""
    model = tiny_llama(len(tokenizer))
    patch_model(model, "yarn", factor=8)
    return model


def words(tokenizer, tokens, seed=0):
    """Make a text of about this many tokens."""
    text = make_text(400, seed)
    return tokenizer.decode(tokenizer(text)["input_ids"][:tokens])


@pytest.fixture(scope="module")
def tasks(tokenizer, tmp_path_factory):
    """Make one task per kind of request from files."""
    folder = tmp_path_factory.mktemp("tasks")

    def task(name, documents, **config):
        path = folder / f"{name}.json"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
        return {"task": name, **data, "metadata": {"version": 3.5}, **config}

    def choices(length, count):
        return [
            {"question": words(tokenizer, length, seed), "options": ["door stone", "lamp", "river"], "right": seed % 3}
            for seed in range(count)
        ]

    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "options",
        "doc_to_target": "right",
    }
    write = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{options[right]}}",
        "generation_kwargs": {"max_gen_toks": 12, "until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    roll = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [
            {"metric": name, "aggregation": rule, "higher_is_better": False}
            for name, rule in [("word_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte")]
        ],
    }
    return {
        "choice": task("choice", choices(200, 6), **choice),
        "write": task("write", choices(300, 4), **write),
        "roll": task("roll", choices(1200, 3), **roll),
        "long_choice": task("long_choice", choices(300, 2) + choices(520, 1), **choice),
        "long_write": task("long_write", choices(300, 2) + choices(504, 1), **write),
        "fitting_write": task("fitting_write", choices(490, 2), **write),
    }


def theirs(model, task, include_path=None, **options):
    """Run lm-eval directly with a maximum of 512 tokens."""
    subject = huggingface.HFLM(pretrained=model, tokenizer=make_tokenizer(), max_length=512, batch_size=1)
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=include_path)
    return lm_eval.simple_evaluate(model=subject, tasks=[task], task_manager=manager, **options)["results"]


@pytest.fixture(scope="module")
def ours(llama, tokenizer, tasks):
    return harness(llama, tokenizer, [tasks[name] for name in ("choice", "write", "roll")])


@pytest.mark.parametrize(
    ("name", "metrics", "documents"),
    [
        ("choice", {"acc", "acc_norm"}, 6),
        ("write", {"exact_match"}, 4),
        ("roll", {"word_perplexity", "bits_per_byte"}, 3),
    ],
)
def test_rows_have_the_scores_of_lm_eval(llama, tasks, ours, name, metrics, documents):
    rows = ours.select(task=f"lm-eval {lm_eval.__version__} {name}")
    expected = theirs(llama, tasks[name])[name]
    assert {row.measure for row in rows} == metrics
    for row in rows:
        assert row.score == expected[f"{row.measure},none"]
        error = expected[f"{row.measure}_stderr,none"]
        assert row.details["stderr"] == (None if error == "N/A" else error)
        assert (row.samples, row.length) == (documents, 512)
        assert row.details["task_version"] == 3.5 and row.scheme == "yarn(factor=8)"


def test_the_interval_of_binary_scores_is_exact(ours):
    (row,) = ours.select(task=f"lm-eval {lm_eval.__version__} choice", measure="acc")
    assert (row.low, row.high) == binomial_interval(round(row.score * 6), 6)


def test_rows_have_document_counts_and_prompt_lengths(ours, tokenizer):
    (row,) = ours.select(task=f"lm-eval {lm_eval.__version__} write")
    longest = max(len(tokenizer(words(tokenizer, 300, seed))["input_ids"]) for seed in range(4))
    assert row.tokens == longest + 12
    assert "4 of 4 documents of json" in row.measured_on and "version 3.5" in row.measured_on
    assert len({row.text_hash for row in ours.rows}) == 3
    assert Results([type(row)(**json.loads(json.dumps(asdict(row)))) for row in ours.rows]).rows == ours.rows


def test_groups_limits_and_few_shot_equal_lm_eval(llama, tokenizer, tasks, tmp_path, monkeypatch):
    parts = [{**tasks["choice"], "task": name} for name in ("first", "second")]
    group = {"group": "both", "task": parts, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    given = theirs(llama, "both", include_path=str(tmp_path), limit=2, num_fewshot=1)
    # leave lm-eval's own tasks out, since reading their files takes seconds
    monkeypatch.setattr(
        "pe_patch.evaluation.lm_eval.tasks.default_task_manager",
        lambda folder: lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder),
    )
    found = harness(llama, tokenizer, "both", limit=2, few_shot=1, include_path=tmp_path)
    for name in ("both", "both::first", "both::second"):
        (row,) = found.select(task=f"lm-eval {lm_eval.__version__} {name}", measure="acc")
        assert row.score == given[name]["acc,none"]
        assert row.samples == (4 if name == "both" else 2)
        assert row.details["groups"] == ([] if name == "both" else ["both"])
        assert row.details["n_shot"] == 1


# Errors instead of truncation


@pytest.mark.parametrize(("name", "cut"), [("long_choice", "3 of 9"), ("long_write", "1 of 3")])
def test_a_prompt_that_lm_eval_would_cut_raises_before_any_forward_pass(llama, tokenizer, tasks, name, cut):
    read = []
    handle = llama.register_forward_pre_hook(lambda *_: read.append(1))
    message = rf"would cut {cut} .*{name}, takes 5\d\d tokens.* given 512\..*patch_model"
    with pytest.raises(PePatchError, match=message):
        harness(llama, tokenizer, tasks[name])
    handle.remove()
    assert not read


def test_the_window_is_that_of_the_patch(llama, tokenizer, tasks):
    # 490 tokens and 12 of answer fit into 512, not into the 64 that the model was trained at
    (row,) = harness(llama, tokenizer, tasks["fitting_write"]).rows
    assert 490 < row.tokens <= 512 and row.length == 512
    with pytest.raises(PePatchError, match="given 64"):
        harness(tiny_llama(len(tokenizer)), tokenizer, tasks["fitting_write"])


def test_a_prompt_that_is_cut_while_batching_raises(llama, tokenizer):
    from pe_patch.evaluation.lm_eval.model import NoTruncationLM

    subject = NoTruncationLM(llama, make_tokenizer(), 512, 1, None)
    ids, mask = subject.tok_batch_encode(["door stone"], left_truncate_len=20)
    assert ids.shape == mask.shape and ids.shape[1] <= 20
    with pytest.raises(PePatchError, match="to its last 20"):
        subject.tok_batch_encode(["door stone " * 30], left_truncate_len=20)
    with pytest.raises(PePatchError, match="to its last 20"):
        subject.tok_encode("door stone " * 30, left_truncate_len=20)


# RULER


class Reader(Copier):
    """A model that answers the first number of seven digits in its prompt if it is even, and nothing otherwise."""

    def next_token(self, ids):
        digits = {token: index for index, token in enumerate(self.config.digits)}
        runs = "".join("x" if token not in digits else str(digits[token]) for token in ids)
        number = re.search(r"\d{7}", runs)[0]
        written = re.search(r"\d*$", runs)[0]
        return 0 if int(number) % 2 or written == number else self.config.digits[int(number[len(written)])]


def reader(tokenizer):
    model = double(Reader, tokenizer, window=700)
    model.config.digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    return model


@pytest.fixture(scope="module")
def ruler(tokenizer):
    return harness(reader(tokenizer), tokenizer, "niah_single_1", [440, 512], limit=6)


@pytest.mark.slow
def test_ruler_tasks_have_the_requested_lengths(ruler):
    assert [(row.length, row.samples, row.measure) for row in ruler.rows] == [
        (440, 6, "string match"),
        (512, 6, "string match"),
    ]
    assert all(row.task == f"lm-eval {lm_eval.__version__} niah_single_1" for row in ruler.rows)
    assert all(256 < row.tokens <= 700 and 0 < row.score < 1 for row in ruler.rows)
    assert ruler.rows[0].tokens < ruler.rows[1].tokens
    assert ruler.rows[0].text_hash != ruler.rows[1].text_hash


@pytest.mark.slow
def test_ruler_scores_equal_lm_eval(ruler, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    subject = huggingface.HFLM(pretrained=reader(tokenizer), tokenizer=make_tokenizer(), max_length=700)
    given = lm_eval.simple_evaluate(
        model=subject,
        tasks=["niah_single_1"],
        limit=6,
        task_manager=lm_eval.tasks.TaskManager(
            include_defaults=False,
            include_path=lm_eval.tasks.__path__[0] + "/ruler",
            metadata={"tokenizer": str(tmp_path), "max_seq_lengths": [512]},
        ),
    )["results"]["niah_single_1"]
    assert given["4096,none"] == -1
    assert ruler.rows[1].score == given["512,none"]


@pytest.mark.slow
def test_the_error_names_the_tokens_that_ruler_does_not_count(tokenizer, llama):
    message = r"would cut .*niah_single_1.* given 512.* a length of \d+ or less"
    with pytest.raises(PePatchError, match=message) as found:
        harness(llama, tokenizer, "niah_single_1", 512, limit=20)
    fits = int(re.search(r"a length of (\d+) or less", str(found.value))[1])
    (row,) = harness(llama, tokenizer, "niah_single_1", fits, limit=1).rows
    assert row.tokens <= 512


def test_a_ruler_group_has_a_mean_at_every_length():
    from pe_patch.evaluation.lm_eval.rows import _scores

    results = {
        "first": {"alias": "first", "4096,none": -1, "512,none": 0.25, "512_stderr,none": 0.1},
        "second": {"alias": "second", "4096,none": -1, "512,none": 0.75, "512_stderr,none": "N/A"},
        "ruler": {"alias": "ruler", "4096,none": -1, "4096_stderr,none": "N/A"},
    }
    given = {"results": results, "group_subtasks": {"ruler": ["first", "second"]}}
    assert list(_scores(given, "first", 512)) == [("string match", "none", 0.25, 0.1)]
    assert list(_scores(given, "ruler", 512)) == [("string match, mean of the tasks", "none", 0.5, None)]
    results["second"]["512,none"] = -1
    assert list(_scores(given, "ruler", 512)) == list(_scores(given, "second", 512)) == []


# Side effects


def test_model_tokenizer_and_random_state_do_not_change(tasks):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = tiny_llama(len(tokenizer)).train()
    patch_model(model, "yarn", factor=8)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    harness(model, tokenizer, tasks["choice"], limit=1)
    assert model.training and tokenizer.pad_token is None
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())


def test_nothing_is_printed_to_stdout(llama, tokenizer, tasks, capsys):
    harness(llama, tokenizer, tasks["choice"], limit=1)
    assert capsys.readouterr().out == ""


def test_finished_tasks_are_not_run_again(llama, tokenizer, tasks, tmp_path, monkeypatch):
    first = harness(llama, tokenizer, tasks["choice"], limit=2, output=tmp_path)
    monkeypatch.setattr(lm_eval, "simple_evaluate", None)
    assert harness(llama, tokenizer, tasks["choice"], limit=2, output=tmp_path) == first
    with pytest.raises(TypeError):
        harness(llama, tokenizer, tasks["choice"], limit=3, output=tmp_path)


def test_an_edited_task_file_is_run_again(llama, tokenizer, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pe_patch.evaluation.lm_eval.tasks.default_task_manager",
        lambda _: lm_eval.tasks.TaskManager(include_defaults=False),
    )
    path = tmp_path / "own.yaml"
    scored = []
    for wording in ("{{question}}", "{{question}}", "{{question}} The answer"):
        path.write_text(json.dumps({**tasks["choice"], "task": "own", "doc_to_text": wording}))
        scored.append(harness(llama, tokenizer, str(path), limit=2, output=tmp_path / "out").rows[0])
    assert scored[0] == scored[1] and scored[0].text_hash != scored[2].text_hash


def test_retention_is_the_loss_at_the_native_window_and_the_benchmarks(llama, tokenizer, tasks, monkeypatch):
    monkeypatch.setattr("pe_patch.evaluation.lm_eval.run.RETENTION", (tasks["choice"],))
    rows = retention(llama, tokenizer, text=[make_text(60)], limit=2, label="mine").rows
    assert [(row.task, row.length) for row in rows[:2]] == [
        ("perplexity", 64),
        (f"lm-eval {lm_eval.__version__} choice", 512),
    ]
    assert {row.scheme for row in rows} == {"mine"} and {row.measure for row in rows[1:]} == {"acc", "acc_norm"}


# Errors


@pytest.mark.slow
def test_an_unknown_task_raises(llama, tokenizer):
    with pytest.raises(UnknownNameError, match=r"no task 'arc_chalenge'\. Did you mean 'arc_challenge'"):
        harness(llama, tokenizer, ["niah_single_1", "arc_chalenge"])


@pytest.mark.slow
def test_the_error_names_an_unreachable_data_set(llama, tokenizer, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PePatchError, match=r"'arc_easy' from its data set 'allenai/ai2_arc'.*network"):
        harness(llama, tokenizer, "retention")
    with pytest.raises(PePatchError, match=r"'niah_single_2'.*baber/paul_graham_essays.*network"):
        harness(llama, tokenizer, "niah_single_2", 512)
    with pytest.raises(PePatchError, match="allenai/ai2_arc"):
        retention(llama, tokenizer, text=[make_text()])
    assert RETENTION[0] == "arc_easy"


def test_the_error_names_a_missing_data_file(llama, tokenizer, tasks):
    lost = {**tasks["choice"], "task": "lost", "dataset_kwargs": {"data_files": {"test": "/nowhere/lost.json"}}}
    with pytest.raises(PePatchError, match=r"prepare the task 'lost' from its data set 'json'.*lost.json"):
        harness(llama, tokenizer, lost)


def test_without_lm_eval_the_error_names_the_extra(llama, tokenizer, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(PePatchError, match=r"pip install 'pe_patch\[eval\]'"):
        harness(llama, tokenizer, "arc_easy")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": 128}, OptionError, "no effect"),
        ({"max_length": 513}, PePatchError, "513 tokens are beyond the model's window of 512"),
        ({"max_length": 0}, PePatchError, "positive"),
        ({"chat": True}, PePatchError, "chat template"),
    ],
)
def test_options_without_effect_or_beyond_the_window_raise(llama, tokenizer, tasks, options, error, message):
    with pytest.raises(error, match=message):
        harness(llama, tokenizer, tasks["choice"], **options)


def test_lengths_beyond_the_limits_raise(llama, tokenizer):
    with pytest.raises(OptionError, match="Length 300 does not fit into max_length=256"):
        harness(llama, tokenizer, "niah_single_1", 300, max_length=256)
    with pytest.raises(PePatchError, match="beyond the model's window of 512"):
        harness(llama, tokenizer, "niah_single_1", 600)
    with pytest.raises(PePatchError, match="at least one task"):
        harness(llama, tokenizer, [])
