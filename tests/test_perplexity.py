"""Each measure of perplexity equals plain torch, the loss of Transformers, lm-eval, or a sum by hand."""

import math

import numpy as np
import pytest
import torch

from pe_patch.errors import OptionError, PePatchError, UnknownNameError
from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.model import EvaluatedModel
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.perplexity_compat import (
    COMPAT,
    longlora_spans,
    mean_of_perplexities,
    mean_of_tokens,
    mean_of_window_means,
    yarn_spans,
)
from pe_patch.evaluation.perplexity_measures import Span, sliding_losses
from pe_patch.evaluation.run import evaluate

from .evaluation_doubles import make_text, make_tokenizer, tiny_llama

TEXT = [make_text(60, seed) for seed in range(3)]
BOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<eos>")


@pytest.fixture(scope="module")
def llama(tokenizer):
    return tiny_llama(len(tokenizer)).double()


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return Corpus.load(tokenizer, TEXT, 64)


def measure(model, tokenizer, lengths, **options):
    task = Perplexity(**options)
    return evaluate(model, tokenizer, task, lengths, text=TEXT, progress=False, retrieval=False).rows


def losses_of(model, ids):
    """Compute the loss of every token but the first with its whole context, in plain torch and float64."""
    ids = torch.tensor(np.array(ids))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    return -logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()


def loss_by_labels(model, ids, scored):
    """Compute the mean loss of the last tokens with the labels argument of Transformers."""
    ids = torch.tensor(np.array(ids))[None]
    labels = ids.clone()
    labels[:, :-scored] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item()


# Sliding


@pytest.mark.parametrize(("length", "stride"), [(64, 16), (64, 63), (50, 7)])
def test_sliding_perplexity_equals_an_independent_implementation(llama, tokenizer, corpus, length, stride):
    (row,) = measure(llama, tokenizer, length, measures="sliding", stride=stride, stretch_tokens=400)
    size = row.details["stretch"]
    pieces, _ = corpus.spots(size, size, row.details["stretches"], 0)
    total, count, windows = [], 0, 0
    for ids in pieces:
        reached = 1  # the first token has nothing before it
        while reached < len(ids):
            # the window that begins so late that it ends at the first, or `stride` tokens further than the one before
            end = length if reached == 1 else min(reached + stride, len(ids))
            total += list(losses_of(llama, ids[end - length : end])[reached - end :])
            count += end - reached
            reached, windows = end, windows + 1
    expected = math.fsum(total) / count
    assert row.score == pytest.approx(expected, abs=1e-6)
    assert row.details["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert row.samples == count == len(pieces) * (size - 1)
    assert (row.details["window"], row.details["stride"], row.details["windows"]) == (length, stride, windows)
    assert f"window {length}, stride {stride}, no window starts with a BOS token" in row.measured_on


def test_with_bos_every_window_starts_with_it_and_the_first_token_is_scored(llama, tokenizer):
    ids = np.array(tokenizer(TEXT[0])["input_ids"][:40])
    found = sliding_losses(EvaluatedModel(llama, tokenizer), ids, 16, 5, start=[BOS])
    expected = list(losses_of(llama, [BOS, *ids[:15]]))
    for end in (20, 25, 30, 35, 40):
        expected += list(losses_of(llama, [BOS, *ids[end - 15 : end]])[-5:])
    assert found == pytest.approx(expected, abs=1e-5)
    (row,) = measure(llama, tokenizer, 64, measures="sliding", bos=True)
    assert row.details["bos"] is True and row.samples == row.details["stretch"] * row.details["stretches"]
    assert "every window starts with <eos>" in row.measured_on
    assert row.samples != measure(llama, tokenizer, 64, measures="sliding")[0].samples


def test_without_context_has_one_token_of_context(llama, tokenizer, corpus):
    (row,) = measure(llama, tokenizer, 64, measures="fixed", targets=10, spots=5)
    pieces, _ = corpus.spots(64, 10, 5, 0)
    assert row.without_context == pytest.approx(np.mean([losses_of(llama, ids[-11:]) for ids in pieces]), abs=1e-6)


# Compat modes: windows and averages by hand


def test_yarn_windows_start_at_strides_until_one_reaches_the_end():
    assert yarn_spans(10, 4, 3) == [Span(0, 4, 4), Span(3, 7, 3), Span(6, 10, 3)]
    assert yarn_spans(11, 4, 3) == [Span(0, 4, 4), Span(3, 7, 3), Span(6, 10, 3), Span(9, 11, 1)]
    assert yarn_spans(3, 4, 2) == [Span(0, 3, 3)]


def test_longlora_windows_overlap_and_omit_the_last():
    # starts 0, 3, 6 are below 12 - 4, and 6 is dropped
    assert longlora_spans(12, 4, 3) == [Span(0, 4, 3), Span(3, 7, 3)]
    assert longlora_spans(4, 4, 3) == longlora_spans(6, 4, 3) == []


def test_averages_by_hand():
    windows = [np.array([1.0, 1.0, 1.0, 1.0]), np.array([4.0]), np.array([2.0, 2.0])]
    assert mean_of_window_means(windows) == pytest.approx((1 + 4 + 2) / 3)
    assert mean_of_tokens(windows) == pytest.approx((4 + 4 + 4) / 7)
    assert mean_of_perplexities(windows) == pytest.approx((math.e + math.e**4 + math.e**2) / 3)


# Compat modes: on a model


def yarn_windows(ids, length, stride):
    """Return the read tokens and the number of scored tokens of each window, by the rule of YaRN and PoSE."""
    reached = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length - 1, len(ids))
        yield [BOS, *ids[begin:end]], end - reached
        reached = end
        if end == len(ids):
            return


