"""Evaluation scores equal independent computations."""

import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from pe_patch.errors import OptionError, PePatchError, UnknownNameError
from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.metrics import RetrievalAccuracy, TokenLoss, binomial_interval
from pe_patch.evaluation.model import EvaluatedModel, windows
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.perplexity_measures import position_buckets, sliding_losses
from pe_patch.evaluation.question import Question
from pe_patch.evaluation.results import COLUMNS, Results
from pe_patch.evaluation.retrieval import WORDINGS, make_sample
from pe_patch.evaluation.tasks import Needle, Passkey

from .evaluation_doubles import TEXT, Copier, Mute, double, make_tokenizer, measure, tiny_llama


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def llama(tokenizer):
    return tiny_llama(len(tokenizer))


def ask(samples):
    return [Question(sample.input_ids, (sample.answer,), len(sample.answer_ids)) for sample in samples]


# Retrieval


def test_a_shared_text_has_a_fact_at_every_depth_and_is_read_once(tokenizer, llama, monkeypatch):
    read, real = [], llama.forward

    def spy(*args, **named):
        read.append(named["input_ids"].numel())
        return real(*args, **named)

    monkeypatch.setattr(llama, "forward", spy)
    rows = measure(llama, tokenizer, Needle(shared_text=True, wording="english"), [700], samples=10, beyond_window=True)
    assert [row.depth for row in rows.rows] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert sum(row.samples for row in rows.rows) == 10
    examples = [example for row in rows.rows for example in row.details["examples"]]
    assert len({example["references"][0] for example in examples}) == 10
    long = [count for count in read if count > 300]
    assert len(long) == 2, read
    pooled = rows.cell(task="needle")
    assert pooled is not None and pooled.samples == 10
    with pytest.raises(OptionError, match="needles is 3"):
        measure(llama, tokenizer, Needle(needles=3, shared_text=True), [700], beyond_window=True)


@pytest.mark.parametrize("task", [Needle(wording="tokens"), Passkey(wording="tokens"), Passkey(wording="english")])
@pytest.mark.parametrize(("kind", "score"), [(Copier, 1.0), (Mute, 0.0)])
def test_a_model_that_reads_scores_one_and_a_mute_model_zero(tokenizer, task, kind, score):
    results = measure(double(kind, tokenizer), tokenizer, task, [260, 400], samples=6, depths=(0.0, 0.5, 1.0))
    assert len(results.rows) == 6
    assert {(row.score, row.samples, row.tokens == row.length) for row in results.rows} == {(score, 2, True)}


def test_a_model_with_a_truncated_prompt_scores_below_one(tokenizer):
    cut = double(Copier, tokenizer, sees=250)
    results = measure(cut, tokenizer, Passkey(), [400], samples=4, depths=(0.0, 0.9), control_length=240)
    assert {row.depth: row.score for row in results.rows} == {0.0: 0.0, 0.9: 1.0}
    assert {row.control for row in results.rows} == {1.0}


def test_one_token_answers_equal_greedy_generation(tokenizer, llama):
    haystack = np.array(tokenizer(TEXT[0])["input_ids"])
    samples = [
        make_sample(tokenizer, haystack, WORDINGS["tokens"], length=60, needles=4, rng=np.random.default_rng(seed))
        for seed in range(12)
    ]
    given = EvaluatedModel(llama, tokenizer, batch_size=5).answers(ask(samples))
    for sample, answer in zip(samples, given, strict=True):
        ids = torch.tensor(sample.input_ids)[None]
        written = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        assert answer == tokenizer.decode(written[0, -1:])
    assert len(set(given)) > 1