@pytest.mark.parametrize("mode", ["yarn", "pose"])
def test_sliding_modes_equal_the_loss_of_transformers_per_window(llama, tokenizer, corpus, mode):
    (row,) = measure(llama, tokenizer, 64, compat=mode, stride=20, stretch_tokens=500)
    pieces, _ = corpus.spots(256, 256, 1, 0)
    means, counts = [], []
    for ids in pieces:
        for read, scored in yarn_windows(ids, 64, 20):
            means.append(loss_by_labels(llama, read, scored))
            counts.append(scored)
    assert counts[0] == 63 and counts[-1] != 20  # neither average is the other's
    weights = counts if mode == "pose" else None
    assert row.score == pytest.approx(math.exp(np.average(means, weights=weights)), rel=1e-6)
    assert row.samples == sum(counts) == 256 and row.details["windows"] == len(counts)
    assert ("each token weighing the same" in row.measured_on) == (mode == "pose")
    assert ("mean of the windows' means" in row.measured_on) == (mode == "yarn")


def test_yarn_truncate_has_one_window_per_text(llama, tokenizer, corpus):
    long, short = measure(llama, tokenizer, [40, 64], compat="yarn_truncate", windows=3)[::-1]
    pieces, _ = corpus.spots(64, 64, 3, 0)
    for row, length in ((short, 40), (long, 64)):
        means = [loss_by_labels(llama, [BOS, *ids[: length - 1]], length - 1) for ids in pieces]
        assert row.score == pytest.approx(math.exp(np.mean(means)), rel=1e-6)
        assert row.samples == 3 * (length - 1)


def test_longloras_overlapping_windows(llama, tokenizer, corpus):
    (row,) = measure(llama, tokenizer, 64, compat="longlora", stride=16, stretch_tokens=100)
    data = corpus.stream[:164]
    starts = list(range(0, 164 - 64, 16))[:-1]
    means = [loss_by_labels(llama, data[start : start + 64], 63) for start in starts]
    assert row.score == pytest.approx(2.71828 ** np.mean(means), rel=1e-6)
    assert row.details["windows"] == 6 and row.samples == 6 * 63 and "last window left out" in row.measured_on
    with pytest.raises(PePatchError, match="no two windows"):
        measure(llama, tokenizer, 64, compat="longlora", stride=30, stretch_tokens=30)