def test_long_answers_equal_step_by_step_argmax(tokenizer, llama):
    haystack = np.array(tokenizer(TEXT[0])["input_ids"])
    english = WORDINGS["english"]
    samples = [
        make_sample(tokenizer, haystack, english, length=length, rng=np.random.default_rng(length))
        for length in (230, 231, 250)
    ]
    for sample, answer in zip(samples, EvaluatedModel(llama, tokenizer).answers(ask(samples)), strict=True):
        ids = torch.tensor(sample.input_ids)[None]
        for _ in sample.answer_ids:
            ids = torch.cat([ids, llama(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        expected = tokenizer.decode(ids[0, len(sample.input_ids) :])
        assert answer.replace("<eos>", "") == expected.replace("<eos>", "")


def test_sampling_settings_of_a_checkpoint_are_not_used(tokenizer):
    copier = double(Copier, tokenizer)
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    copier.generation_config.update(do_sample=True, max_new_tokens=1, suppress_tokens=digits)
    assert {row.score for row in measure(copier, tokenizer, Passkey(wording="english"), [250]).rows} == {1.0}


def test_the_control_uses_the_same_questions_within_the_window(tokenizer, llama):
    results = measure(llama, tokenizer, [Needle(), Perplexity()], [64, 128], beyond_window=True, samples=10)
    for task, measured in {(row.task, row.measure) for row in results.rows} - {
        ("perplexity", "nats per token, by position")
    }:
        for short, long in zip(
            *(results.select(task=task, measure=measured, length=n) for n in (64, 128)), strict=True
        ):
            assert long.control == short.control == short.score
            assert long.control_length == short.control_length == 64
    alone = measure(llama, tokenizer, [Needle(), Perplexity()], [128], beyond_window=True, samples=10)
    together = results.select(length=128)
    fixed = [row for row in together if "sliding" not in row.measure and "position" not in row.measure]
    assert [(row.score, row.control) for row in fixed] == [
        (row.score, row.control) for row in alone.rows if "sliding" not in row.measure and "position" not in row.measure
    ]


# Loss


def test_fixed_target_loss_equals_the_loss_of_transformers(tokenizer, llama):
    task = Perplexity(measures=("fixed",), targets=20, spots=7)
    results = measure(llama, tokenizer, task, [40, 64], retrieval=False)
    corpus = Corpus.load(tokenizer, TEXT, 64)
    pieces, _ = corpus.spots(64, 20, 7, 0)
    for row in results.rows:
        ids = torch.tensor(np.stack(pieces))[:, -row.length :]
        labels = ids.clone()
        labels[:, :-20] = -100
        with torch.no_grad():
            expected = llama(input_ids=ids, labels=labels).loss.item()
        assert row.score == pytest.approx(expected, abs=1e-6)
        assert row.samples == 140 and "last 20 tokens of 7 spots" in row.measured_on
        tokens = sum(len(tokenizer(text)["input_ids"]) for text in TEXT)
        per_byte = expected / math.log(2) * tokens / sum(map(len, TEXT))
        assert row.details["bits_per_byte"] == pytest.approx(per_byte, abs=1e-6)
    assert len({row.details["targets_hash"] for row in results.rows}) == 1


@pytest.mark.parametrize(
    ("size", "window", "stride"), [(50, 16, 4), (50, 16, 15), (47, 16, 5), (16, 16, 3), (10, 16, 4)]
)
def test_sliding_loss_equals_one_forward_per_token(tokenizer, llama, size, window, stride):
    ids = np.array(tokenizer(TEXT[0])["input_ids"][:size])
    found = sliding_losses(EvaluatedModel(llama, tokenizer), ids, window, stride)
    assert found.shape == (size - 1,)
    for target in range(1, size):
        # the window that scores this token: the first one, else the one moved by whole strides, the last by the rest
        moved = 0 if target < window else min(math.ceil((target - window + 1) / stride) * stride, size - window)
        context = torch.tensor(ids[moved:target])[None]
        with torch.no_grad():
            expected = -llama(context).logits[0, -1].log_softmax(-1)[ids[target]]
        assert found[target - 1] == pytest.approx(expected.item(), abs=2e-5)


def test_position_buckets_double_and_cover_every_position():
    losses = np.arange(20, dtype=float).reshape(2, 10)
    buckets = position_buckets(losses)
    assert [(b["first"], b["last"], b["tokens"]) for b in buckets] == [(1, 1, 2), (2, 3, 4), (4, 7, 8), (8, 10, 6)]
    assert [b["loss"] for b in buckets] == [5.0, 6.5, 9.5, 13.0]


def test_a_loss_task_adds_a_retrieval_task_by_default(tokenizer, llama, caplog):
    task = Perplexity(measures=("fixed",), spots=2)
    with caplog.at_level(logging.INFO, "pe_patch"):
        both = measure(llama, tokenizer, task, [64])
    assert both.values("task") == ["perplexity", "needle"]
    assert "retrieval=False" in caplog.text
    assert measure(llama, tokenizer, task, [64], retrieval=False).values("task") == ["perplexity"]


# Errors instead of truncation


def test_a_truncating_tokenizer_raises(llama):
    class Truncating(type(make_tokenizer())):
        def __call__(self, *arguments, **options):
            found = super().__call__(*arguments, **options)
            found["input_ids"] = found["input_ids"][:512]
            return found

    truncating = make_tokenizer()
    truncating.__class__ = Truncating
    with pytest.raises(PePatchError, match="cut a document"):
        measure(llama, truncating, "needle", [64])


def test_a_length_beyond_the_window_raises_without_beyond_window(tokenizer, llama):
    with pytest.raises(PePatchError, match=r"65 is beyond the model's window of 64.*beyond_window=True"):
        measure(llama, tokenizer, "needle", [64, 65])
    assert measure(llama, tokenizer, "needle", [65], beyond_window=True).rows[0].tokens == 65


def test_a_generate_that_cuts_the_prompt_raises(tokenizer):
    copier = double(Copier, tokenizer)
    generate = copier.generate
    copier.generate = lambda input_ids, **options: generate(
        input_ids=input_ids[:, 5:], **options | {"attention_mask": None}
    )
    with pytest.raises(PePatchError, match="prompt was cut"):
        measure(copier, tokenizer, Passkey(wording="english"), [250])


@pytest.mark.parametrize(
    ("tasks", "lengths", "options", "error", "message"),
    [
        ("needel", [64], {}, UnknownNameError, "Did you mean 'needle'"),
        (Needle(wording="tokesn"), [64], {}, UnknownNameError, "Did you mean 'tokens'"),
        ([], [64], {}, PePatchError, "at least one task"),
        ("needle", [0], {}, PePatchError, "positive"),
        ("needle", [16], {}, PePatchError, "too few"),
        ("needle", [64], {"text": ["a short one"]}, PePatchError, "longer text"),
        ("needle", [64], {"samples": 0}, PePatchError, "samples"),
        (Perplexity(targets=64), [64], {}, PePatchError, "targets=64"),
        (Perplexity(stride=64), [64], {}, PePatchError, "stride=64"),
    ],
)
def test_wrong_arguments_raise(tokenizer, llama, tasks, lengths, options, error, message):
    with pytest.raises(error, match=message):
        measure(llama, tokenizer, tasks, lengths, **options)


def test_wrong_measures_raise():
    with pytest.raises(UnknownNameError, match="Did you mean 'fixed'"):
        Perplexity(measures=("fixd",))
    with pytest.raises(OptionError, match="spots"):
        Perplexity(spots=0)


# Rows and files


def test_rows_have_controls_intervals_and_hashes(tokenizer, llama, tmp_path):
    results = measure(llama, tokenizer, ["perplexity", "needle"], [40, 64], seed=3, label="mine")
    frame = results.to_pandas()
    assert tuple(frame.columns) == COLUMNS
    asked = "task length tokens depth score samples low high control seconds peak_memory scheme seed text_hash"
    assert {*asked.split(), "tokenizer_hash"} <= set(COLUMNS)
    assert set(frame["scheme"]) == {"mine"} and set(frame["seed"]) == {3}
    assert (
        (frame["seconds"] > 0).all()
        and (frame["low"] <= frame["score"]).all()
        and (frame["score"] <= frame["high"]).all()
    )
    assert frame["control"].notna().all() and (frame["measured_on"].str.len() > 20).all()
    folder = results.save(tmp_path / "out")
    assert Results.load(folder) == results
    assert len((folder / "results.jsonl").read_text().splitlines()) == len(frame)
    assert json.loads((folder / "config.json").read_text())["lengths"] == [40, 64]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "results.jsonl"]
    (folder / "results.jsonl").write_text("{")
    with pytest.raises(PePatchError, match="No readable results"):
        Results.load(folder)


def test_the_table_shows_sample_counts_and_units(tokenizer, llama):
    printed = str(measure(llama, tokenizer, [Needle()], [64], samples=5))
    assert "needle: exact answers, 8 needles" in printed and "5 questions" in printed and "seed 0" in printed


def test_equal_seeds_give_equal_results(tokenizer, llama):
    def scores(seed):
        rows = measure(llama, tokenizer, ["perplexity", "needle"], [64], seed=seed).rows
        return [(row.score, row.details) for row in rows]

    assert scores(1) == scores(1)
    assert scores(1) != scores(2)


def test_training_mode_is_restored(tokenizer):
    model = tiny_llama(len(tokenizer)).train()
    measure(model, tokenizer, "needle", [64])
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_windows_are_read_from_the_configuration(tokenizer):
    model = tiny_llama(len(tokenizer))
    assert windows(model) == (64, 64)
    model.config.max_position_embeddings = 256
    model.config.rope_parameters = {"rope_type": "yarn", "original_max_position_embeddings": 64}
    assert windows(model) == (64, 256)


def test_the_text_hash_identifies_the_text(tokenizer, llama):
    first, same, other = (
        measure(llama, tokenizer, "needle", [64], text=text).rows[0].text_hash for text in (TEXT, TEXT, TEXT[1:])
    )
    assert first == same != other


# Metrics


def test_the_binomial_interval_is_exact():
    # closed forms: all right gives (alpha/2)^(1/n), all wrong its mirror image; one trial covers [0.025, 1]
    for trials in (1, 7, 128):
        assert binomial_interval(trials, trials) == (pytest.approx(0.025 ** (1 / trials)), 1.0)
        assert binomial_interval(0, trials) == (0.0, pytest.approx(1 - 0.025 ** (1 / trials)))
    # 8 of 10: a textbook value of Clopper and Pearson's interval
    assert binomial_interval(8, 10) == (pytest.approx(0.4439, abs=5e-5), pytest.approx(0.9748, abs=5e-5))
    low, high = binomial_interval(500, 1000)
    assert low + high == pytest.approx(1.0) and high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 1000), rel=0.04)