def test_evaluate_mode_averages_perplexities(llama, tokenizer, corpus):
    # The metric itself is a script on the hub; this is its documented computation, by Transformers' own loss.
    (row,) = measure(llama, tokenizer, 64, compat="evaluate", documents=2)
    texts = [ids[:63] for ids in corpus.documents[:2]]
    each = [math.exp(loss_by_labels(llama, [BOS, *ids], len(ids))) for ids in texts]
    assert row.score == pytest.approx(np.mean(each), rel=1e-6) and row.samples == 126
    assert "mean of the documents' perplexities" in row.measured_on


@pytest.mark.parametrize("length", [64, 50])
def test_rolling_loss_equals_lm_eval(llama, tokenizer, length):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    theirs = huggingface.HFLM(pretrained=llama, tokenizer=tokenizer, max_length=length, batch_size=1)
    asked = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(TEXT[:2])]
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    (row,) = measure(llama, tokenizer, length, compat="lm_eval", documents=2)
    assert row.details["log_likelihood"] == pytest.approx(sum(expected), rel=1e-6)
    words, size = sum(len(text.split()) for text in TEXT[:2]), sum(len(text) for text in TEXT[:2])
    assert row.score == pytest.approx(math.exp(-sum(expected) / words), rel=1e-5)
    assert row.details["byte_perplexity"] == pytest.approx(math.exp(-sum(expected) / size), rel=1e-6)
    assert row.details["bits_per_byte"] == pytest.approx(-sum(expected) / size / math.log(2), rel=1e-6)
    assert row.samples == sum(len(tokenizer(text)["input_ids"]) for text in TEXT[:2])


def test_the_modes_differ_on_the_same_text(llama, tokenizer):
    rows = measure(llama, tokenizer, 64, measures="sliding", compat=tuple(COMPAT))
    assert len({round(row.score, 9) for row in rows}) == len({row.measured_on for row in rows}) == 7
    assert [row.details.get("compat") for row in rows] == [None, *COMPAT]


def test_modes_that_need_bos_raise_without_it():
    without = make_tokenizer()
    model = tiny_llama(len(without))
    for options in (
        {"compat": "yarn"},
        {"compat": "yarn_truncate"},
        {"compat": "evaluate"},
        {"measures": "sliding", "bos": True},
    ):
        with pytest.raises(PePatchError, match="BOS token before every window"):
            measure(model, without, 64, **options)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"measures": "fixed", "stride": 8},
            "stride has no effect on fixed: it belongs to sliding, yarn, pose",
        ),
        ({"measures": "position", "judge": ("a", "b")}, "judge has no effect on position: it belongs to longppl"),
        (
            {"compat": "yarn", "bos": False},
            "bos has no effect on yarn: it belongs to fixed, sliding, position, longppl",
        ),
        ({"compat": "yarn_truncate", "stride": 8}, "stride has no effect on yarn_truncate"),
        ({"compat": "lm_eval", "stretch_tokens": 8}, "stretch_tokens has no effect on lm_eval"),
        ({"compat": "evaluate", "documents": 0}, "documents must be at least 1, got 0"),
        ({"measures": "longppl", "judge": 3}, "judge must be a folder"),
        ({"measures": ()}, "at least one measure"),
    ],
)
def test_options_without_effect_raise(options, message):
    with pytest.raises(OptionError, match=message):
        Perplexity(**options)


def test_unknown_names_raise(llama, tokenizer):
    with pytest.raises(UnknownNameError, match="Did you mean 'yarn'"):
        Perplexity(compat="yrn")
    with pytest.raises(UnknownNameError, match="Did you mean 'longppl'"):
        Perplexity(measures=("longpl",))
    with pytest.raises(PePatchError, match="short_context=64 leaves no context"):
        measure(llama, tokenizer, 64, measures="longppl", short_context=64)


def test_a_compat_mode_replaces_the_default_measures():
    assert list(Perplexity().chosen) == ["fixed", "sliding", "position"]
    assert list(Perplexity(compat=["yarn", "pose"]).chosen) == ["yarn", "pose"]
    assert list(Perplexity(measures="sliding", compat="yarn").chosen) == ["sliding", "yarn"]
    assert hash(Perplexity(measures=["fixed"])) == hash(Perplexity(measures="fixed"))