def test_retrieval_accuracy_by_hand(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = RetrievalAccuracy(keep_in_memory=True).compute(
        predictions=["12", " 7\n", "x", ""], references=["12", "7", "y", "z"]
    )
    assert (found["accuracy"], found["samples"]) == (0.5, 4)
    assert (found["low"], found["high"]) == binomial_interval(2, 4)


def test_token_loss_by_hand():
    found = TokenLoss(keep_in_memory=True).compute(
        losses=[1.0, 2.0, 3.0, 6.0], groups=[0, 0, 1, 1], bytes_per_token=2.0
    )
    assert found["loss"] == 3.0 and found["tokens"] == 4
    assert found["perplexity"] == pytest.approx(math.exp(3))
    assert found["bits_per_byte"] == pytest.approx(3 / math.log(2) / 2)
    # two groups with means 1.5 and 4.5: a standard error of |4.5 - 1.5| / 2, times t for one degree of freedom
    assert found["high"] - 3.0 == pytest.approx(12.7062 * 1.5, rel=1e-5)
    weighted = TokenLoss(keep_in_memory=True).compute(losses=[0.0, 3.0, 3.0], groups=[0, 1, 1])
    assert weighted["loss"] == 2.0  # not 1.5, the mean of the groups' means


def test_metrics_gather_over_two_processes(tmp_path):
    code = (
        "import sys; from pe_patch.evaluation.metrics import RetrievalAccuracy;"
        "rank = int(sys.argv[1]);"
        "metric = RetrievalAccuracy(num_process=2, process_id=rank, experiment_id='both', cache_dir=sys.argv[2]);"
        "print(metric.compute(predictions=[['a', 'b'], ['c']][rank], references=[['a', 'x'], ['c']][rank]))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    first, second = (process.communicate(timeout=120)[0].strip().splitlines()[-1] for process in both)
    assert "'samples': 3" in first and "'accuracy': 0.666" in first
    assert second == "None"
